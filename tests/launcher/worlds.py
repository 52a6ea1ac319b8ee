"""Small worlds for the planner's tests: reports, views and records with sensible values."""

from health.report import Finding, NodeFacts
from launcher import render
from launcher.documents import Assignment, Evidence, MemberReport, NetAddress, Report
from launcher.layout import ModelFacts, choose_layout
from launcher.plan import new_record
from launcher.record import ReplicaRecord, RunRecord
from launcher.snapshot import AllocationView, NodeView, ReplicaView, Snapshot
from launcher.spec import FleetSpec
from launcher.steps import Context

NOW = 1_000_000.0
VERSIONS = {"vllm": "0.32.0", "ray": "2.60.0", "torch": "2.13.0", "python": "3.11.7"}


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
    )


def begun(context: Context, **changes) -> RunRecord:
    """A run whose first replica has asked for h1 and h2."""
    record = new_record(context, 1, None, NOW)
    replica = record.replicas["r1"].model_copy(
        update={
            "intent": "up",
            "allocation": 1,
            "nodes": ("h1", "h2"),
            "requested_at": NOW,
            "running_at": NOW,
            **changes,
        }
    )
    return record.model_copy(update={"replicas": {**record.replicas, "r1": replica}})


def address(node: str) -> NetAddress:
    return NetAddress(interface="eth0", ip=f"10.0.0.{node[1:]}", prefix=24)


def report(node: str, phase="idle", **changes) -> Report:
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


def snapshot(*views: NodeView, allocation: AllocationView | None = None, now=NOW, desired="up"):
    running = AllocationView("running", nodes=("h1", "h2"))
    return Snapshot(
        now=now,
        desired=desired,
        replicas={"r1": ReplicaView(allocation or running, {one.node: one for one in views})},
    )


def checked(context: Context) -> RunRecord:
    """Both nodes have been told to look at themselves (revision 1)."""
    asked = {node: Assignment(revision=1, goal="idle") for node in ("h1", "h2")}
    return begun(context, assignments=asked)


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
