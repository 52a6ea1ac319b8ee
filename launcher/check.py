"""The plan linter: what no plan may do, checked before it is applied. Pure.

The planner should never produce these; if it does, nothing of that plan is done and the journal
says why. Each rule is one generator of sentences.
"""

from collections.abc import Iterator

from inventory.ledger import Ledger
from launcher.record import RunRecord
from launcher.steps import Allocate, Assign, Context, Plan


def lint(context: Context, record: RunRecord, plan: Plan, ledger: Ledger) -> list[str]:
    """Every rule that this plan breaks, in words; empty for a sound plan."""
    return [
        *_one_replica_per_node(record, plan),
        *_allocations_are_whole(context, plan),
        *_no_cordoned_node(plan, ledger),
        *_revisions_grow(record, plan),
        *_given_up_is_not_ranked(record, plan),
        *_ports_are_disjoint(plan),
    ]


def _one_replica_per_node(record: RunRecord, plan: Plan) -> Iterator[str]:
    owner = {
        node: replica.name
        for replica in record.replicas.values()
        if not replica.released
        for node in replica.nodes
    }
    for step in plan.steps:
        nodes = step.nodes if isinstance(step, Allocate) else ()
        nodes = (step.node,) if isinstance(step, Assign) else nodes
        for node in nodes:
            other = owner.setdefault(node, step.replica if not isinstance(step, Assign) else "")
            if other and other != step.replica:
                yield f"{node} would serve {step.replica} and {other}"


def _allocations_are_whole(context: Context, plan: Plan) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, Allocate) and context.pool:
            if len(set(step.nodes)) != context.spec.nodes:
                yield f"{step.replica} would get {len(step.nodes)} of {context.spec.nodes} nodes"


def _no_cordoned_node(plan: Plan, ledger: Ledger) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, Allocate):
            for node in ledger.cordons.keys() & set(step.nodes):
                yield f"{step.replica} would get {node}, which is cordoned"


def _revisions_grow(record: RunRecord, plan: Plan) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, Assign):
            before = record.replicas[step.replica].revision_of(step.node)
            if step.assignment.revision <= before:
                yield f"assignment of {step.node} would go back to {step.assignment.revision}"


def _given_up_is_not_ranked(record: RunRecord, plan: Plan) -> Iterator[str]:
    for step in plan.steps:
        if isinstance(step, Assign) and step.assignment.goal == "rank":
            replica = record.replicas[step.replica]
            if replica.failure or replica.intent != "up":
                yield f"{step.replica} is being taken down and would get a rank on {step.node}"


def _ports_are_disjoint(plan: Plan) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    for step in plan.steps:
        if isinstance(step, Assign) and step.assignment.member:
            key = (step.assignment.member.address, step.assignment.member.guard_port)
            other = taken.setdefault(key, step.node)
            if other != step.node:
                yield f"{step.node} and {other} would share the port block of {key[1]}"
