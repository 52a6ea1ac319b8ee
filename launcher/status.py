"""The document of `up` and `status`, made from record and snapshot. Pure."""

from typing import Literal

from pydantic import BaseModel, Field

from launcher.documents import Document
from launcher.fitness import doubts
from launcher.record import Failure, ReplicaRecord, RunRecord
from launcher.snapshot import NodeView, ReplicaView, Snapshot
from launcher.verdicts import endpoint_of, is_lost, node_phase, replica_phase


class NodeStatus(BaseModel):
    node: str
    rank: int | None
    phase: str
    since: float | None = None
    waiting_for: str = ""
    lost_since: float | None = None
    doubts: list[str] = Field(default_factory=list)


class ReplicaStatus(BaseModel):
    name: str
    generation: int
    phase: str
    endpoint: str | None
    nodes: list[NodeStatus]
    allocation: str = ""
    allocation_ends_at: float | None = None
    expected_start: float | None = None
    since: float | None = None
    timings_s: dict[str, float] = Field(default_factory=dict)
    failure: Failure | None = None
    leftover: str = ""
    story: list[str] = Field(default_factory=list)


class CordonStatus(BaseModel):
    """A node that takes no new work, and why."""

    node: str
    kind: str
    reason: str
    at: float


class StatusError(BaseModel):
    code: str
    message: str
    where: str = ""
    hint: str = ""
    exit_code: int = 1


class Status(Document):
    """What `status.json` holds and `status --json` prints."""

    fleet: str
    run: int
    desired: Literal["up", "down"]
    phase: Literal["starting", "serving", "degraded", "failed", "stopping", "stopped"]
    endpoint: str | None
    api_key_file: str
    model: str
    backend: str
    replicas: list[ReplicaStatus]
    spares: list[str] = Field(default_factory=list)
    cordoned: list[CordonStatus] = Field(default_factory=list)
    waiting_for: list[str]
    error: StatusError | None = None
    leftover: str = ""  # what of the gateway did not end
    controller: str = "running"
    updated_at: float
    finished: bool = False

    @property
    def exit_code(self) -> int:
        """0 when the fleet fully does what was wished; else the exit code of its first error."""
        if self.error:
            return self.error.exit_code
        if self.desired == "down":
            return 0
        return 0 if self.phase == "serving" else 1


def make_status(
    *,
    fleet: str,
    model: str,
    backend: str,
    api_key_file: str,
    record: RunRecord,
    snapshot: Snapshot,
    waiting_for: tuple[str, ...],
    finished: bool,
    known: tuple[str, ...] = (),
    leftover: str = "",
) -> Status:
    replicas = [_replica(record.replicas[name], view) for name, view in snapshot.replicas.items()]
    failures = [r.failure for r in record.replicas.values() if r.failure]
    first = min(failures, key=lambda failure: failure.at, default=None)
    error = None
    if first is not None:
        error = StatusError(
            code=first.code,
            message=first.message,
            where=first.where,
            hint=first.hint,
            exit_code=first.exit_code,
        )
    phases = [replica.phase for replica in replicas]
    waits = list(waiting_for)
    told_of_gateway = snapshot.gateway.problem or "to take requests"
    if snapshot.desired == "up" and "serving" in phases and not snapshot.gateway.is_up:
        waits.append(f"the gateway: {told_of_gateway}")
    return Status(
        fleet=fleet,
        run=record.run,
        desired=snapshot.desired,
        phase=_fleet_phase(phases, snapshot, record.endpoint, finished=finished),
        endpoint=record.endpoint,
        api_key_file=api_key_file,
        model=model,
        backend=backend,
        replicas=replicas,
        cordoned=[
            CordonStatus(node=held.node, kind=held.kind, reason=held.reason, at=held.at)
            for held in snapshot.ledger.cordons.values()
            if held.node in known
        ],
        waiting_for=waits,
        error=error,
        leftover=leftover,
        updated_at=snapshot.now,
        finished=finished,
    )


def _fleet_phase(
    phases: list[str], snapshot: Snapshot, endpoint: str | None, *, finished: bool
) -> Literal["starting", "serving", "degraded", "failed", "stopping", "stopped"]:
    if snapshot.desired == "down":
        return "stopped" if finished else "stopping"
    serving = phases.count("serving")
    if serving and not (endpoint and snapshot.gateway.is_up):
        # No one can reach them: for the first time, or not any more.
        return "degraded" if endpoint else "starting"
    if phases and serving == len(phases):
        return "serving"
    if serving:
        return "degraded"
    return "failed" if "failed" in phases else "starting"


def _replica(record: ReplicaRecord, view: ReplicaView) -> ReplicaStatus:
    phase = replica_phase(record, view)
    nodes = [
        _node(record, rank, node, view.nodes.get(node)) for rank, node in enumerate(record.nodes)
    ]
    began = record.requested_at
    marks = {
        "allocated": record.running_at,
        "preflight": record.ranked_at,
        "first_token": record.serving_at,
    }
    since = {
        "serving": record.serving_at,
        "joining": record.ranked_at,
        "failed": record.failure.at if record.failure else None,
    }.get(phase, record.requested_at)
    return ReplicaStatus(
        name=record.name,
        generation=record.generation,
        phase=phase,
        endpoint=endpoint_of(record, view) if phase == "serving" else None,
        nodes=nodes,
        allocation=view.allocation.identity,
        allocation_ends_at=view.allocation.ends_at,
        expected_start=view.allocation.expected_start,
        since=since,
        timings_s={
            name: round(at - began, 2) for name, at in marks.items() if at is not None and began
        },
        failure=record.failure,
        leftover=record.leftover,
        story=list(record.story),
    )


def _node(record: ReplicaRecord, rank: int, node: str, view: NodeView | None) -> NodeStatus:
    failure = record.failure
    accused = bool(failure and failure.code == "node_lost" and failure.where == f"node {node}")
    if (
        accused
        and failure
        and (view is None or view.report is None or is_lost(view) or record.released)
    ):
        return NodeStatus(node=node, rank=rank, phase="lost", lost_since=failure.at)
    if view is None or view.report is None:
        return NodeStatus(node=node, rank=rank, phase="starting", waiting_for="its agent")
    report = view.report
    return NodeStatus(
        node=node,
        rank=rank,
        phase=node_phase(view),
        since=report.since,
        waiting_for=report.member.waiting_for if report.member else "",
        doubts=doubts(latest) if (latest := report.health or report.facts) else [],
    )
