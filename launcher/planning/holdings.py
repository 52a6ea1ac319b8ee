"""Allocations and spares: settled when they come, kept while they are of use, given back. Pure."""

from collections.abc import Iterable

from launcher.documents import Assignment, Checks, Report
from launcher.planning.draft import Draft, rests
from launcher.planning.spares import have_spares
from launcher.record import AllocationRecord, Seat
from launcher.spec import is_folder
from launcher.steps import Allocate, Assign, Context, End, Release, Remind, Settle
from launcher.verdicts import is_dead, is_lost, is_silent

STOP_CONFIRM_S = 20.0
REMIND_AFTER_S = 3.0
QUEUE_PATIENCE_S = 60.0  # ours: an idle cluster starts a job within two seconds
AWAY_KEPT_S = 60.0  # a job of whose agents none answers is given back after this


def settle(draft: Draft) -> None:
    """The nodes of what has come. The leader is the first in the backend's order; it stays so."""
    for held in draft.living:
        view = draft.view(held.name)
        if not held.asked and draft.snapshot.ledger.cordons.keys() & set(held.nodes):
            draft.do(
                End(held.owner, held.name, "a node of it was cordoned before it was asked for")
            )
        elif not held.asked:
            draft.do(Allocate(held.owner, held.number, held.size, held.nodes, held.exclude))
        elif view.state == "running" and held.running_at is None:
            draft.do(Settle(held.owner, held.name, view.nodes))
        elif view.state == "pending" and _is_outdated(draft, held):
            # It would wait for ever for other nodes, while those it refuses are good again.
            draft.do(End(held.owner, held.name, "a node that it refuses is free again"))


def _is_outdated(draft: Draft, held: AllocationRecord) -> bool:
    waits_long = draft.now - held.requested_at > QUEUE_PATIENCE_S
    return waits_long and bool(set(held.exclude) - draft.refused(held.size))


def remind(draft: Draft) -> None:
    """Who lives and has not taken up its order is told again: it may never have arrived."""
    told = {step.seat for step in draft.steps if isinstance(step, Assign)}
    going = {step.allocation for step in draft.steps if isinstance(step, Release)}
    for held in draft.record.allocations.values():
        if held.released or held.name in going:
            continue
        for node, order in held.assignments.items():
            seat = Seat(node=node, allocation=held.name)
            report = draft.snapshot.agent(seat).report
            if report is None or seat in told or node not in held.nodes:
                continue
            waited = draft.now - held.ordered_at.get(node, draft.now)
            is_late = report.assignment_revision < order.revision and report.phase != "stopped"
            if is_late and waited > REMIND_AFTER_S and not is_lost(draft.snapshot.agent(seat)):
                draft.do(Remind(held.owner, seat))


def tell_unseen(draft: Draft) -> None:
    """What is not seen goes on as it is; a person should know why nobody looks."""
    silent: dict[str, None] = {}
    for held in draft.living:
        view = draft.view(held.name)
        if view.state == "unknown" and held.running_at is not None:
            silent[view.reason or "no answer"] = None
        for agent in view.agents.values():
            replica = draft.sitting.get(Seat(node=agent.node, allocation=held.name))
            works = agent.report is not None and not is_silent(agent)
            serves = replica is not None and replica.ranked_at and not is_lost(agent)
            if agent.problem and not agent.ended and (works or serves):
                draft.wait(agent.node, f"{agent.problem}; what runs there goes on")
    for reason in silent:
        draft.wait("the backend", f"{reason}; what runs goes on")


def candidates(draft: Draft) -> list[Seat]:
    """Agents that are fit and serve nobody: any replica may take them."""
    if draft.fit is None:
        draft.fit = [seat for seat in _idle(draft, draft.sitting) if _is_fit(draft, seat)]
    return [seat for seat in draft.fit if seat not in draft.taken]


