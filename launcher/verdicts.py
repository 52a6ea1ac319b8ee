"""From reports to words: is a node lost, what phase is a replica in, who failed first. Pure."""

from collections.abc import Mapping
from typing import Literal

from launcher.documents import Evidence, MemberReport
from launcher.record import Failure, ReplicaRecord
from launcher.snapshot import NOTHING, NodeView, Snapshot

# Where our heartbeats reach an agent, silence and no new beat in its report is loss; where they
# never did (a laptop behind a jump host), only the report's beat counts, and takes longer.
HEARTBEAT_LOST_S = 5.0
BEAT_LOST_WITH_HEARTBEAT_S = 12.0
BEAT_LOST_ALONE_S = 60.0
STORY_S = 3.0
QUIET_S = 10.0

ReplicaPhase = Literal[
    "pending", "starting", "preflight", "joining", "serving", "draining", "stopped", "failed"
]


def is_lost(view: NodeView) -> bool:
    """Whether the node was seen before and cannot be seen now."""
    if view.report is None or view.beat_silent_s is None:
        return False
    if view.report.phase == "stopped":
        return False
    if view.ended:
        return True
    if view.heartbeat_silent_s is not None:
        return (
            view.heartbeat_silent_s > HEARTBEAT_LOST_S
            and view.beat_silent_s > BEAT_LOST_WITH_HEARTBEAT_S
        )
    return view.beat_silent_s > BEAT_LOST_ALONE_S


def is_silent(view: NodeView) -> bool:
    """Whether it misses heartbeats now: not yet lost for us, but no witness either."""
    if view.heartbeat_silent_s is None or view.ended:
        return is_lost(view)
    return view.heartbeat_silent_s > HEARTBEAT_LOST_S / 2


def is_quiet(view: NodeView) -> bool:
    """Whether it does not answer over the network, though its reports may still come."""
    return view.heartbeat_silent_s is not None and view.heartbeat_silent_s > QUIET_S


def node_phase(view: NodeView) -> str:
    if view.report is None:
        return "starting"
    return "lost" if is_lost(view) else view.report.phase


def is_dead(view: NodeView) -> bool:
    """Whether the agent is no more while its machine can be reached: nothing will come of it."""
    if view.ended:
        return True
    if view.report is not None and view.report.phase == "stopped":
        return True
    return is_lost(view) and view.reachable


def is_seated(replica: ReplicaRecord, snapshot: Snapshot) -> bool:
    """Whether every seat's agent lives in an allocation that is there."""
    return all(
        snapshot.allocations.get(seat.allocation, NOTHING).state in ("running", "unknown")
        for seat in replica.seats
    )


def replica_phase(replica: ReplicaRecord, snapshot: Snapshot) -> ReplicaPhase:
    """A pure function of the record's intent, the nodes' reports and the endpoint."""
    if replica.failure and replica.over:
        return "failed"
    if replica.intent == "down":
        return "stopped" if replica.over else ("failed" if replica.failure else "draining")
    if replica.is_restarting:
        return "draining"
    if not replica.seats:
        return "pending"
    views = snapshot.agents(replica.seats)
    phases = [node_phase(view) for view in views.values()]
    if replica.ranked_at is None:
        return "starting" if "starting" in phases else "preflight"
    member = _member_of(views[replica.nodes[0]])
    proven = member is not None and member.generation == replica.generation
    if proven and member is not None and member.first_token_at and is_seated(replica, snapshot):
        if not any(phase in ("failed", "lost", "stopped") for phase in phases):
            return "serving"
    return "joining"


def endpoint_of(replica: ReplicaRecord, snapshot: Snapshot) -> str | None:
    """Where the leader's engine answers, as it reported itself."""
    member = _member_of(snapshot.agent(replica.seats[0])) if replica.seats else None
    if member is None or member.generation != replica.generation:
        return None
    return member.endpoint


def _member_of(view: NodeView) -> MemberReport | None:
    return view.report.member if view.report else None


def first_failure(
    replica: ReplicaRecord, views: Mapping[str, NodeView], now: float
) -> Failure | None:
    """Who failed first, from all that is known now; None while nobody did.

    A member that says that it lost a peer accuses the peer: if the peer has evidence of its own,
    that is the cause; if the peer is silent, the peer's node is lost. Exits elsewhere follow from
    either, so they are the cause only when nobody is accused.
    """
    evidences = {
        node: seen.report.evidence
        for node, seen in views.items()
        if seen.report
        and seen.report.evidence
        and (seen.report.member is None or seen.report.member.generation == replica.generation)
    }
    own = [evidence for evidence in evidences.values() if evidence.kind != "lost_peer"]
    accused = [evidence for evidence in evidences.values() if evidence.kind == "lost_peer"]
    for accusation in sorted(accused, key=lambda evidence: evidence.at):
        peer = views.get(accusation.process)
        if accusation.process in evidences and evidences[accusation.process] in own:
            continue  # it has died of something; where both accuse, the silent one is lost
        if peer is None or is_silent(peer):
            return _lost(accusation.process, accusation.at, peer, accusation)
    if own:
        first = min(own, key=lambda evidence: evidence.at)
        return _held_up(_died(first), views) if first.kind == "stall" else _died(first)
    for node, seen in views.items():
        if is_lost(seen):
            return _lost(
                node, now - (seen.heartbeat_silent_s or seen.beat_silent_s or 0), seen, None
            )
    if accused:
        evidence = min(accused, key=lambda accusation: accusation.at)
        if 0 <= now - evidence.at < STORY_S:
            return None  # who is accused answers us: what it says itself is on its way
        return _lost(evidence.process, evidence.at, views.get(evidence.process), evidence)
    return None


def _died(evidence: Evidence) -> Failure:
    code, exit_code = {
        "deadline": ("deadline", 4),
        "preflight": ("preflight", 3),
        "stall": ("stall", 1),
    }.get(evidence.kind, ("engine", 1))
    return Failure(
        code=code,
        exit_code=exit_code,
        message=evidence.message,
        where=f"node {evidence.node}",
        hint=evidence.hint or "`launcher logs` shows the first failure first.",
        at=evidence.at,
        evidence=evidence,
    )


def _held_up(failure: Failure, nodes: Mapping[str, NodeView]) -> Failure:
    """The leader tells of a stall; which process holds it up may be known on another node."""
    stalled = failure.evidence.node if failure.evidence else ""
    members = {node: seen.report.member for node, seen in nodes.items() if seen.report}
    suspects = {node: member.suspects for node, member in members.items() if member}
    others = {node: said for node, said in suspects.items() if said and node != stalled}
    if not others:
        return failure
    told = (f"on {node}: {', '.join(said)}" for node, said in sorted(others.items()))
    where = failure.where if suspects.get(stalled) else f"node {min(others)}"
    message = "; ".join((failure.message, *told))
    return failure.model_copy(update={"message": message, "where": where})


def _lost(node: str, at: float, seen: NodeView | None, evidence: Evidence | None) -> Failure:
    problem = f" ({seen.problem})" if seen and seen.problem else ""
    return Failure(
        code="node_lost",
        exit_code=1,
        message=f"node {node} was lost: it stopped answering{problem}",
        where=f"node {node}",
        hint="Look whether the machine is up; `launcher up` starts the replica again.",
        at=at,
        evidence=evidence,
    )
