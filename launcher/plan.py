"""The planner: from record and snapshot to the next steps, and what they wait for. Pure.

It is level-triggered: called each round with what is, it returns what is missing. Steps are so
exact that the executor has no choices. The plan of a fleet that is as it should be is empty.
"""

from health.report import NodeFacts
from launcher import addresses, ports, rehearsal, render
from launcher.documents import Assignment, Checks, Member, Peer, Report
from launcher.fitness import judge_set
from launcher.record import Failure, ReplicaRecord, RunRecord
from launcher.snapshot import ReplicaView, Snapshot
from launcher.spec import is_folder
from launcher.steps import (
    Allocate,
    Assign,
    Context,
    Down,
    Fail,
    Note,
    Plan,
    Release,
    Step,
)
from launcher.swap import plan_rehearsed, plan_swap
from launcher.verdicts import first_failure, is_lost, replica_phase

# A node that does not confirm its end is fenced by its peers' leases within 15 s; what it runs
# after that nobody can say, so the allocation is given back and the doubt is reported.
STOP_CONFIRM_S = 20.0
ATTRIBUTION_S = 6.0
LEADER_FIRST_S = 10.0
FOLLOWER_GRACE_S = 1
GATEWAY_TELLS_S = 3.0
FALLBACK_SERVES = "`launcher down` and `up`: no replica is left, the fallback serves"


def make_plan(context: Context, record: RunRecord, snapshot: Snapshot) -> Plan:
    """All steps that can be taken now, over all replicas."""
    steps: list[Step] = []
    waiting: list[str] = []
    for replica in record.replicas.values():
        view = snapshot.replicas[replica.name]
        new_steps, why = _plan_replica(context, record, replica, view, snapshot)
        steps += new_steps
        waiting += [f"{replica.name}: {reason}" for reason in why]
    finished = all(
        replica.released or (replica.intent == "none" and snapshot.desired == "down")
        for replica in record.replicas.values()
    )
    if finished and snapshot.desired == "up" and context.spec.gateway.fallback:
        return Plan(tuple(steps), (FALLBACK_SERVES,), finished=False)
    return Plan(tuple(steps), tuple(waiting), finished and not steps)


def new_record(context: Context, run: int, before: RunRecord | None, now: float) -> RunRecord:
    """The record with which a run begins.

    Allocations and generations are counted over the fleet's life, so that no name is used twice;
    the port block is kept, so that the endpoint stays where it was.
    """
    replicas = {}
    for number in range(1, context.spec.replicas + 1):
        name = f"r{number}"
        old = before.replicas.get(name) if before else None
        preferred = ports.preferred_slot(context.user_id, context.spec.name, name)
        replicas[name] = ReplicaRecord(
            name=name,
            slot=old.slot if old else preferred,
            allocation=old.allocation if old else 0,
            generation=old.generation if old else 0,
        )
    return RunRecord(run=run, started_at=now, replicas=replicas)


_Result = tuple[list[Step], list[str]]


def _plan_replica(
    context: Context, run: RunRecord, replica: ReplicaRecord, view: ReplicaView, snapshot: Snapshot
) -> _Result:
    if replica.released:
        return [], []
    if replica.intent == "down" or snapshot.desired == "down":
        return _plan_end(context, replica, view, snapshot)
    if replica.intent == "swap":
        steps, _ = _plan_down(replica, view, snapshot.now, 0)
        return steps, ["another node"]
    if replica.intent == "none":
        nodes = _choose_nodes(context, run, replica, snapshot)
        exclude = () if nodes else tuple(sorted(snapshot.ledger.cordons.keys() & context.known))
        return [Allocate(replica.name, replica.allocation + 1, nodes, exclude)], ["nodes"]
    if failure := first_failure(replica, view, snapshot.now):
        return [Fail(replica.name, failure)], []
    allocation = view.allocation
    if allocation.state == "unknown":
        return [], [f"the backend to answer ({allocation.reason})"]
    if allocation.state == "gone":
        return [Fail(replica.name, _allocation_gone(allocation.reason, snapshot.now))], []
    if allocation.state in ("none", "pending"):
        return _plan_pending(context, replica, view, snapshot.now)
    if replica.running_at is None:
        # The leader is the first in the order that the backend gives; it stays so.
        changes = {"running_at": snapshot.now, "nodes": allocation.nodes}
        return [Note(replica.name, changes)], ["agents"]
    if replica.ranked_at is None:
        return _plan_preflight(context, run, replica, view, snapshot)
    return _plan_watch(context, run, replica, view, snapshot)


