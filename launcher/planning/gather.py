"""A replica's seats: who survived, then who stands by, then who must be asked for. Pure."""

from inventory import nodeset
from launcher.attribution import back_off_s
from launcher.planning.draft import Draft
from launcher.planning.holdings import QUEUE_PATIENCE_S, candidates
from launcher.record import AllocationRecord, Failure, ReplicaRecord, Seat
from launcher.steps import End, Fail, Sit
from launcher.verdicts import is_dead, is_quiet


def seat(draft: Draft, replica: ReplicaRecord) -> bool:
    """Fill the replica's seats as far as that can be done now; True when none is missing."""
    kept = tuple(one for one in replica.seats if draft.is_usable(one))
    given_away = {one for one in replica.seats if one in draft.taken}  # in this very round
    # An agent that never reported is given up by bring_up, which says so; not before.
    if not replica.served:
        kept = tuple(one for one in replica.seats if one in kept or not _is_lost(draft, one))
    if replica.served:
        kept = tuple(one for one in kept if not is_quiet(draft.snapshot.agent(one)))
    barred = draft.snapshot.ledger.cordons.keys()
    kept = tuple(one for one in kept if one.node not in barred and one not in given_away)
    size = draft.context.spec.nodes
    found = list(kept)
    spares = _own_seats(draft, replica)
    if _must_hurry(replica):
        warm = [one for one in candidates(draft) if one not in draft.taken]
        near = tuple(one.node for one in kept)
        warm.sort(
            key=lambda one: (not draft.lasts(one.allocation), draft.distance(one.node, near))
        )
        # Who is ready now comes before who is only expected.
        spares = [*warm, *(one for one in spares if one not in warm)]
        spares += _from_later_replicas(draft, replica) if len(found) + len(spares) < size else []
    nodes = {one.node for one in found}
    for one in spares:
        if len(found) < size and one.node not in nodes and one not in draft.taken:
            found.append(one)
            nodes.add(one.node)
            draft.taken.add(one)
    if tuple(found) != replica.seats:
        _give_up_seats(draft, replica, found)
        draft.do(Sit(replica.name, tuple(found), _story(replica, found)))
        if len(found) == size:
            draft.wait(replica.name, "agents")
    if len(found) < size:
        _ask_for(draft, replica, size - len(found), tuple(nodes))
        return False
    return tuple(found) == replica.seats


def _must_hurry(replica: ReplicaRecord) -> bool:
    """Whether it takes a spare: once it has lost what it had, not while it is first asked for."""
    begun_before = replica.incidents or replica.swaps or replica.restarts_asked
    return bool(replica.seats or replica.served or begun_before)


def _is_lost(draft: Draft, one: Seat) -> bool:
    held = draft.record.allocations.get(one.allocation)
    if held is None or held.released or held.ending_at is not None or one.node not in held.nodes:
        return True
    gone = draft.view(one.allocation).state == "gone"
    return gone or is_dead(draft.snapshot.agent(one))


def _own_seats(draft: Draft, replica: ReplicaRecord) -> list[Seat]:
    """Free places in what was asked for this replica, in the order that the backend gave."""
    sitting = draft.sitting
    return [
        place
        for held in draft.living_of.get(replica.name, [])
        if held.running_at is not None
        for node in held.nodes
        if (place := Seat(node=node, allocation=held.name)) not in sitting
        and draft.is_fresh(place)
        and node not in draft.snapshot.ledger.cordons
    ]


def _from_later_replicas(draft: Draft, replica: ReplicaRecord) -> list[Seat]:
    """Nodes that a later replica holds without being able to start: two halves serve nobody."""
    if draft.free_nodes(1) or (not draft.context.pool and not _waits_long(draft, replica)):
        return []
    names = list(draft.record.replicas)
    later = names[names.index(replica.name) + 1 :]
    return [
        one
        for name in reversed(later)
        if (other := draft.record.replicas[name]).ranked_at is None
        and not other.is_restarting
        and not other.over
        and len([s for s in other.seats if draft.is_usable(s)]) < draft.context.spec.nodes
        for one in other.seats
        if draft.is_fresh(one)
    ]


def _waits_long(draft: Draft, replica: ReplicaRecord) -> bool:
    return any(
        held.running_at is None and draft.now - held.requested_at > QUEUE_PATIENCE_S
        for held in draft.living_of.get(replica.name, [])
    )


