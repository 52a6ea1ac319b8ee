"""What replicas do now, in figures: from the gateway's state and the engines' metrics. Pure."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from launcher.gateway.documents import State
from launcher.gateway.members import in_flight

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
TOKENS = "vllm:generation_tokens_total"

# A sample of Prometheus' text: name, labels, value; a timestamp may follow. A label's value may
# hold blanks and braces, so what is quoted is passed over as a whole.
_SAMPLE = re.compile(
    r'([A-Za-z_:][A-Za-z0-9_:]*)(?:\s*\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?\s+(\S+)(?:\s+-?\d+)?\s*\Z'
)


@dataclass(frozen=True)
class Reading:
    """One look at an engine, at a time of the asker's own clock; None: it does not tell."""

    at: float
    running: float | None = None
    waiting: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Figures:
    """What one replica does now; None: nobody could tell."""

    tokens_per_s: float | None = None
    running: int | None = None
    waiting: int | None = None


@dataclass(frozen=True)
class Load:
    """All replicas by name. held: requests for which there is no replica now.

    metered: whether the engines were asked, too.
    """

    replicas: Mapping[str, Figures] = field(default_factory=dict)
    held: int = 0
    metered: bool = False

    def of(self, replica: str) -> Figures:
        return self.replicas.get(replica, Figures())


def totals(text: str, names: Iterable[str]) -> dict[str, float]:
    """These metrics, each summed over its labels: a data-parallel engine has several of each."""
    wanted = tuple(names)
    found: dict[str, float] = {}
    for row in text.splitlines():
        if not row.startswith(wanted):  # hundreds of others: look before parsing
            continue
        match = _SAMPLE.match(row)
        if match is None or match[1] not in wanted:
            continue
        try:
            value = float(match[2])
        except ValueError:
            continue
        if math.isfinite(value):
            found[match[1]] = found.get(match[1], 0.0) + value
    return found


def read_engine(text: str, at: float) -> Reading:
    """What an engine's /metrics tells."""
    found = totals(text, (RUNNING, WAITING, TOKENS))
    return Reading(at, found.get(RUNNING), found.get(WAITING), found.get(TOKENS))


def tokens_per_s(before: Reading | None, now: Reading | None) -> float | None:
    """From two looks; None where there are not two, or where the engine began anew between."""
    if before is None or now is None or before.tokens is None or now.tokens is None:
        return None
    if now.at <= before.at or now.tokens < before.tokens:
        return None
    return (now.tokens - before.tokens) / (now.at - before.at)


def load(
    members: Mapping[str, str],
    state: State | None,
    looks: Mapping[str, tuple[Reading | None, Reading]] | None = None,
) -> Load:
    """The figures of every replica. members: the gateway's name of each, where it has one.

    looks: the last two readings by member, where engines were asked. Where an engine does not
    tell, the gateway knows at least how many requests are there.
    """
    found = {}
    for replica, member in members.items():
        before, now = (looks or {}).get(member, (None, None))
        there = in_flight(state, member) if state is not None else None
        if now is None or now.running is None:
            found[replica] = Figures(tokens_per_s(before, now), running=there)
            continue
        waiting = None if now.waiting is None else int(now.waiting)
        found[replica] = Figures(tokens_per_s(before, now), int(now.running), waiting)
    held = sum(process.holding for process in state.processes) if state is not None else 0
    return Load(found, held, metered=looks is not None)
