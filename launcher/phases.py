"""What a replica's bring-up spent its time on, and what ran beside what. Pure.

Each phase is measured on one clock: the controller's, or (with a node) that node's. Where that one
contradicts what must be so (an engine is started after it was ordered, and before it was seen to
serve) all times of that node are moved by the least that sets this right.
"""

from typing import NamedTuple

from pydantic import BaseModel, Field

from launcher.documents import MemberReport, Parked, Report
from launcher.record import ReplicaRecord, RunRecord
from launcher.snapshot import Snapshot

_BESIDE_OTHERS = ("park",)
BESIDE_S = 0.05  # who overlaps by less only follows


class Phase(BaseModel):
    """began_s counts from the command, in a later generation from when that was first wanted;
    less than 0: it was done before. took_s is None while it goes on, and for good where the
    replica failed in it. beside: the other phases that ran at the same time."""

    name: str
    node: str | None = None
    began_s: float
    took_s: float | None
    beside: list[str] = Field(default_factory=list)
    clock_off_s: float = 0.0  # by how much the node's clock was found to be behind ours


class _Span(NamedTuple):
    name: str
    node: str | None
    began_at: float
    ended_at: float | None
    off_s: float = 0.0

    def end(self, now: float) -> float:
        return now if self.ended_at is None else self.ended_at

    def is_beside(self, other: "_Span", now: float) -> bool:
        both = min(self.end(now), other.end(now)) - max(self.began_at, other.began_at)
        return self.name != other.name and both > BESIDE_S


def phases_of(replica: ReplicaRecord, record: RunRecord, snapshot: Snapshot) -> list[Phase]:
    """Of the present generation, in the order in which they began."""
    if replica.requested_at is None:
        return []
    spans = [*_of_controller(replica, record), *_of_nodes(replica, snapshot)]
    origin = _origin(replica, record)
    now = snapshot.now
    return [
        Phase(
            name=span.name,
            node=span.node,
            began_s=round(span.began_at - origin, 2),
            took_s=None if span.ended_at is None else round(span.ended_at - span.began_at, 2),
            beside=list(dict.fromkeys(one.name for one in spans if span.is_beside(one, now))),
            clock_off_s=round(span.off_s, 2),
        )
        for span in sorted(spans, key=lambda span: span.began_at)
    ]


def longest(phases: list[Phase], *, beside: bool) -> dict[str, float]:
    """The seconds of each phase that is over, of the node that took longest. beside: of those that
    ran beside the others, else of those that follow each other."""
    found: dict[str, float] = {}
    for phase in phases:
        is_beside = phase.name in _BESIDE_OTHERS
        if phase.took_s is not None and is_beside == beside and (phase.beside or not beside):
            found[phase.name] = max(phase.took_s, found.get(phase.name, 0.0))
    return found


def _origin(replica: ReplicaRecord, record: RunRecord) -> float:
    assert replica.requested_at is not None
    is_first = not replica.incidents and not replica.restarts_asked
    asked_at = record.asked_at if is_first else None
    return replica.requested_at if asked_at is None else min(asked_at, replica.requested_at)


def _of_controller(replica: ReplicaRecord, record: RunRecord) -> list[_Span]:
    """After a failure preflight has the pause before the next try in it."""
    origin, wanted_at = _origin(replica, record), replica.requested_at
    assert wanted_at is not None
    up_at, ranked_at = replica.agents_at, replica.ranked_at
    spans = [_Span("command", None, origin, wanted_at)] if origin < wanted_at else []
    spans.append(_Span("allocation", None, wanted_at, up_at))
    return spans if up_at is None else [*spans, _Span("preflight", None, up_at, ranked_at)]


def _of_nodes(replica: ReplicaRecord, snapshot: Snapshot) -> list[_Span]:
    spans = []
    for rank, seat in enumerate(replica.seats):
        report = snapshot.agent(seat).report
        if report is None:
            continue
        member = _member(replica, report)
        off_s = _clock_off_s(replica, member, snapshot.now) if member else 0.0
        for name, began_at, ended_at in (
            *_imports(member, report.parked),
            *_engine(member, leads=rank == 0),
        ):
            over_at = None if ended_at is None else ended_at + off_s
            spans.append(_Span(name, seat.node, began_at + off_s, over_at, off_s))
    return spans


def _member(replica: ReplicaRecord, report: Report) -> MemberReport | None:
    """What the node says of this generation; before ranks are given it speaks of another."""
    member = report.member
    if member is None or replica.ranked_at is None:
        return None
    its = (member.replica, member.generation)
    return member if its == (replica.name, replica.generation) else None


_Times = tuple[str, float, float | None]


def _imports(member: MemberReport | None, parked: Parked | None) -> list[_Times]:
    """Of the process that the engine became; before that, of the one that it may become."""
    one = member.parked if member and member.started_at else parked
    if one is None or one.state == "none":
        return []
    if one.state == "importing":
        return [("park", one.since, None)]
    return [("park", one.since - (one.took_s or 0.0), one.since)]


def _engine(member: MemberReport | None, *, leads: bool) -> list[_Times]:
    if member is None or member.begun_at is None:
        return []
    spans: list[_Times] = [("engine", member.begun_at, member.started_at)]
    if leads and member.started_at is not None:
        spans.append(("first_token", member.started_at, member.first_token_at))
    return spans


def _clock_off_s(replica: ReplicaRecord, member: MemberReport, now: float) -> float:
    """0 where all that this node says can be true by our clock."""
    said = [
        at for at in (member.begun_at, member.started_at, member.first_token_at) if at is not None
    ]
    if not said or replica.ranked_at is None:
        return 0.0
    least, most = replica.ranked_at - min(said), (replica.serving_at or now) - max(said)
    return min(max(0.0, least), most)
