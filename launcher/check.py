"""The plan linter: what no plan may do, checked before it is applied. Pure.

The planner should never produce these; if it does, nothing of that plan is done and the journal
says why. Each rule is one generator of sentences.
"""

from collections.abc import Iterator

from inventory.ledger import Ledger
from launcher.record import RunRecord, Seat
from launcher.snapshot import Snapshot
from launcher.steps import Allocate, Assign, Context, Plan, Sit


def lint(context: Context, record: RunRecord, plan: Plan, snapshot: Snapshot) -> list[str]:
    """Every rule that this plan breaks, in words; empty for a sound plan."""
    return [
        *_one_holder_per_node(record, plan),
        *_one_replica_per_seat(record, plan),
        *_allocations_are_whole(context, plan),
        *_no_cordoned_node(record, plan, snapshot.ledger),
        *_revisions_grow(record, plan),
        *_given_up_is_not_ranked(record, plan),
        *_the_last_generation_has_ended(record, plan, snapshot),
        *_ports_are_disjoint(plan),
        *_a_drill_changes_nothing_else(record, plan),
    ]


def _one_holder_per_node(record: RunRecord, plan: Plan) -> Iterator[str]:
    """A node that we choose is asked for once; what was there before is swept first."""
    holder = {
        node: held.name
        for held in record.allocations.values()
        if not held.released
        for node in held.nodes
    }
    for step in plan.steps:
        if not isinstance(step, Allocate):
            continue
        for node in step.nodes:
            other = holder.setdefault(node, step.allocation)
            if other != step.allocation:
                yield f"{node} would be held by {step.allocation} and {other}"


def _one_replica_per_seat(record: RunRecord, plan: Plan) -> Iterator[str]:
    seats = {replica.name: set(replica.seats) for replica in record.replicas.values()}
    for step in plan.steps:
        if isinstance(step, Sit):
            seats[step.about] = set(step.seats)
    owner: dict[Seat, str] = {}
    for replica in record.replicas.values():
        for seat in () if replica.over else seats[replica.name]:
            other = owner.setdefault(seat, replica.name)
            if other != replica.name:
                yield f"{seat.node} ({seat.allocation}) would serve {other} and {replica.name}"
    for step in plan.steps:
        if isinstance(step, Assign) and step.assignment.goal == "rank":
            if owner.get(step.seat) != step.about:
                yield f"{step.seat.node} would get a rank of {step.about} without a seat there"


def _allocations_are_whole(context: Context, plan: Plan) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, Allocate) and context.pool and len(set(step.nodes)) != step.size:
            yield f"{step.about} would get {len(step.nodes)} of {step.size} nodes"


def _no_cordoned_node(record: RunRecord, plan: Plan, ledger: Ledger) -> Iterator[str]:
    for step in plan.steps:
        nodes: set[str] = set()
        if isinstance(step, Allocate):
            nodes = set(step.nodes)
        elif isinstance(step, Sit):
            nodes = {seat.node for seat in {*step.seats} - {*record.replicas[step.about].seats}}
        for node in ledger.cordons.keys() & nodes:
            yield f"{step.about} would get {node}, which is cordoned"


def _revisions_grow(record: RunRecord, plan: Plan) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, Assign) and step.assignment.revision <= record.revision(step.seat):
            yield f"assignment of {step.seat.node} would go back to {step.assignment.revision}"


def _given_up_is_not_ranked(record: RunRecord, plan: Plan) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, Assign) and step.assignment.goal == "rank":
            replica = record.replicas[step.about]
            if replica.failure or replica.intent != "up" or replica.is_restarting:
                yield f"{step.about} is being taken down and would get a rank on {step.seat.node}"


def _the_last_generation_has_ended(
    record: RunRecord, plan: Plan, snapshot: Snapshot
) -> Iterator[str]:
    """No rank for an agent whose engine may still run: two would share its GPUs."""
    for step in plan.steps:
        if not (isinstance(step, Assign) and step.assignment.goal == "rank") or step.drill:
            continue
        report = snapshot.agent(step.seat).report
        order = record.order(step.seat)
        again = order is not None and order.goal == "rank"
        if again or report is None or report.phase not in ("idle", "warm"):
            yield f"{step.seat.node} would get a rank before it is known to be idle"


def _a_drill_changes_nothing_else(record: RunRecord, plan: Plan) -> Iterator[str]:
    """It repeats an order that counts: the engine goes on as what it is, but for the fault."""
    for step in plan.steps:
        if isinstance(step, Assign) and step.drill:
            order = record.order(step.seat)
            same = {"revision": step.assignment.revision, "drill": step.assignment.drill}
            if order is None or order.model_copy(update=same) != step.assignment:
                yield f"the drill {step.drill} would change what {step.seat.node} is"


def _ports_are_disjoint(plan: Plan) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    for step in plan.steps:
        if isinstance(step, Assign) and step.assignment.member:
            key = (step.assignment.member.address, step.assignment.member.guard_port)
            other = taken.setdefault(key, step.seat.node)
            if other != step.seat.node:
                yield f"{step.seat.node} and {other} would share the port block of {key[1]}"
