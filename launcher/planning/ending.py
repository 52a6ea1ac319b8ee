"""The end of a generation: for good (`down`, a failure), or for the next one. Pure."""

from inventory import nodeset
from launcher.attribution import is_counted, node_of
from launcher.documents import Assignment
from launcher.planning.draft import Draft, agent_views
from launcher.planning.holdings import STOP_CONFIRM_S, stopped
from launcher.ports import SLOTS
from launcher.record import Failure, Incident, ReplicaRecord, Seat
from launcher.steps import Assign, End, Fail, Note, Over, Sit
from launcher.verdicts import first_failure, is_dead, is_lost

# A node that does not confirm its end is fenced by its peers' leases within 15 s; what it runs
# after that nobody can say, so it is given up and the doubt is reported.
ATTRIBUTION_S = 6.0
LEADER_FIRST_S = 10.0
FOLLOWER_GRACE_S = 1
GATEWAY_TELLS_S = 3.0
ENGINE_GRACE_S = 5


def end(draft: Draft, replica: ReplicaRecord) -> None:
    """Every agent told to stop, the leader first where it is in order; over when all have."""
    if under_way := _under_way(draft, replica):
        draft.wait(replica.name, under_way)
        return
    drain_s = 0 if replica.failure else draft.context.spec.limits.drain
    waited = draft.now - (replica.stopping_at or draft.now)
    patience_s = STOP_CONFIRM_S + drain_s
    agents = [
        seat
        for seat in replica.seats
        if not is_lost(draft.snapshot.agent(seat))
        and draft.view(seat.allocation).state not in ("gone", "none")
    ]
    unordered = [
        seat
        for seat in agents
        if waited < patience_s  # a node that cannot be told is fenced by its lease meanwhile
        and not draft.is_told_to_stop(seat)
        and (draft.snapshot.agent(seat).report or draft.snapshot.agent(seat).reachable)
    ]
    if replica.failure is None and waited < drain_s + LEADER_FIRST_S and unordered:
        # The leader's API server ends its requests and its engine while the others still answer.
        leader = replica.seats[0]
        report = draft.snapshot.agent(leader).report
        if leader in unordered:
            unordered = [leader]
        elif report is not None and report.phase != "stopped" and leader in agents:
            draft.wait(replica.name, f"{leader.node} to stop first")
            return
    if unordered:
        draft.do(*(_stop(draft, replica, seat, drain_s) for seat in unordered))
        draft.wait(replica.name, "agents to stop")
        return
    running = [
        seat.node
        for seat in agents
        if (report := draft.snapshot.agent(seat).report) is not None and report.phase != "stopped"
    ]
    if running and waited < patience_s:
        _tell_better(draft, replica, waited)
        draft.wait(replica.name, f"{', '.join(running)} to stop")
        return
    draft.do(Over(replica.name))


def clear(draft: Draft, replica: ReplicaRecord) -> None:
    """The survivors end their engines and keep their nodes; who is lost or does not, goes."""
    if replica.is_restarted_by_a_person and (under_way := _under_way(draft, replica)):
        draft.wait(replica.name, under_way)
        return
    waited = draft.now - (replica.stopping_at or draft.now)
    culprit = _lost_node(replica)
    kept, awaited = [], []
    for seat in replica.seats:
        agent = draft.snapshot.agent(seat)
        if seat.node == culprit or is_dead(agent) or not draft.is_usable(seat):
            continue
        if seat.node in draft.snapshot.ledger.cordons:
            continue  # the next generation is new work
        order = draft.record.order(seat)
        if order is None or order.goal == "rank":
            draft.do(Assign(replica.name, seat, _idle(draft, replica, seat)))
            awaited.append(seat.node)
        elif not _is_idle(draft, seat, order):
            if waited > STOP_CONFIRM_S:
                continue  # its engine does not end: fenced by its lease or not, it is not trusted
            awaited.append(seat.node)
        kept.append(seat)
    if awaited:
        _tell_better(draft, replica, waited)
        draft.wait(replica.name, f"{', '.join(awaited)} to end its engine")
        return
    if tuple(kept) != replica.seats:
        gone = nodeset.fold([seat.node for seat in replica.seats if seat not in kept])
        draft.do(Sit(replica.name, tuple(kept), f"without {gone}"))
    lost_some = tuple(kept) != replica.seats
    begins_anew = not draft.context.pool and not replica.served and lost_some
    if draft.context.spec.reschedule == "resubmit" or begins_anew:
        _give_everything_back(draft, replica)
        draft.do(Sit(replica.name, (), ""))
    step = draft.context.spec.nodes if draft.context.shares_machine else 1
    changes = {
        "stopping_at": None,
        "ranked_at": None,
        "serving_at": None,
        "running_at": None,
        "agents_at": None,
        "rehearses": False,
        "slots_tried": 0,
        "slot": (replica.slot + step) % SLOTS,
        "requested_at": draft.now,
    }
    draft.do(Note(replica.name, changes))


