"""The document of `up` and `status`, made from record and snapshot. Pure."""

from typing import Literal

from pydantic import BaseModel, Field

from launcher.documents import Document, Parked, Weights
from launcher.errors import FleetError
from launcher.fitness import doubts
from launcher.phases import Phase, phases_of
from launcher.record import AllocationRecord, Failure, ReplicaRecord, RunRecord, Seat
from launcher.snapshot import NOTHING, NodeView, Snapshot
from launcher.spec import FleetSpec
from launcher.verdicts import endpoint_of, is_lost, node_phase, replica_phase


class NodeStatus(BaseModel):
    node: str
    rank: int | None
    phase: str
    since: float | None = None
    waiting_for: str = ""
    lost_since: float | None = None
    parked: Parked | None = None  # the engine process that is ready for the next start
    weights: Weights | None = None
    started: str = ""  # how the engine that runs now was started
    ray_workers: str = ""  # how many of them were parked, how many started plainly, and why
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
    phases: list[Phase] = Field(default_factory=list)  # of the present generation
    failure: Failure | None = None
    leftover: str = ""
    restarts_asked: int = 0  # by a person, as far as they were taken up
    story: list[str] = Field(default_factory=list)


class SpareStatus(BaseModel):
    """A node that serves nobody and is kept ready, or is on its way."""

    name: str
    node: str | None
    phase: str
    allocation: str = ""
    allocation_ends_at: float | None = None
    since: float | None = None
    parked: Parked | None = None
    weights: Weights | None = None
    doubts: list[str] = Field(default_factory=list)


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
    spares: list[SpareStatus] = Field(default_factory=list)
    cordoned: list[CordonStatus] = Field(default_factory=list)
    waiting_for: list[str]
    error: StatusError | None = None
    leftover: str = ""  # what of the gateway did not end
    closed: str = ""  # why it ends although nobody wished it down
    ends_at: float | None = None  # by limits.ttl
    controller: str = "running"
    updated_at: float
    unwell_since: float | None = None  # since when it does not serve as it should
    finished: bool = False

    @property
    def exit_code(self) -> int:
        """0 when the fleet fully does what was wished; else the exit code of its first error."""
        if self.error:
            return self.error.exit_code
        if self.desired == "down":
            return 0
        return 0 if self.phase == "serving" else 1


def bare_status(
    *,
    fleet: str,
    run: int,
    desired: Literal["up", "down"],
    spec: FleetSpec | None,
    api_key_file: str,
    now: float,
    waiting_for: tuple[str, ...] = (),
    error: FleetError | None = None,
) -> Status:
    """Of a run without a controller that could say more: not yet, or (error) never."""
    ended: Literal["failed", "stopped"] = "stopped" if desired == "down" else "failed"
    return Status(
        fleet=fleet,
        run=run,
        desired=desired,
        phase=ended if error else "stopping" if desired == "down" else "starting",
        endpoint=None,
        api_key_file=api_key_file,
        model=spec.model if spec else "",
        backend=spec.backend.kind if spec else "",
        replicas=[],
        waiting_for=list(waiting_for),
        error=StatusError(
            code=error.code,
            message=error.message,
            where=error.where,
            hint=error.hint,
            exit_code=error.exit_code,
        )
        if error
        else None,
        updated_at=now,
        finished=error is not None,
    )


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
    ttl_s: int | None = None,
) -> Status:
    replicas = [_replica(replica, record, snapshot) for replica in record.replicas.values()]
    failures = [r.failure for r in record.replicas.values() if r.failure]
    first = min(failures, key=lambda failure: failure.at, default=None)
    phases = [replica.phase for replica in replicas]
    error = None
    if first is not None:
        error = StatusError(
            code=first.code,
            message=first.message,
            where=first.where,
            hint=first.hint,
            exit_code=first.exit_code,
        )
    elif snapshot.desired == "up":
        error = _present_trouble(record, phases)
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
        spares=_spares(record, snapshot),
        cordoned=[
            CordonStatus(node=held.node, kind=held.kind, reason=held.reason, at=held.at)
            for held in snapshot.ledger.cordons.values()
            if held.node in known
        ],
        waiting_for=waits,
        error=error,
        leftover=leftover,
        closed=record.closed,
        ends_at=record.started_at + ttl_s if ttl_s else None,
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
    if "failed" in phases:
        return "failed"
    return "degraded" if endpoint else "starting"


