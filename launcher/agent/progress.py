"""Does the engine still make tokens? Busy, idle or stuck, and when a canary is due. Pure.

Collectives deadlock while /health answers 200, so only what moves proves an engine: the figures of
its /metrics, or a canary (a completion of one token). It is stuck when it has work and nothing has
moved for STALL_S. Work is a request that runs, as far as the figures told, or a canary of ours:
vLLM tells of a request only after a step with it, so one that hangs in its first step is not seen.

What is no evidence: figures that do not come (silence), a canary that the API server refuses by
itself (4xx), and a time in which we ourselves did not run: then the clock begins again.

The first token was made before any of this begins, and vLLM captures its graphs before it listens;
a canary has the shape of that first request. A real request may still compile a kernel, and its
compiler is a process of its own: while one runs below the engine the clock stands, for
COMPILING_MAX_S at most. Other nodes' compilers are not seen; with tensor parallelism all compile
at once.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

STALL_S = 20.0
CANARY_DEADLINE_S = 20.0
CANARY_EVERY_S = 9.0  # with the deadline and a second for our own looks: 30 s
CANARY_RETRY_S = 2.0
OWN_GAP_S = 3.0  # looks come twice a second
COMPILING_MAX_S = 300.0  # after that vLLM itself gives up a step (its own default)
ALONE = ""  # the engine where the figures name none
RUNNING = "vllm:num_requests_running"
# All of them stand while the engine stands. The last is a gauge: a chunk of a long prompt that
# yields no token yet moves nothing else (vLLM 0.32).
MOVING = (
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:iteration_tokens_total_count",
    "vllm:iteration_tokens_total_sum",
    "vllm:kv_cache_usage_perc",
)
_ENGINE_LABEL = 'engine="'

Outcome = Literal["token", "refused", "nothing"]


@dataclass(frozen=True)
class Figures:
    """What /metrics said of one engine: requests that run, and what moves with its steps."""

    running: float
    moving: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """The rest is about the engine that is stuck, or has not moved for the longest; it is named
    where there are several."""

    state: Literal["busy", "idle", "stuck"]
    engine: str = ALONE
    silent_s: float = 0.0
    running: int = 0


@dataclass
class _Engine:
    """One engine behind the API server; there are several with data parallelism.

    `proved_at` is when we saw that it had moved, `sure_at` the earliest time at which that can
    have been: a canary is due by the one, a stall is counted from the other.
    """

    proved_at: float
    sure_at: float
    clock_at: float
    running: float = 0.0
    running_since: float = 0.0
    moving: tuple[float, ...] | None = None
    asked_at: float | None = None  # the first of the canaries that brought no token
    tried_at: float = 0.0

    def prove(self, now: float, sure_at: float) -> None:
        self.proved_at = self.clock_at = now
        self.sure_at = sure_at

    def due_at(self) -> float:
        if self.asked_at is not None:
            return self.tried_at + CANARY_RETRY_S
        return self.sure_at + CANARY_EVERY_S

    def quiet_s(self, now: float) -> float:
        """For how long it has had work and has not moved."""
        began = [self.running_since] if self.running > 0 else []
        began += [self.asked_at] if self.asked_at is not None else []
        return now - max(min(began), self.clock_at) if began else 0.0

    def is_stuck(self, now: float) -> bool:
        if self.running > 0 and now - max(self.running_since, self.clock_at) >= STALL_S:
            return True
        if self.asked_at is None:
            return False
        return now - max(self.asked_at, self.clock_at) >= CANARY_DEADLINE_S


class Progress:
    """Takes what is observed, each with its time on one monotonic clock, and judges."""

    def __init__(self, now: float) -> None:
        self._engines = {ALONE: _Engine(now, now, now)}
        self._under_way: str | None = None  # the engine of the canary that is out
        self._counted_at = now
        self._looked_at = now

    @property
    def is_parallel(self) -> bool:
        return len(self._engines) > 1

    def counted(self, now: float, figures: Mapping[str, Figures] | None) -> None:
        """The figures came; None or nothing where they did not, which says nothing."""
        if not figures:
            return
        if self._engines.keys() != figures.keys():
            self._meet(now, figures)
        for label, told in figures.items():
            engine = self._engines[label]
            if engine.moving is not None and told.moving != engine.moving:
                engine.prove(now, self._counted_at)
                if self._under_way != label:
                    engine.asked_at = None
            if told.running > 0 and engine.running <= 0:
                engine.running_since = now
            engine.moving, engine.running = told.moving, told.running
        self._counted_at = now

    def canary_due(self, now: float) -> str | None:
        """The engine that is to be asked for a token now; one canary is out at a time."""
        if self._under_way is not None:
            return None
        due = [label for label, engine in self._engines.items() if now >= engine.due_at()]
        return min(due, key=lambda label: self._engines[label].due_at(), default=None)

    def canary_sent(self, now: float, label: str) -> None:
        self._under_way = label
        engine = self._engines.get(label)
        if engine is not None:
            engine.tried_at = now
            engine.asked_at = now if engine.asked_at is None else engine.asked_at

    def canary_ended(self, now: float, outcome: Outcome) -> None:
        """A token proves; a refusal says nothing; of a late one the clock goes on."""
        engine = self._engines.get(self._under_way or ALONE)
        self._under_way = None
        if engine is None or engine.asked_at is None:
            return
        if outcome == "token":
            engine.prove(now, now)
        elif outcome == "refused":
            engine.sure_at = now  # asked again in a while, and not sooner
        if outcome != "nothing" or engine.proved_at > engine.asked_at:
            engine.asked_at = None  # nothing, but it moved meanwhile: the canary stood in a queue

    def compiling(self, now: float) -> None:
        """A compiler runs below the engine."""
        for engine in self._engines.values():
            if now - engine.proved_at <= COMPILING_MAX_S:
                engine.clock_at = now

    def quiet_s(self, now: float) -> float:
        """For how long an engine has had work and has not moved, at most."""
        return max(engine.quiet_s(now) for engine in self._engines.values())

    def look(self, now: float) -> Verdict:
        """To be called twice a second, for a gap between two calls is a gap of our own."""
        if now - self._looked_at > OWN_GAP_S:
            self._begin_again(now)
        self._looked_at = now
        engines = self._engines
        stuck = [label for label, engine in engines.items() if engine.is_stuck(now)]
        label = max(stuck or engines, key=lambda name: now - engines[name].proved_at)
        works = any(engine.running > 0 for engine in engines.values())
        return Verdict(
            state="stuck" if stuck else ("busy" if works else "idle"),
            engine=label if self.is_parallel else ALONE,
            silent_s=now - engines[label].proved_at,
            running=int(engines[label].running),
        )

    def _begin_again(self, now: float) -> None:
        for engine in self._engines.values():
            engine.clock_at = now

    def _meet(self, now: float, figures: Mapping[str, Figures]) -> None:
        """The figures name other engines than before: the first time, or after a change."""
        alone = self._engines.get(ALONE)
        fresh = replace(alone, asked_at=None) if alone else _Engine(now, now, now)
        if alone and len(figures) == 1:
            fresh = alone
        found = {label: self._engines.get(label) or replace(fresh) for label in figures}
        if self._under_way == ALONE and len(figures) == 1:
            self._under_way = next(iter(figures))
        self._engines = found


def read_figures(lines: Iterable[str]) -> dict[str, Figures]:
    """Figures by engine from Prometheus text; empty where there are none of vLLM's.

    Summed over all labels but the engine's: one that stands must not hide behind one that moves.
    """
    sums: dict[str, dict[str, float]] = {}
    for line in lines:
        name, labels, rest = _parts(line)
        if name != RUNNING and name not in MOVING:
            continue
        try:
            value = float(rest.split()[0])
        except (ValueError, IndexError):
            continue
        if math.isfinite(value):
            of_engine = sums.setdefault(_engine_of(labels), {})
            of_engine[name] = of_engine.get(name, 0.0) + value
    return {
        label: Figures(found.get(RUNNING, 0.0), tuple(found.get(name, 0.0) for name in MOVING))
        for label, found in sums.items()
    }


def words(verdict: Verdict, health: str = "", canary: str = "") -> str:
    """Why the engine is given up. `health` is what /health did, `canary` what the last one got."""
    where = f" of data-parallel engine {verdict.engine}" if verdict.engine else ""
    if verdict.running > 0:
        count = "1 request runs" if verdict.running == 1 else f"{verdict.running} requests run"
        work = f"while {count}"
    else:
        work = "though it was asked for one" + (f" ({canary})" if canary else "")
    message = f"stalled: no token{where} for {verdict.silent_s:.0f} s {work}"
    return message + (f"; /health {health}" if health else "")


def _parts(line: str) -> tuple[str, str, str]:
    """Name, labels and the rest of a sample; a label's value may hold any character."""
    if "{" not in line:
        name, _, rest = line.partition(" ")
        return name, "", rest
    name, _, tail = line.partition("{")
    labels, _, rest = tail.rpartition("}")
    return name, labels, rest


def _engine_of(labels: str) -> str:
    begin = 0 if labels.startswith(_ENGINE_LABEL) else labels.find("," + _ENGINE_LABEL) + 1
    if not labels.startswith(_ENGINE_LABEL, begin):
        return ALONE
    return labels[begin + len(_ENGINE_LABEL) :].partition('"')[0]
