"""Small worlds for the planner's tests: orders, reports, views and records, sensibly filled."""

from dataclasses import replace

from health.report import Finding, NodeFacts
from launcher import render
from launcher.documents import (
    Assignment,
    Evidence,
    Member,
    MemberReport,
    NetAddress,
    Park,
    Peer,
    Report,
)
from launcher.layout import ModelFacts, choose_layout
from launcher.planning import new_record
from launcher.record import AllocationRecord, ReplicaRecord, RunRecord, Seat
from launcher.snapshot import AllocationView, NodeView, Snapshot
from launcher.spec import FleetSpec
from launcher.status import ReplicaStatus, Status
from launcher.steps import Context

NOW = 1_000_000.0
VERSIONS = {"vllm": "0.32.0", "ray": "2.60.0", "torch": "2.13.0", "python": "3.11.7"}


def make_status(*replicas: ReplicaStatus, **more) -> Status:
    """What the screens draw: a fleet that serves, unless told otherwise."""
    told = {"phase": "serving", "waiting_for": [], "updated_at": 0.0, **more}
    return Status(
        fleet="chat",
        run=1,
        desired="up",
        endpoint=None,
        api_key_file="",
        model="m",
        backend="local",
        replicas=list(replicas),
        **told,
    )


def make_context(pool=("h1", "h2", "h3"), **spec) -> Context:
    fleet = FleetSpec.model_validate(
        {
            "name": "chat",
            "model": "org/model",
            "nodes": 2,
            "gpus_per_node": 1,
            "parallelism": {"pipeline": 2},
            **spec,
        }
    )
    layout = choose_layout(fleet, 1, ModelFacts())
    return Context(
        spec=fleet,
        layout=layout,
        scripts=render.engine_scripts(fleet, layout),
        user_id=1000,
        pool=tuple(pool),
        secret_names={"VLLM_API_KEY": "api_key"},
        park=Park(script="park"),
    )


def seats(*nodes: str, allocation="r1.a1") -> tuple[Seat, ...]:
    return tuple(Seat(node=node, allocation=allocation) for node in nodes)


def held(name="r1.a1", nodes=("h1", "h2"), **changes) -> AllocationRecord:
    owner, _, number = name.partition(".a")
    values = {
        "name": name,
        "owner": owner,
        "number": int(number),
        "size": len(nodes) or 2,
        "nodes": nodes,
        "requested_at": NOW,
        "asked": True,
        "running_at": NOW,
        **changes,
    }
    return AllocationRecord(**values)


def begun(context: Context, *more: AllocationRecord, assignments=None, **changes) -> RunRecord:
    """A run whose first replica sits on h1 and h2."""
    record = new_record(context, 1, None, NOW)
    times = dict.fromkeys(("requested_at", "running_at", "agents_at"), NOW)
    values = {"seats": seats("h1", "h2"), **times, **changes}
    replica = record.replicas["r1"].model_copy(update=values)
    allocations = [held(assignments=assignments or {}), *more]
    return record.model_copy(
        update={
            "replicas": {**record.replicas, "r1": replica},
            "allocations": {one.name: one for one in allocations},
            "counts": {one.owner: one.number for one in allocations},
        }
    )


def peer(node: str) -> Peer:
    return Peer(node=node, port=5000, addresses=(address(node).ip,))


def address(node: str) -> NetAddress:
    return NetAddress(interface="eth0", ip=f"10.0.0.{node[1:]}", prefix=24)


def report(node: str, phase="warm", **changes) -> Report:
    other = "h2" if node == "h1" else "h1"
    values = {
        "revision": 1,
        "beat": 1,
        "node": node,
        "host": node,
        "pid": 1,
        "package_version": "0",
        "boot_id": "b",
        "phase": phase,
        "since": NOW,
        "assignment_revision": 1,
        "addresses": (address(node),),
        "heartbeat_port": 5000,
        "facts": NodeFacts(
            findings=(Finding(check="disk", verdict="healthy", message=""),), traits=VERSIONS
        ),
        "checks_for": 1,
        "reach": {other: (address(other).ip,)},
        **changes,
    }
    return Report(**values)


def view(node: str, its_report: Report | None, **changes) -> NodeView:
    values = {"heartbeat_silent_s": 0.5, "beat_silent_s": 1.0, **changes}
    return NodeView(node=node, report=its_report, **values)


def snapshot(
    *views: NodeView,
    allocation: AllocationView | None = None,
    now=NOW,
    desired="up",
    more: dict[str, AllocationView] | None = None,
):
    """What is seen of r1.a1, and of other allocations in `more`."""
    mine = allocation or AllocationView("running", nodes=("h1", "h2"))
    mine = replace(mine, agents={one.node: one for one in views})
    return Snapshot(now=now, desired=desired, allocations={"r1.a1": mine, **(more or {})})


def running(*views: NodeView) -> AllocationView:
    nodes = tuple(one.node for one in views)
    return AllocationView("running", nodes=nodes, agents={one.node: one for one in views})


def checked(context: Context, **changes) -> RunRecord:
    """Both nodes have been told to look at themselves (revision 1)."""
    asked = {
        node: Assignment(revision=1, goal="idle", peers=(peer(other),))
        for node, other in (("h1", "h2"), ("h2", "h1"))
    }
    return begun(context, assignments=asked, **changes)


def ranked(context: Context, **changes) -> RunRecord:
    ordered = {node: Assignment(revision=2, goal="rank") for node in ("h1", "h2")}
    return begun(context, assignments=ordered, ranked_at=NOW, generation=1, **changes)


def member(rank: int, token: bool = False) -> MemberReport:
    return MemberReport(
        replica="r1",
        generation=1,
        rank=rank,
        endpoint="http://10.0.0.1:1/v1" if token else None,
        first_token_at=NOW if token else None,
    )


def lone_member() -> Member:
    """What an agent is told to be: a replica of one node, with nothing to start."""
    return Member(
        replica="r1",
        generation=1,
        rank=0,
        size=1,
        address="127.0.0.1",
        interface="lo",
        leader_address="127.0.0.1",
        ports={"api": 1, "guard": 2},
        commands=(),
        ranks_per_node=1,
        served_model="m",
        start_timeout_s=10,
        peers=(),
        guard_port=2,
    )


def died(
    node: str, process="serve", at=NOW, code=0, message="serve exited with code 0"
) -> Evidence:
    return Evidence(
        kind="exit", message=message, node=node, at=at, process=process, exit_code=code
    )


def accuses(node: str, peer: str, at=NOW) -> Evidence:
    return Evidence(
        kind="lost_peer", message=f"{peer} stopped answering", node=node, at=at, process=peer
    )


def replica(record: RunRecord) -> ReplicaRecord:
    return record.replicas["r1"]