def _plan_end(
    context: Context, replica: ReplicaRecord, view: ReplicaView, snapshot: Snapshot
) -> _Result:
    if replica.intent == "none":
        return [], []
    if replica.intent != "down":
        return [Down(replica.name)], []
    if under_way := _under_way(context, replica, snapshot):
        return [], [under_way]
    return _plan_down(replica, view, snapshot.now, context.spec.limits.drain)


def _choose_nodes(
    context: Context, run: RunRecord, replica: ReplicaRecord, snapshot: Snapshot
) -> tuple[str, ...]:
    """The first nodes of the pool that no replica of this fleet uses and that nobody has
    cordoned; none where Slurm chooses."""
    if not context.pool:
        return ()
    taken = {node for other in run.replicas.values() if not other.released for node in other.nodes}
    before = (
        [name for name in run.replicas if run.replicas[name].intent == "none"].index(replica.name)
        if replica.intent == "none"
        else 0
    )
    taken |= snapshot.ledger.cordons.keys()
    free = [node for node in context.pool if node not in taken]
    start = before * context.spec.nodes
    return tuple(free[start : start + context.spec.nodes])


def _plan_pending(
    context: Context, replica: ReplicaRecord, view: ReplicaView, now: float
) -> _Result:
    waited = now - (replica.requested_at or now)
    limit = context.spec.limits.queue
    reason = view.allocation.reason or "the allocation"
    if waited > limit:
        failure = Failure(
            code="deadline",
            exit_code=4,
            message=f"no nodes within {limit} s; waited for {reason}",
            where=view.allocation.identity or replica.name,
            hint="Raise limits.queue, or ask for fewer nodes.",
            at=now,
        )
        return [Fail(replica.name, failure)], []
    return [], [reason]


def _plan_preflight(
    context: Context,
    run: RunRecord,
    replica: ReplicaRecord,
    view: ReplicaView,
    snapshot: Snapshot,
) -> _Result:
    """Agents up → each told its peers and checks → facts good → ranks."""
    now = snapshot.now
    reports = _reports(replica, view)
    missing = [node for node in replica.nodes if node not in reports]
    if missing:
        limit = context.spec.limits.agents
        if now - (replica.running_at or now) > limit:
            problems = "; ".join(
                f"{node}: {view.nodes[node].problem}"
                for node in missing
                if node in view.nodes and view.nodes[node].problem
            )
            failure = Failure(
                code="deadline",
                exit_code=4,
                message=f"no agent reported from {', '.join(missing)} within {limit} s"
                + (f" ({problems})" if problems else ""),
                where=replica.name,
                hint="See agent.log in the run folder; is launcher installed on the nodes?",
                at=now,
            )
            return [Fail(replica.name, failure)], []
        return [], [f"the agent on {', '.join(missing)}"]
    unasked = [node for node in replica.nodes if not replica.revision_of(node)]
    if unasked:
        return _checks(context, replica, reports), ["preflight"]
    if steps := _again_elsewhere(context, replica, reports):
        return steps, ["another port block"]
    waiting = [
        node
        for node in replica.nodes
        if reports[node].facts is None or reports[node].checks_for != replica.revision_of(node)
    ]
    if waiting:
        return [], [f"preflight on {', '.join(waiting)}"]
    if unfit := judge_set(_facts(replica, reports), replica.running_at or now, now):
        return plan_swap(context, run, replica, unfit, reports, snapshot)
    chosen = addresses.choose(
        context.spec.interface,
        {node: reports[node].addresses for node in replica.nodes},
        {node: reports[node].reach for node in replica.nodes},
        {node: view.nodes[node].answers_at for node in replica.nodes},
    )
    if isinstance(chosen, addresses.NoPath):
        asked_at = replica.running_at or now
        if chosen.is_final or now - asked_at > context.spec.limits.agents:
            failure = Failure(
                code="preflight",
                exit_code=3,
                message=chosen.message,
                where=replica.name,
                hint="Write `interface:` with the name of the network between the nodes.",
                at=now,
            )
            return [Fail(replica.name, failure)], []
        return [], ["the nodes to hear each other over the network"]
    rehearses = rehearsal.wanted(context, replica, reports, snapshot)
    steps = _rank(context, replica, reports, chosen, rehearses=rehearses)
    changes = {
        "ranked_at": now,
        "generation": replica.generation + 1,
        "rehearses": rehearses,
    }
    return [*steps, Note(replica.name, changes)], ["the engine"]


