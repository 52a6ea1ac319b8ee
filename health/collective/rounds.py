"""Which ranks meet in which round, and what the rounds say about whom. Pure.

All ranks meet once; then every node meets its two neighbours on a ring in rounds of disjoint
pairs (2 rounds for an even number of nodes, 3 for an odd one, as GREYHOUND does), each rail by
itself. A slow or silent node is the one that all its pairs accuse; where only one rail of it is
slow, that rail is named. No second pass is needed, for each neighbour has another pair.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from health.engine import last_line
from health.report import Finding
from health.thresholds import Thresholds

MARK = "LAUNCHER-COLLECTIVE "
KIB, MIB = 1024, 1024**2
DECODE_BYTES, PREFILL_BYTES = 256 * KIB, 8 * MIB
PAIR_BYTES = (256 * KIB, 2 * MIB, 16 * MIB)
_LATE_S = 2.0  # what a killed round takes beyond its deadline, and some
Op = Literal["all_reduce", "send_recv", "all_to_all"]


class Round(BaseModel):
    """One operation over disjoint groups of ranks, each group by itself."""

    model_config = ConfigDict(frozen=True)
    name: str
    op: Op
    groups: tuple[tuple[int, ...], ...]
    bytes: tuple[int, ...]


class Order(BaseModel):
    """What one node does: its ranks in the rounds, and where all meet."""

    model_config = ConfigDict(frozen=True)
    node: str
    ranks: tuple[int, ...]
    hosts_store: bool
    store_address: str
    store_port: int
    waits_s: tuple[float, ...]  # for each round, how long to wait for the others
    round_s: float
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Outcome:
    """What one rank told of one round. `stage` is how far it came."""

    rank: int
    round: str
    status: str
    stage: str
    detail: str = ""
    missing: int | None = None
    times: tuple[tuple[int, float], ...] = ()
    backend: str = ""


@dataclass(frozen=True)
class Told:
    """Everything that one node printed; `problem` where it printed nothing that ends."""

    outcomes: tuple[Outcome, ...] = ()
    done: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Accused:
    """A node, or one rail of it, that every pair it is in speaks against."""

    node: str
    rail: int | None
    message: str
    value: str = ""
    threshold: str = ""


@dataclass(frozen=True)
class CollectiveVerdict:
    """Findings by node ("" for nobody's own), and the bandwidth of every pair in bytes/s."""

    findings: dict[str, tuple[Finding, ...]] = field(default_factory=dict)
    pairs: dict[tuple[str, str, int], float] = field(default_factory=dict)


def waits_s(count: int, assemble_s: float, round_s: float) -> tuple[float, ...]:
    """How long to wait in each round for its other ranks, in seconds.

    The first waits for the slowest import. Who meets a dead node comes late to its next partner
    by that whole round, and must not be taken for dead itself: each wait outlasts a round before.
    """
    waits = [assemble_s]
    for _ in range(count - 1):
        waits.append(round_s if len(waits) == 1 else waits[-1] + round_s + _LATE_S)
    return tuple(waits)


def longest_s(waits: tuple[float, ...], round_s: float) -> float:
    """When the last round is over at the latest."""
    return sum(wait_s + round_s + _LATE_S for wait_s in waits)


def pattern_rounds(
    nodes: int, per_node: int, tensor: int, pipeline: int, *, expert: bool = False
) -> tuple[Round, ...]:
    """What this replica will do: reduce within tensor groups, send along the pipeline."""
    world = nodes * per_node
    everybody = tuple(range(world))
    rounds = [Round(name="all", op="all_reduce", groups=(everybody,), bytes=(DECODE_BYTES,))]
    if tensor > 1:
        groups = tuple(tuple(range(first, first + tensor)) for first in range(0, world, tensor))
        rounds.append(
            Round(
                name="tensor",
                op="all_reduce",
                groups=groups,
                bytes=(DECODE_BYTES, PREFILL_BYTES),
            )
        )
    if pipeline > 1:
        stage = max(1, world // pipeline)
        lanes = tuple(tuple(range(lane, world, stage)) for lane in range(stage))
        rounds.append(
            Round(
                name="pipeline", op="send_recv", groups=lanes, bytes=(DECODE_BYTES, PREFILL_BYTES)
            )
        )
    if expert:
        rounds.append(
            Round(name="expert", op="all_to_all", groups=(everybody,), bytes=(DECODE_BYTES,))
        )
    return tuple(rounds)


def pair_rounds(nodes: int, per_node: int) -> tuple[Round, ...]:
    """Every node with both neighbours on a ring, in rounds of disjoint pairs, rail by rail."""
    if nodes < 2:
        return ()
    edges = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else 1)]
    colours = [edges[0::2], edges[1::2]]
    if nodes % 2 and nodes > 2:
        colours = [edges[0:-1:2], edges[1:-1:2], edges[-1:]]
    rounds = []
    for number, pairs in enumerate(colours):
        groups = tuple(
            (a * per_node + rail, b * per_node + rail)
            for a, b in pairs
            for rail in range(per_node)
        )
        if groups:
            name = f"pairs {number + 1}"
            rounds.append(Round(name=name, op="all_reduce", groups=groups, bytes=PAIR_BYTES))
    return tuple(rounds)