def _give_everything_back(draft: Draft, replica: ReplicaRecord) -> None:
    for name in dict.fromkeys(seat.allocation for seat in replica.seats):
        shared = any(
            seat.allocation == name and owner.name != replica.name
            for seat, owner in draft.sitting.items()
        )
        held = draft.record.allocations.get(name)
        if held is not None and not shared and held.ending_at is None:
            draft.do(End(replica.name, name, "reschedule: resubmit"))


def _idle(draft: Draft, replica: ReplicaRecord, seat: Seat) -> Assignment:
    in_order = replica.is_restarted_by_a_person
    # As in _stop; vLLM's follower waits 5 s for a worker that waits for the leader's.
    has_nothing_to_end = in_order and seat != replica.seats[0]
    return Assignment(
        revision=draft.record.revision(seat) + 1,
        goal="idle",
        reason="the generation is over",
        park=draft.context.park,
        stop_grace_s=FOLLOWER_GRACE_S if has_nothing_to_end else ENGINE_GRACE_S,
        after_failure=not in_order,
    )


def _is_idle(draft: Draft, seat: Seat, order: Assignment) -> bool:
    report = draft.snapshot.agent(seat).report
    if report is None:
        return False
    return report.assignment_revision >= order.revision and report.phase in ("idle", "warm")


def _lost_node(replica: ReplicaRecord) -> str:
    last = replica.incidents[-1] if replica.incidents else None
    return last.node if last is not None and last.code == "node_lost" else ""


def _tell_better(draft: Draft, replica: ReplicaRecord, waited: float) -> None:
    """The story may become clearer while reports come in."""
    if waited >= ATTRIBUTION_S:
        return
    failure = first_failure(replica, agent_views(draft, replica), draft.now)
    if failure is None:
        return
    if replica.failure is not None:
        if failure.message != replica.failure.message and replica.failure.code != "deadline":
            hint = replica.failure.hint if failure.code == replica.failure.code else failure.hint
            draft.do(Fail(replica.name, failure.model_copy(update={"hint": hint})))
        return
    last = replica.incidents[-1] if replica.incidents else None
    if last is not None and last.code != "asked" and failure.message != last.message:
        better = _incident(last, failure)
        draft.do(Note(replica.name, {"incidents": (*replica.incidents[:-1], better)}))


def _incident(last: Incident, failure: Failure) -> Incident:
    changes = {
        "code": failure.code,
        "message": failure.message,
        "node": node_of(failure),
        "counts": is_counted(failure),
    }
    return last.model_copy(update=changes)


def _stop(draft: Draft, replica: ReplicaRecord, seat: Seat, drain_s: int) -> Assign:
    # Requests end on the leader. When it is gone a follower has nothing to end in order, and Ray's
    # worker would wait half a minute for the head that is no more.
    leads = seat == replica.seats[0]
    grace_s = ENGINE_GRACE_S if replica.failure else drain_s if leads else FOLLOWER_GRACE_S
    reason = replica.failure.message if replica.failure else "down"
    order = stopped(draft, seat, grace_s, reason)
    failed = replica.failure is not None
    return Assign(replica.name, seat, order.model_copy(update={"after_failure": failed}))


def _under_way(draft: Draft, replica: ReplicaRecord) -> str:
    """What an orderly end still waits for at the gateway, which sends no new requests here."""
    told_to_stop = any(
        (order := draft.record.order(seat)) is not None and order.goal != "rank"
        for seat in replica.seats
    )
    gateway = draft.snapshot.gateway
    if replica.failure or told_to_stop or not gateway.is_up or not replica.serving_at:
        return ""
    waited = draft.now - (replica.stopping_at or draft.now)
    requests = gateway.requests.get(replica.name)
    if requests is None:
        return "the gateway to take no more requests" if waited < GATEWAY_TELLS_S else ""
    if requests and waited < draft.context.spec.limits.drain:
        return f"{requests} request{'s' if requests > 1 else ''} to end"
    return ""