def _plan_watch(
    context: Context, run: RunRecord, replica: ReplicaRecord, view: ReplicaView, snapshot: Snapshot
) -> _Result:
    if replica.rehearses and (found := plan_rehearsed(context, run, replica, view, snapshot)):
        return found
    now = snapshot.now
    if replica_phase(replica, view) == "serving":
        return ([] if replica.serving_at else [Note(replica.name, {"serving_at": now})]), []
    leader = view.nodes[replica.nodes[0]].report
    waited_for = leader.member.waiting_for if leader and leader.member else ""
    limit = context.spec.limits.start + 30  # the leader's own deadline comes first
    if now - (replica.ranked_at or now) > limit and replica.serving_at is None:
        failure = Failure(
            code="deadline",
            exit_code=4,
            message=f"not serving within {limit} s; waited for {waited_for or 'the engine'}",
            where=replica.name,
            hint="Raise limits.start; `launcher logs` shows how far it came.",
            at=now,
        )
        return [Fail(replica.name, failure)], []
    return [], [waited_for or "the engine"]


def _plan_down(replica: ReplicaRecord, view: ReplicaView, now: float, drain_s: int) -> _Result:
    """Every agent told to stop; the allocation given back when all have, or cannot be asked."""
    waited = now - (replica.stopping_at or now)
    patience_s = STOP_CONFIRM_S + (0 if replica.failure else drain_s)
    unordered = [
        node
        for node in replica.nodes
        if replica.allocation
        and waited < patience_s  # a node that cannot be told is fenced by its lease meanwhile
        and not _ordered_to_stop(replica, node)
        and node in view.nodes
        and not is_lost(view.nodes[node])
    ]
    in_order = replica.failure is None and replica.intent == "down"
    if in_order and waited < drain_s + LEADER_FIRST_S:
        # The leader's API server ends its requests and its engine while the others still answer.
        leader = replica.nodes[0] if replica.nodes else ""
        report = view.nodes[leader].report if leader in view.nodes else None
        if leader in unordered:
            unordered = [leader]
        elif unordered and report is not None and report.phase != "stopped":
            return [], [f"{leader} to stop first"]
    if unordered:
        orders = [
            Assign(replica.name, node, _stopped(replica, node, drain_s)) for node in unordered
        ]
        return list(orders), ["agents to stop"]
    running = [
        node
        for node in replica.nodes
        if node in view.nodes
        and (report := view.nodes[node].report) is not None
        and report.phase != "stopped"
        and not is_lost(view.nodes[node])
    ]
    if running and waited < patience_s and view.allocation.state != "gone":
        failure = first_failure(replica, view, now)
        if replica.failure and failure and failure.message != replica.failure.message:
            if waited < ATTRIBUTION_S:  # the story may become clearer while reports come in
                return [Fail(replica.name, failure)], []
        return [], [f"{', '.join(running)} to stop"]
    return [Release(replica.name, replica.allocation)], []


def _under_way(context: Context, replica: ReplicaRecord, snapshot: Snapshot) -> str:
    """What an orderly end still waits for at the gateway, which sends no new requests here."""
    told_to_stop = any(_ordered_to_stop(replica, node) for node in replica.nodes)
    if replica.failure or told_to_stop or not snapshot.gateway.is_up or not replica.serving_at:
        return ""
    waited = snapshot.now - (replica.stopping_at or snapshot.now)
    requests = snapshot.gateway.requests.get(replica.name)
    if requests is None:
        return "the gateway to take no more requests" if waited < GATEWAY_TELLS_S else ""
    if requests and waited < context.spec.limits.drain:
        return f"{requests} request{'s' if requests > 1 else ''} to end"
    return ""


def _reports(replica: ReplicaRecord, view: ReplicaView) -> dict[str, Report]:
    return {
        node: seen.report
        for node in replica.nodes
        if (seen := view.nodes.get(node)) is not None and seen.report is not None
    }


