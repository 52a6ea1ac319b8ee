"""Which member takes a request. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.gateway.documents import Member


@dataclass(frozen=True)
class Seen:
    """What this process sees of a member: can it be connected to, and does /health answer well?"""

    in_flight: int
    reachable: bool = True
    sure: bool = True


def choose(
    members: tuple[Member, ...],
    seen: Mapping[str, Seen],
    tried: frozenset[str],
    draw: float,
) -> Member | None:
    """The member with the fewest requests in flight for what it can take; None: wait.

    One whose /health fails is only asked when no other is left: a saturated engine misses a
    deadline, too. One that cannot be connected to is not asked. A fallback is asked when no
    replica is left that this request has not tried. draw: in [0, 1), breaks ties.
    """
    able = [m for m in members if m.goal == "serving" and seen[m.name].reachable]
    replicas = [m for m in able if not m.fallback]
    groups = (
        [m for m in replicas if seen[m.name].sure],
        replicas,
        [m for m in able if m.fallback],
    )
    for group in groups:
        if untried := [m for m in group if m.name not in tried]:
            return _least(untried, seen, draw)
    return None


def _least(group: list[Member], seen: Mapping[str, Seen], draw: float) -> Member:
    cost = {m.name: (seen[m.name].in_flight + 1) / m.weight for m in group}
    least = min(cost.values())
    equal = [m for m in group if cost[m.name] <= least * 1.000001]
    return equal[int(draw * len(equal))]


def may_come(members: tuple[Member, ...], tried: frozenset[str], *, expects: bool) -> bool:
    """Whether waiting can help: a replica is coming up, or one that was not tried may return."""
    return expects or any(
        m.goal == "serving" and not m.fallback and m.name not in tried for m in members
    )
