"""The collective check of `up`: what each node shall run, and what their answers mean. Pure.

It runs beside the engine's start, over the addresses and in the environment that the engine will
use, with the patterns of its layout. A set that passed within the hour is not asked again.
"""

from collections.abc import Mapping

from health.collective import rounds
from health.collective.rounds import CollectiveVerdict, Order, Round, Told
from health.thresholds import Thresholds
from launcher.addresses import Choice
from launcher.documents import Rehearsal, Report
from launcher.record import ReplicaRecord
from launcher.snapshot import NodeView, Snapshot
from launcher.steps import Context

ASSEMBLE_S, ROUND_S = 30.0, 5.0


def wanted(
    context: Context, replica: ReplicaRecord, reports: dict[str, Report], snapshot: Snapshot
) -> bool:
    """Whether these nodes must show that they can talk before they are trusted."""
    if context.spec.preflight != "quick" or context.shares_machine or len(replica.nodes) < 2:
        return False
    boots = {node: reports[node].boot_id for node in replica.nodes}
    return not snapshot.ledger.has_passed(boots, snapshot.now)


def rehearsals(
    context: Context, replica: ReplicaRecord, chosen: dict[str, Choice], store_port: int
) -> dict[str, Rehearsal]:
    """What each node shall run."""
    per_node = context.layout.ranks_per_node
    made = _rounds(context)
    orders = {}
    for index, node in enumerate(replica.nodes):
        order = Order(
            node=node,
            ranks=tuple(range(index * per_node, (index + 1) * per_node)),
            hosts_store=index == 0,
            store_address=chosen[replica.nodes[0]].ip,
            store_port=store_port,
            waits_s=rounds.waits_s(len(made), ASSEMBLE_S, ROUND_S),
            round_s=ROUND_S,
            rounds=made,
        )
        orders[node] = Rehearsal(
            script=context.scripts["collective.sh"],
            order=order.model_dump_json(),
            timeout_s=_longest_s(made),
        )
    return orders


def verdict(
    context: Context, replica: ReplicaRecord, views: Mapping[str, NodeView], now: float
) -> CollectiveVerdict | str | None:
    """What the answers mean; None while some are awaited, words where the check itself failed."""
    told: dict[str, Told] = {}
    for node in replica.nodes:
        report = views[node].report if node in views else None
        member = report.member if report else None
        if member and member.generation == replica.generation and member.rehearsed is not None:
            told[node] = rounds.parse(member.rehearsed)
    made = _rounds(context)
    late = now - (replica.ranked_at or now) > _longest_s(made) + ROUND_S
    if len(told) < len(replica.nodes) and not late:
        return None
    problems = [one.problem for one in told.values() if one.problem]
    if problems and len(problems) == len(told):
        return problems[0]
    per_node = context.layout.ranks_per_node
    return rounds.conclude(replica.nodes, per_node, made, told, Thresholds())


def _rounds(context: Context) -> tuple[Round, ...]:
    layout = context.layout
    return rounds.pattern_rounds(
        context.spec.nodes,
        layout.ranks_per_node,
        layout.tensor,
        layout.pipeline,
        expert=context.spec.engine.is_expert_parallel,
    )


def _longest_s(made: tuple[Round, ...]) -> float:
    return rounds.longest_s(rounds.waits_s(len(made), ASSEMBLE_S, ROUND_S), ROUND_S)
