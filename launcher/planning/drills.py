"""A fault that a person wants to see survived: an order to the node's agent, once. Pure."""

from launcher.planning.draft import Draft
from launcher.record import ReplicaRecord
from launcher.steps import Assign


def carry_out(draft: Draft, replica: ReplicaRecord) -> None:
    """Repeat the order of each seat that is to be drilled, with the fault in it.

    A drill is meant for one generation: one that comes too late must not hit the next.
    """
    hit = set()
    for drill in draft.snapshot.drills:
        if drill.id in draft.record.drills:
            continue
        if (drill.replica, drill.generation) != (replica.name, replica.generation):
            continue
        seat = next((one for one in replica.seats if one.node == drill.node), None)
        order = draft.record.order(seat) if seat else None
        if seat is None or seat in hit or order is None or order.goal != "rank":
            continue
        hit.add(seat)
        again = order.model_copy(update={"revision": order.revision + 1, "drill": drill.kind})
        draft.do(Assign(replica.name, seat, again, drill=drill.id))