def parse(output: str) -> Told:
    """What a node's worker printed."""
    outcomes, done, problem = [], False, ""
    if output.strip() and MARK not in output:  # Python or torch did not even start
        return Told(problem=last_line(output))
    for line in output.splitlines():
        if not line.startswith(MARK):
            continue
        try:
            row: dict[str, Any] = json.loads(line.removeprefix(MARK))
        except ValueError:
            continue
        if row.get("kind") == "done":
            done = True
        elif row.get("kind") == "error":
            problem = str(row.get("detail"))
        elif row.get("kind") == "result":
            outcomes.append(
                Outcome(
                    rank=int(row["rank"]),
                    round=str(row["round"]),
                    status=str(row["status"]),
                    stage=str(row["stage"]),
                    detail=str(row.get("detail", "")),
                    missing=row.get("missing"),
                    times=tuple((t["bytes"], t["seconds"]) for t in row.get("times", ())),
                    backend=str(row.get("backend", "")),
                )
            )
    return Told(tuple(outcomes), done, problem)


def conclude(
    nodes: tuple[str, ...],
    per_node: int,
    rounds: tuple[Round, ...],
    told: dict[str, Told],
    limits: Thresholds,
) -> CollectiveVerdict:
    """Who is slow, who is silent. nodes: in the order of their ranks."""
    findings: dict[str, list[Finding]] = defaultdict(list)
    for node in nodes:
        silent = _silence(told.get(node))
        if silent:
            findings[node].append(silent)
    node_of = {rank: nodes[rank // per_node] for rank in range(len(nodes) * per_node)}
    by_key = {(o.round, o.rank): o for t in told.values() for o in t.outcomes}
    pairs, broken = _pairs(rounds, by_key, node_of, per_node)
    # What a silent node did to its partners says nothing about them.
    silenced = {node for node, found in findings.items() if found}
    broken = {key for key in broken if not silenced & set(key[:2])}
    for one in _accused(nodes, per_node, pairs, broken, limits):
        device = f"rail {one.rail}" if one.rail is not None else ""
        if not findings[one.node]:
            found = _finding(one.message, device, one.value, one.threshold)
            findings[one.node].append(found)
    if not any(findings.values()):
        failed = [o for o in by_key.values() if o.status != "ok"]
        for node, message in _who_failed(failed, node_of, len(by_key)).items():
            findings[node].append(_finding(message, ""))
    return CollectiveVerdict(
        {node: tuple(found) for node, found in findings.items() if found}, pairs
    )


def _silence(told: Told | None) -> Finding | None:
    if told is None:
        return _finding("gave no answer to the collective check", "")
    if told.problem:
        return Finding(check="collective", verdict="unknown", message=told.problem)
    if not told.done and not told.outcomes:
        return _finding("did not come to the collective check", "")
    return None


def _pairs(
    rounds: tuple[Round, ...],
    by_key: dict[tuple[str, int], Outcome],
    node_of: dict[int, str],
    per_node: int,
) -> tuple[dict[tuple[str, str, int], float], set[tuple[str, str, int]]]:
    """Bandwidth of every pair in bytes/s, and the pairs that did not finish."""
    speeds: dict[tuple[str, str, int], float] = {}
    broken: set[tuple[str, str, int]] = set()
    for one in rounds:
        if not one.name.startswith("pairs"):
            continue
        for a, b in one.groups:
            key = (node_of[a], node_of[b], a % per_node)
            seen = [by_key.get((one.name, rank)) for rank in (a, b)]
            times = [o.times[-1] for o in seen if o and o.status == "ok" and o.times]
            if len(times) == 2:
                # Two ranks that reduce together send and receive the whole once.
                speeds[key] = times[0][0] / max(times[0][1], times[1][1], 1e-9)
            else:
                broken.add(key)
    return speeds, broken


def _accused(
    nodes: tuple[str, ...],
    per_node: int,
    speeds: dict[tuple[str, str, int], float],
    broken: set[tuple[str, str, int]],
    limits: Thresholds,
) -> list[Accused]:
    """Nodes (or one rail of them) that every pair they are in speaks against."""
    if not speeds and not broken:
        return []
    ordered = sorted(speeds.values())
    usual = median(ordered[len(ordered) // 2 :]) if ordered else 0.0
    bad = {key for key, speed in speeds.items() if speed < usual * limits.bandwidth_ratio_min}
    accused: list[Accused] = []
    for rail in range(per_node):
        pairs_of: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
        for key in [*speeds, *broken]:
            if key[2] == rail:
                pairs_of[key[0]].append(key)
                pairs_of[key[1]].append(key)
        for node in nodes:
            mine = pairs_of[node]
            if not mine or not all(key in bad or key in broken for key in mine):
                continue
            if len(mine) < 2:
                continue  # one pair speaks against both its nodes; neither can be named
            if any(key in broken for key in mine) and all(key in broken for key in mine):
                accused.append(Accused(node, rail, "no pair with it finished"))
            else:
                speed = max(speeds.get(key, 0.0) for key in mine)
                accused.append(
                    Accused(
                        node,
                        rail,
                        f"{_rate(speed)} to its neighbours; other pairs have {_rate(usual)}",
                        _rate(speed),
                        f"{limits.bandwidth_ratio_min} of {_rate(usual)}",
                    )
                )
    whole = {one.node for one in accused if _rails(accused, one.node) == per_node}
    merged: list[Accused] = []
    for one in accused:
        if one.node not in whole:
            merged.append(one)
        elif not any(other.node == one.node for other in merged):
            merged.append(replace(one, rail=None))
    return merged


def _rails(accused: list[Accused], node: str) -> int:
    return sum(1 for one in accused if one.node == node)


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.1f} GB/s" if bytes_s >= 1e9 else f"{bytes_s / 1e6:.0f} MB/s"


def _who_failed(failed: list[Outcome], node_of: dict[int, str], total: int) -> dict[str, str]:
    """When rounds failed and no pair accuses: whom did the others miss, or who is alone?"""
    if not failed:
        return {}
    missing = {o.missing for o in failed if o.missing is not None}
    if missing:
        return {node_of[rank]: "did not come to a round" for rank in sorted(missing)}
    alone = {node_of[o.rank]: o for o in failed}
    if len(failed) < total:
        return {
            node: f"{o.round}: came to {o.stage}; {o.detail or o.status}"
            for node, o in alone.items()
        }
    first = failed[0]
    return {
        "": f"{first.round}: no rank came beyond {first.stage}; {first.detail or first.status}"
    }


def _finding(message: str, device: str, value: str = "", threshold: str = "") -> Finding:
    return Finding(
        check="collective",
        verdict="unhealthy",
        message=message,
        device=device,
        advice="inspect or RMA",
        value=value,
        threshold=threshold,
        hint="Look at its cable and switch port, then at the driver.",
    )
