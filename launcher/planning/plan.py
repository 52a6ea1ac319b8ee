"""One round of planning, from the top. Pure."""

from launcher import ports
from launcher.attribution import is_repeated_loss, judge, node_of
from launcher.planning import bringup, drills, ending, gather, holdings, lifetime
from launcher.planning.draft import Draft, agent_views
from launcher.planning.unfit import lost_too_often
from launcher.record import Failure, Incident, ReplicaRecord, RunRecord
from launcher.snapshot import Snapshot
from launcher.steps import Close, Context, Down, Fail, Interrupt, Plan, Revive
from launcher.verdicts import first_failure

FALLBACK_SERVES = "`launcher restart` or `down` and `up`: no replica is left, the fallback serves"


def make_plan(context: Context, record: RunRecord, snapshot: Snapshot) -> Plan:
    """All steps that can be taken now, over all replicas."""
    draft = Draft(context, record, snapshot)
    if snapshot.desired == "up" and (reason := lifetime.why_over(draft)):
        return Plan((Close(reason),))
    holdings.settle(draft)
    for replica in record.replicas.values():
        _plan_replica(draft, replica)
    holdings.tend(draft)
    holdings.remind(draft)
    holdings.tell_unseen(draft)
    finished = draft.is_all_over and all(one.released for one in record.allocations.values())
    if finished and snapshot.desired == "up" and context.spec.gateway.fallback:
        return Plan(tuple(draft.steps), (*draft.waits, FALLBACK_SERVES), finished=False)
    return Plan(tuple(draft.steps), tuple(draft.waits), finished and not draft.steps)


def new_record(
    context: Context,
    run: int,
    before: RunRecord | None,
    now: float,
    asked_at: float | None = None,
) -> RunRecord:
    """The record with which a run begins.

    Allocations and generations are counted over the fleet's life, so that no name is used twice.
    """
    replicas = {}
    for number in range(1, context.spec.replicas + 1):
        name = f"r{number}"
        old = before.replicas.get(name) if before else None
        preferred = ports.preferred_slot(context.user_id, context.spec.name, name)
        replicas[name] = ReplicaRecord(
            name=name,
            slot=old.slot if old else preferred,
            generation=old.generation if old else 0,
        )
    counts = before.counts if before else {}
    return RunRecord(run=run, started_at=now, asked_at=asked_at, replicas=replicas, counts=counts)


def _plan_replica(draft: Draft, replica: ReplicaRecord) -> None:
    desired = draft.snapshot.desired
    asked = draft.snapshot.restarts.get(replica.name, 0)
    if replica.over:
        if desired == "up" and replica.failure and asked > replica.restarts_asked:
            draft.do(Revive(replica.name))
        return
    if replica.intent == "up" and desired == "down":
        draft.do(Down(replica.name))
        return
    if replica.intent == "down":
        ending.end(draft, replica)
        return
    if replica.is_restarting:
        ending.clear(draft, replica)
        return
    if replica.ranked_at is None:
        if gather.seat(draft, replica):
            bringup.bring_up(draft, replica)
        return
    views = agent_views(draft, replica)
    failure = first_failure(replica, views, draft.now) or _without_allocation(draft, replica)
    if failure is not None:
        interrupt(draft, replica, failure)
    elif asked > replica.restarts_asked:
        draft.do(_asked_for(replica, draft.now))
    else:
        bringup.watch(draft, replica)
        drills.carry_out(draft, replica)


def interrupt(draft: Draft, replica: ReplicaRecord, failure: Failure) -> None:
    """A generation ended by itself: the replica comes again, or is given up with the reason."""
    verdict = judge(draft.context.spec.limits, replica, failure, draft.now)
    node = node_of(failure)
    if failure.code == "node_lost" and is_repeated_loss(
        draft.record.losses.get(node, ()), draft.now
    ):
        lost_too_often(draft, replica, node)
    if not verdict.again:
        hint = f"{failure.hint} No restart: {verdict.why}.".strip()
        draft.do(Fail(replica.name, failure.model_copy(update={"hint": hint})))
        return
    incident = Incident(
        at=failure.at,
        code=failure.code,
        message=failure.message,
        node=node,
        counts=verdict.counts,
        proven=replica.serving_at is not None,
    )
    story = f"generation {replica.generation} ended: {failure.message}"
    draft.do(Interrupt(replica.name, incident, verdict.not_before, story))


def _without_allocation(draft: Draft, replica: ReplicaRecord) -> Failure | None:
    for seat in replica.seats:
        view = draft.view(seat.allocation)
        if view.state == "gone":
            return Failure(
                code="allocation_over" if view.is_ordinary else "allocation",
                exit_code=1,
                message=f"the allocation ended: {view.reason or 'reason unknown'}",
                hint="`launcher up` asks for a new one.",
                at=draft.now,
            )
    return None


def _asked_for(replica: ReplicaRecord, now: float) -> Interrupt:
    incident = Incident(at=now, code="asked", message="a person asked for a restart", counts=False)
    return Interrupt(replica.name, incident, 0.0, "restarted because a person asked for it")
