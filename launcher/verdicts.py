"""From reports to words: is a node lost, what phase is a replica in, who failed first. Pure."""

from collections.abc import Mapping
from typing import Literal

from launcher.documents import Evidence
from launcher.record import Failure, ReplicaRecord
from launcher.snapshot import NodeView, ReplicaView

# Where our heartbeats reach an agent, silence and no new beat in its report is loss; where they
# never did (a laptop behind a jump host), only the report's beat counts, and takes longer.
HEARTBEAT_LOST_S = 5.0
BEAT_LOST_WITH_HEARTBEAT_S = 12.0
BEAT_LOST_ALONE_S = 60.0

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


def node_phase(view: NodeView) -> str:
    if view.report is None:
        return "starting"
    return "lost" if is_lost(view) else view.report.phase


def replica_phase(record: ReplicaRecord, view: ReplicaView) -> ReplicaPhase:
    """A pure function of the record's intent, the nodes' reports and the endpoint."""
    if record.failure and record.released:
        return "failed"
    if record.intent == "down":
        return "stopped" if record.released else ("failed" if record.failure else "draining")
    if record.intent == "none" or view.allocation.state in ("none", "pending"):
        return "pending"
    phases = [node_phase(view.nodes[node]) for node in record.nodes if node in view.nodes]
    if record.ranked_at is None:
        return "starting" if not phases or "starting" in phases else "preflight"
    leader = view.nodes.get(record.nodes[0]) if record.nodes else None
    report = leader.report if leader else None
    proven = report is not None and report.member is not None and report.member.first_token_at
    ours = report is not None and report.assignment_revision == record.revision_of(record.nodes[0])
    if proven and ours and "failed" not in phases and "lost" not in phases:
        return "serving"
    return "joining"


def endpoint_of(record: ReplicaRecord, view: ReplicaView) -> str | None:
    leader = view.nodes.get(record.nodes[0]) if record.nodes else None
    if leader is None or leader.report is None or leader.report.member is None:
        return None
    return leader.report.member.endpoint


def first_failure(record: ReplicaRecord, view: ReplicaView, now: float) -> Failure | None:
    """Who failed first, from all that is known now; None while nobody did.

    A member that says that it lost a peer accuses the peer: if the peer has evidence of its own,
    that is the cause; if the peer is silent, the peer's node is lost. Exits elsewhere follow from
    either, so they are the cause only when nobody is accused.
    """
    evidences = {
        node: seen.report.evidence
        for node, seen in view.nodes.items()
        if seen.report and seen.report.evidence and node in record.nodes
    }
    own = [evidence for evidence in evidences.values() if evidence.kind != "lost_peer"]
    accused = [evidence for evidence in evidences.values() if evidence.kind == "lost_peer"]
    for accusation in sorted(accused, key=lambda evidence: evidence.at):
        peer = view.nodes.get(accusation.process)
        if accusation.process in evidences:
            continue
        if peer is None or is_silent(peer):
            return _lost(accusation.process, accusation.at, peer, accusation)
    if own:
        first = min(own, key=lambda evidence: evidence.at)
        return _held_up(_died(first), view.nodes) if first.kind == "stall" else _died(first)
    for node in record.nodes:
        seen = view.nodes.get(node)
        if seen is not None and is_lost(seen):
            return _lost(
                node, now - (seen.heartbeat_silent_s or seen.beat_silent_s or 0), seen, None
            )
    if accused:
        evidence = min(accused, key=lambda accusation: accusation.at)
        return _lost(evidence.process, evidence.at, view.nodes.get(evidence.process), evidence)
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