def _give_up_seats(draft: Draft, replica: ReplicaRecord, found: list[Seat]) -> None:
    """Take the seats out of the replicas that held them so far."""
    for one, owner in draft.sitting.items():
        if one in found and owner.name != replica.name:
            rest = tuple(other for other in owner.seats if other not in found)
            draft.do(Sit(owner.name, rest, f"gave {one.node} to {replica.name}"))


def _story(replica: ReplicaRecord, found: list[Seat]) -> str:
    before, after = set(replica.seats), set(found)
    if not before and not replica.served:
        return ""
    gone = nodeset.fold([one.node for one in replica.seats if one not in after])
    come = nodeset.fold([one.node for one in found if one not in before])
    if gone and come:
        return f"{come} instead of {gone}"
    return f"joined by {come}" if come else f"without {gone}"


def _ask_for(draft: Draft, replica: ReplicaRecord, missing: int, near: tuple[str, ...]) -> None:
    """Ask for what is missing and not yet on its way; say what is waited for."""
    if _has_waited_too_long(draft, replica):
        limit = draft.context.spec.limits.queue
        failure = Failure(
            code="deadline",
            exit_code=4,
            message=f"no other node within {limit} s",
            where=replica.name,
            hint="Add nodes, uncordon one, or raise limits.queue.",
            at=draft.now,
        )
        draft.do(Fail(replica.name, failure))
        return
    coming = [
        held
        for held in draft.living_of.get(replica.name, [])
        if held.running_at is None and _is_awaited(draft, held)
    ]
    for held in coming:
        if held.size > missing and draft.view(held.name).state == "pending" and replica.seats:
            # A node came back meanwhile: what is asked for may be more than there will ever be.
            draft.do(End(replica.name, held.name, f"{_count(missing)} will do"))
        _tell_pending(draft, replica, held)
    missing -= sum(held.size for held in coming)
    if missing <= 0:
        return
    if wait_s := back_off_s(replica, draft.now):
        draft.wait(replica.name, f"the next try in {wait_s:.0f} s")
        return
    in_place = draft.context.spec.reschedule == "in_place" and not draft.context.pool
    if _must_hurry(replica) and in_place:
        draft.wait(replica.name, f"{_count(missing)} (reschedule: in_place)")
        return
    if not draft.context.pool:
        draft.allocate(replica.name, missing, ())
        draft.wait(replica.name, "nodes")
        return
    free = draft.free_nodes(missing, near)
    if len(free) == missing or (free and _must_hurry(replica)):
        draft.allocate(replica.name, len(free), tuple(free))
        draft.wait(replica.name, "nodes")
    if len(free) < missing:
        away = _away(draft)
        told = f" ({', '.join(away)} cannot be reached)" if away else ""
        draft.wait(replica.name, f"{_count(missing - len(free))}{told}")


def _has_waited_too_long(draft: Draft, replica: ReplicaRecord) -> bool:
    """Who has served waits for ever: it is wanted, and somebody is told. A pending job has a
    deadline of its own, which knows what it waits for."""
    if replica.served or replica.requested_at is None:
        return False
    pending = any(held.running_at is None for held in draft.living_of.get(replica.name, []))
    return not pending and draft.now - replica.requested_at > draft.context.spec.limits.queue


def _is_awaited(draft: Draft, held: AllocationRecord) -> bool:
    return draft.view(held.name).state != "gone"


def _tell_pending(draft: Draft, replica: ReplicaRecord, held: AllocationRecord) -> None:
    view = draft.view(held.name)
    if view.state == "unknown":
        draft.wait(replica.name, f"the backend to answer ({view.reason})")
        return
    reason = view.reason or "the allocation"
    limit = draft.context.spec.limits.queue
    if draft.now - held.requested_at > limit and not replica.served:
        failure = Failure(
            code="deadline",
            exit_code=4,
            message=f"no nodes within {limit} s; waited for {reason}",
            where=view.identity or replica.name,
            hint="Raise limits.queue, or ask for fewer nodes.",
            at=draft.now,
        )
        draft.do(Fail(replica.name, failure))
        return
    draft.wait(replica.name, reason)


def _count(missing: int) -> str:
    return "another node" if missing == 1 else f"{missing} other nodes"


def _away(draft: Draft) -> list[str]:
    """Nodes that are still held because nobody can reach them."""
    return sorted(
        {
            node
            for held in draft.living
            for node in held.nodes
            if not (agent := draft.view(held.name).agents.get(node)) or not agent.reachable
        }
    )