def tend(draft: Draft) -> None:
    """After the replicas had their turn: what is left becomes a spare, or goes."""
    _end_what_is_over(draft)
    idle = [seat for seat in _idle(draft, draft.sitting) if seat not in draft.taken]
    kept = [] if draft.snapshot.desired == "down" else [s for s in idle if _keep(draft, s)]
    _dismiss(draft, [seat for seat in idle if seat not in kept])
    _clear_away_the_dead(draft)
    have_spares(draft, kept, candidates(draft))
    for held in draft.record.allocations.values():
        if held.ending_at is not None and not held.released:
            _give_back(draft, held)


def checks(context: Context, node: str, ports_to_check: tuple[int, ...]) -> Checks:
    """What a node finds out about itself before it takes work."""
    return Checks(
        probe_script=context.scripts["engine-probe.sh"],
        executor=context.layout.executor,
        model_folder=context.spec.model if is_folder(context.spec.model) else None,
        image=context.spec.runtime.image_file,
        ports=ports_to_check,
        gpus=context.layout.ranks_per_node,
        shares_machine=context.shares_machine,
        weights_folders=context.weights_folders.get(node, ()),
        weights_bytes=context.weights_bytes,
    )


def _idle(draft: Draft, sitting: Iterable[Seat]) -> list[Seat]:
    taken = set(sitting)
    return [
        seat
        for held in draft.living
        if held.running_at is not None
        for node in held.nodes
        if (seat := Seat(node=node, allocation=held.name)) not in taken and draft.is_usable(seat)
    ]


def _is_fit(draft: Draft, seat: Seat) -> bool:
    report = draft.snapshot.agent(seat).report
    if report is None or report.facts is None or report.facts.unfit or _held(draft, seat):
        return False
    if report.health is not None and report.health.unfit:
        return False
    order = draft.record.order(seat)
    if order is None or order.goal != "idle" or not draft.is_fresh(seat):
        return False
    return report.phase == "warm" and report.assignment_revision == order.revision


def _held(draft: Draft, seat: Seat) -> bool:
    return seat.node in draft.snapshot.ledger.cordons


def _keep(draft: Draft, seat: Seat) -> bool:
    """Bring an idle agent to where it can take work; False where it never will."""
    if _held(draft, seat):
        return False
    report = draft.snapshot.agent(seat).report
    if report is None:
        return draft.snapshot.agent(seat).reachable  # its agent is on its way
    unfit = (report.facts.unfit if report.facts else ()) or (
        report.health.unfit if report.health else ()
    )
    order = draft.record.order(seat)
    if unfit and report.phase in ("idle", "warm"):
        return _quarantine(draft, seat, report)
    if order is None or order.goal == "rank":
        wanted = checks(draft.context, seat.node, ())
        revision = draft.record.revision(seat) + 1
        assignment = Assignment(
            revision=revision,
            goal="idle",
            checks=wanted,
            park=draft.context.park,
            stop_grace_s=5,
        )
        draft.do(Assign(_owner(draft, seat), seat, assignment))
    return True


def _dismiss(draft: Draft, idle: list[Seat]) -> None:
    """Agents that will not be used are told to end; their nodes are given back then."""
    if draft.is_all_over or draft.snapshot.desired == "down":
        return
    for seat in idle:
        if draft.snapshot.agent(seat).report is not None:
            draft.do(Assign(_owner(draft, seat), seat, stopped(draft, seat, 5, "not to be used")))


def _quarantine(draft: Draft, seat: Seat, report: Report) -> bool:
    """Whether an unfit agent is kept all the same: where another would be no better."""
    facts = report.facts if report.facts and report.facts.unfit else report.health
    finding = facts.unfit[0] if facts and facts.unfit else None
    if finding is None:
        return False
    if draft.context.shares_machine or draft.brake(finding.check, [seat.node]):
        return True  # it stays, unfit and visible
    draft.quarantine(_owner(draft, seat), seat.node, finding, report.boot_id)
    return False


def _owner(draft: Draft, seat: Seat) -> str:
    return draft.record.allocations[seat.allocation].owner


