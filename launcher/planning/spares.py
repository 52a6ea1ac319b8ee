"""Spares: as many as the spec wants, no more. Pure."""

from collections import Counter

from launcher.planning.draft import Draft, rests
from launcher.record import AllocationRecord, Seat
from launcher.steps import Allocate, End, Release
from launcher.verdicts import is_dead, is_lost


def have_spares(draft: Draft, kept: list[Seat], warm: list[Seat]) -> None:
    """Too many go back, the newest first; too few are asked for. One whose walltime ends soon
    counts no more, and goes when its successor is warm. kept: idle agents, or coming."""
    if draft.snapshot.desired == "down" or draft.is_all_over:
        return
    coming = [held for held in draft.living if held.running_at is None]
    spares = [held for held in coming if held.owner not in _owners(draft)]
    wanted = draft.context.spec.spares
    have = sum(draft.lasts(seat.allocation) for seat in kept) + sum(one.size for one in spares)
    ready = sum(draft.lasts(seat.allocation) for seat in warm)
    have -= _let_go(draft, kept, have - wanted, replaced=ready >= wanted)
    for held in coming:
        # A job of a replica that it does not need any more: a spare came first.
        if held not in spares and _is_seated(draft, held.owner):
            draft.do(End(held.owner, held.name, f"{held.owner} has its nodes"))
    missing = wanted - have
    if missing > 0:
        _ask_for_spares(draft, missing)
        return
    for held in spares:
        reason = draft.view(held.name).reason
        draft.wait(f"spare {held.owner}", reason or "a node")


def _owners(draft: Draft) -> set[str]:
    """Replicas that may still need what was asked for them."""
    return {replica.name for replica in draft.record.replicas.values() if not replica.over}


def _let_go(draft: Draft, kept: list[Seat], too_many: int, *, replaced: bool) -> int:
    """Give back what is too much, and what is of no use; how many idle nodes go with it.

    replaced: whether those whose walltime ends soon have their successors.
    """
    used = {seat.allocation for seat in draft.sitting} | {seat.allocation for seat in draft.taken}
    idle = Counter(seat.allocation for seat in kept)
    owners = _owners(draft)
    is_short = any(
        len(replica.seats) < draft.context.spec.nodes
        for replica in draft.record.replicas.values()
        if not replica.over
    )
    going = {step.allocation for step in draft.steps if isinstance(step, Release)}
    gone = 0
    for held in reversed(draft.living):
        if held.name in going:
            continue
        is_here = held.running_at is not None
        size = idle[held.name] if is_here else held.size
        if held.name in used or (held.owner in owners and (is_short or not is_here)):
            continue  # somebody sits there, or may take it in the next round
        if is_here and not _is_wholly_known(draft, held, kept):
            continue
        if is_here and not size:
            draft.do(End(held.owner, held.name, "its nodes are not to be used"))
        elif is_here and not draft.lasts(held.name):
            if replaced:
                draft.do(End(held.owner, held.name, "its walltime ends soon; others are warm"))
        elif size and size <= too_many - gone:
            draft.do(End(held.owner, held.name, "there are spares enough"))
            gone += size
    return gone


def _is_wholly_known(draft: Draft, held: AllocationRecord, kept: list[Seat]) -> bool:
    """Whether every node of it is idle, or of no more use: then it can go as a whole."""
    here = {seat.node for seat in kept if seat.allocation == held.name}
    cordoned = draft.snapshot.ledger.cordons.keys()
    for node in held.nodes:
        seat = Seat(node=node, allocation=held.name)
        agent = draft.snapshot.agent(seat)
        if node in here:
            continue
        if is_lost(agent) and not is_dead(agent):
            return False  # away: it may come back, and cannot be swept now
        unfit = agent.report and agent.report.facts and agent.report.facts.unfit
        if node not in cordoned and draft.is_usable(seat) and not unfit:
            return False
    return True


def _is_seated(draft: Draft, owner: str) -> bool:
    replica = draft.record.replicas[owner]
    return len(replica.seats) == draft.context.spec.nodes and all(
        draft.is_usable(seat) for seat in replica.seats
    )


def _is_asking(draft: Draft) -> bool:
    """Whether nodes are on their way of which it is not known yet which they are."""
    pending = any(held.running_at is None for held in draft.living)
    return pending or any(isinstance(step, Allocate) for step in draft.steps)


def _all_serve(draft: Draft) -> bool:
    return all(replica.over or replica.serving_at for replica in draft.record.replicas.values())


def _ask_for_spares(draft: Draft, missing: int) -> None:
    busy = {held.owner for held in draft.record.allocations.values() if not held.released}
    names = (f"s{number}" for number in range(1, 10_000))
    free_names = (name for name in names if name not in busy)
    for name, _ in zip(free_names, range(missing), strict=False):
        if rests(draft.record.spares_not_before, draft.now):
            why = draft.record.spares_problem
            draft.wait(f"spare {name}", f"the next try ({why})" if why else "the next try")
        elif not draft.context.pool and _is_asking(draft):
            draft.wait(f"spare {name}", "the replicas to have their nodes")
        elif draft.context.shares_machine and not _all_serve(draft):
            draft.wait(f"spare {name}", "the replicas to serve first, by the same cores")
        elif not draft.context.pool:
            draft.allocate(name, 1, ())
            draft.wait(f"spare {name}", "a node")
        elif free := draft.free_nodes(1):
            draft.allocate(name, 1, (free[0],))
            draft.wait(f"spare {name}", "its agent")
        else:
            draft.wait(f"spare {name}", "a free node")