def _checks(context: Context, replica: ReplicaRecord, reports: dict[str, Report]) -> list[Step]:
    """The first assignment of each node: look at yourself, and at who hears you."""
    steps: list[Step] = []
    for rank, node in enumerate(replica.nodes):
        block = ports.block(replica.slot + _offset(context, rank))
        checks = Checks(
            probe_script=context.scripts["engine-probe.sh"],
            executor=context.layout.executor,
            model_folder=context.spec.model if is_folder(context.spec.model) else None,
            image=context.spec.runtime.image_file,
            ports=ports.to_check(block, leader=rank == 0),
            gpus=context.layout.ranks_per_node,
            shares_machine=context.shares_machine,
            weights_folders=context.weights_folders.get(node, ()),
            weights_bytes=context.weights_bytes,
        )
        peers = tuple(
            Peer(
                node=other,
                port=reports[other].heartbeat_port,
                addresses=tuple(address.ip for address in reports[other].addresses),
            )
            for other in replica.nodes
            if other != node
        )
        assignment = Assignment(
            revision=replica.revision_of(node) + 1, goal="idle", checks=checks, peers=peers
        )
        steps.append(Assign(replica.name, node, assignment))
    return steps


def _again_elsewhere(
    context: Context, replica: ReplicaRecord, reports: dict[str, Report]
) -> list[Step]:
    """A busy port is no fault of the node: try the next block, some times."""
    if replica.slots_tried >= ports.SLOTS // 4:
        return []
    for node, report in reports.items():
        current = report.checks_for == replica.revision_of(node)
        if current and report.facts and any(f.check == "host.ports" for f in report.facts.unfit):
            step = context.spec.nodes if context.shares_machine else 1
            moved = replica.model_copy(update={"slot": (replica.slot + step) % ports.SLOTS})
            changes = {"slot": moved.slot, "slots_tried": replica.slots_tried + 1}
            return [Note(replica.name, changes), *_checks(context, moved, reports)]
    return []


def _facts(replica: ReplicaRecord, reports: dict[str, Report]) -> dict[str, NodeFacts]:
    return {node: facts for node in replica.nodes if (facts := reports[node].facts)}


def _rank(
    context: Context,
    replica: ReplicaRecord,
    reports: dict[str, Report],
    chosen: dict[str, addresses.Choice],
    *,
    rehearses: bool,
) -> list[Step]:
    steps: list[Step] = []
    leader = replica.nodes[0]
    leader_ports = ports.block(replica.slot)
    shown = {}
    if rehearses:
        shown = rehearsal.rehearsals(context, replica, chosen, leader_ports["collective"])
    for rank, node in enumerate(replica.nodes):
        guard = ports.block(replica.slot + _offset(context, rank))["guard"]
        others = [leader, *replica.nodes] if rank else list(replica.nodes)
        peers = tuple(
            Peer(
                node=other,
                port=reports[other].heartbeat_port,
                addresses=(chosen[other].ip,),
            )
            for other in dict.fromkeys(others)
            if other != node
        )
        member = Member(
            replica=replica.name,
            generation=replica.generation + 1,
            rank=rank,
            size=len(replica.nodes),
            address=chosen[node].ip,
            interface=chosen[node].interface,
            leader_address=chosen[leader].ip,
            ports=leader_ports,
            commands=render.commands_of(rank, context.layout, leader_ports, context.scripts),
            ranks_per_node=context.layout.ranks_per_node,
            secret_environment=context.secret_names,
            served_model=context.spec.name,
            start_timeout_s=context.spec.limits.start,
            peers=peers,
            guard_port=guard,
            rehearsal=shown.get(node),
        )
        assignment = Assignment(revision=replica.revision_of(node) + 1, goal="rank", member=member)
        steps.append(Assign(replica.name, node, assignment))
    return steps


def _stopped(replica: ReplicaRecord, node: str, drain_s: int) -> Assignment:
    # Requests end on the leader. When it is gone a follower has nothing to end in order, and Ray's
    # worker would wait half a minute for the head that is no more.
    at_once = replica.failure is not None or replica.intent == "swap"
    grace_s = 5 if at_once else drain_s if node == replica.nodes[0] else FOLLOWER_GRACE_S
    return Assignment(
        revision=replica.revision_of(node) + 1,
        goal="stopped",
        reason=replica.failure.message if replica.failure else "down",
        stop_grace_s=grace_s,
        after_failure=replica.failure is not None,
    )


def _ordered_to_stop(replica: ReplicaRecord, node: str) -> bool:
    assignment = replica.assignments.get(node)
    return assignment is not None and assignment.goal == "stopped"


def _offset(context: Context, rank: int) -> int:
    return rank if context.shares_machine else 0


def _allocation_gone(reason: str, now: float) -> Failure:
    return Failure(
        code="allocation",
        exit_code=1,
        message=f"the allocation ended: {reason or 'reason unknown'}",
        hint="`launcher up` asks for a new one.",
        at=now,
    )