def _present_trouble(record: RunRecord, phases: list[str]) -> StatusError | None:
    """Why a replica that served does not serve now, although it will again."""
    for replica, phase in zip(record.replicas.values(), phases, strict=True):
        last = replica.incidents[-1] if replica.incidents else None
        if phase != "serving" and last is not None and last.code != "asked":
            return StatusError(
                code=last.code,
                message=last.message,
                where=f"node {last.node}" if last.node else replica.name,
                hint=f"{replica.name} is brought up again; see what it waits for.",
            )
    return None


def _replica(replica: ReplicaRecord, record: RunRecord, snapshot: Snapshot) -> ReplicaStatus:
    phase = replica_phase(replica, snapshot)
    nodes = [
        _node(replica, rank, seat.node, snapshot.agent(seat))
        for rank, seat in enumerate(replica.seats)
    ]
    began = replica.requested_at
    marks = {
        "allocated": replica.running_at,
        "preflight": replica.ranked_at,
        "first_token": replica.serving_at,
    }
    since = {
        "serving": replica.serving_at,
        "joining": replica.ranked_at,
        "failed": replica.failure.at if replica.failure else None,
        "draining": replica.stopping_at,
    }.get(phase, replica.requested_at)
    names = list(dict.fromkeys(seat.allocation for seat in replica.seats)) or [
        held.name for held in record.allocations.values() if held.owner == replica.name
    ]
    views = [snapshot.allocations.get(name, NOTHING) for name in names]
    ends = [view.ends_at for view in views if view.ends_at]
    starts = [view.expected_start for view in views if view.expected_start]
    leftovers = [text for name, text in record.leftovers.items() if name in names]
    return ReplicaStatus(
        name=replica.name,
        generation=replica.generation,
        phase=phase,
        endpoint=endpoint_of(replica, snapshot) if phase == "serving" else None,
        nodes=nodes,
        allocation=", ".join(view.identity for view in views if view.identity),
        allocation_ends_at=min(ends, default=None),
        expected_start=max(starts, default=None),
        since=since,
        timings_s={
            name: round(at - began, 2) for name, at in marks.items() if at is not None and began
        },
        phases=phases_of(replica, record, snapshot),
        failure=replica.failure,
        leftover="; ".join(leftovers),
        restarts_asked=replica.restarts_asked,
        story=list(replica.story),
    )


def _spares(record: RunRecord, snapshot: Snapshot) -> list[SpareStatus]:
    """Every agent that sits nowhere, and what was asked for as a spare and is not there yet."""
    sitting = {seat for one in record.replicas.values() if not one.over for seat in one.seats}
    found = []
    for held in record.allocations.values():
        if held.released or held.ending_at is not None:
            continue
        for node in held.nodes if held.running_at else ():
            seat = Seat(node=node, allocation=held.name)
            if seat not in sitting:
                found.append(_spare(held, seat, snapshot))
        if held.running_at is None and held.owner not in record.replicas:
            found.append(SpareStatus(name=held.owner, node=None, phase="pending"))
    return found


def _spare(held: AllocationRecord, seat: Seat, snapshot: Snapshot) -> SpareStatus:
    agent = snapshot.agent(seat)
    report = agent.report
    view = snapshot.allocations.get(held.name, NOTHING)
    latest = (report.health or report.facts) if report else None
    return SpareStatus(
        name=held.owner,
        node=seat.node,
        phase=node_phase(agent),
        allocation=view.identity,
        allocation_ends_at=view.ends_at,
        since=report.since if report else held.running_at,
        parked=report.parked if report else None,
        weights=report.weights if report else None,
        doubts=doubts(latest) if latest else [],
    )


def _node(record: ReplicaRecord, rank: int, node: str, view: NodeView) -> NodeStatus:
    failure = record.failure
    accused = bool(failure and failure.code == "node_lost" and failure.where == f"node {node}")
    if accused and failure and (view.report is None or is_lost(view) or record.over):
        return NodeStatus(node=node, rank=rank, phase="lost", lost_since=failure.at)
    if view.report is None:
        return NodeStatus(node=node, rank=rank, phase="starting", waiting_for="its agent")
    report = view.report
    return NodeStatus(
        node=node,
        rank=rank,
        phase=node_phase(view),
        since=report.since,
        waiting_for=report.member.waiting_for if report.member else "",
        parked=report.parked,
        weights=report.weights,
        started=report.member.started if report.member else "",
        ray_workers=report.member.ray_workers if report.member else "",
        doubts=doubts(latest) if (latest := report.health or report.facts) else [],
    )