def _end_what_is_over(draft: Draft) -> None:
    """Jobs that ended by themselves, and everything when the fleet is to go down."""
    used = {seat.allocation for seat in draft.sitting}
    for held in draft.living:
        if held.name in used:
            continue
        if draft.view(held.name).state == "gone":
            draft.do(End(held.owner, held.name, draft.view(held.name).reason or "it ended"))
        elif draft.snapshot.desired == "down" or draft.is_all_over:
            draft.do(End(held.owner, held.name, "nobody needs it"))
        elif not draft.context.pool and _is_deserted(draft, held):
            draft.do(End(held.owner, held.name, "none of its agents answers"))


def _is_deserted(draft: Draft, held: AllocationRecord) -> bool:
    if held.running_at is None or not held.nodes:
        return False
    for node in held.nodes:
        agent = draft.snapshot.agent(Seat(node=node, allocation=held.name))
        if draft.is_told_to_stop(Seat(node=node, allocation=held.name)):
            continue
        if agent.report is None:
            if draft.now - held.running_at < draft.context.spec.limits.agents:
                return False
        elif not agent.ended and (agent.beat_silent_s or 0.0) < AWAY_KEPT_S:
            return False
    return True


def _clear_away_the_dead(draft: Draft) -> None:
    """An agent that died is swept, and its node is free again, or goes back to Slurm."""
    if draft.is_all_over or draft.snapshot.desired == "down":
        return
    for held in draft.living:
        if held.running_at is None or rests(held.retry_at, draft.now):
            continue
        seats = [Seat(node=node, allocation=held.name) for node in held.nodes]
        gone = tuple(
            seat.node
            for seat in seats
            if seat not in draft.sitting
            and (is_dead(draft.snapshot.agent(seat)) or _never_came(draft, held, seat))
        )
        is_of_use = any(seat in draft.sitting or draft.is_usable(seat) for seat in seats)
        if gone and (draft.context.pool or is_of_use):  # a job of no use goes as a whole
            whole = set(gone) == set(held.nodes)
            insists = bool(draft.context.pool)  # a job that cannot be made smaller stays as it is
            draft.do(Release(held.owner, held.name, gone, whole=whole, insists=insists))


def _never_came(draft: Draft, held: AllocationRecord, seat: Seat) -> bool:
    agent = draft.snapshot.agent(seat)
    late = draft.now - (held.running_at or draft.now) > draft.context.spec.limits.agents
    return agent.report is None and agent.reachable and late


def _give_back(draft: Draft, held: AllocationRecord) -> None:
    """Every agent told to stop; given back when all have, or cannot be asked."""
    waited = draft.now - (held.ending_at or draft.now)
    running = []
    for node in held.nodes:
        seat = Seat(node=node, allocation=held.name)
        agent = draft.snapshot.agent(seat)
        if agent.report is None or is_lost(agent) or agent.report.phase == "stopped":
            continue
        if draft.view(held.name).state == "gone":
            continue
        running.append(node)
        if not draft.is_told_to_stop(seat) and waited < STOP_CONFIRM_S:
            draft.do(Assign(held.name, seat, stopped(draft, seat, 5, "given back")))
    if running and waited < STOP_CONFIRM_S:
        draft.wait(held.name, f"{', '.join(running)} to stop")
        return
    if rests(held.retry_at, draft.now):
        draft.wait(held.name, "the next try to give it back")
        return
    insists = draft.snapshot.desired == "up" and not draft.is_all_over
    seats = [Seat(node=node, allocation=held.name) for node in held.nodes]
    away = [seat.node for seat in seats if not draft.snapshot.agent(seat).reachable]
    if insists and away:
        draft.wait(held.name, f"{', '.join(away)} to be reachable, to clean up there")
        return
    draft.do(Release(held.owner, held.name, held.nodes, whole=True, insists=insists))


def stopped(draft: Draft, seat: Seat, grace_s: int, reason: str) -> Assignment:
    """The order to end: the engine, then the agent itself."""
    revision = draft.record.revision(seat) + 1
    return Assignment(revision=revision, goal="stopped", reason=reason, stop_grace_s=grace_s)
