"""Carry out a plan: for each step the intent first (record and journal), then the act. I/O."""

from typing import Any

from launcher.context import Ground
from launcher.documents import Evidence
from launcher.errors import FleetError, SlurmError
from launcher.record import (
    DRILLS_KEPT,
    INCIDENTS_KEPT,
    AllocationRecord,
    Failure,
    ReplicaRecord,
    RunRecord,
)
from launcher.steps import (
    Allocate,
    Assign,
    Close,
    Down,
    End,
    Fail,
    Interrupt,
    Note,
    Over,
    Pass,
    Plan,
    Quarantine,
    Release,
    Remind,
    Revive,
    Settle,
    Sit,
    Step,
)
from launcher.store import Store

RELEASE_TRIES = 2
RELEASE_WAIT_S, RELEASE_WAIT_MAX_S = 2.0, 60.0
LOSSES_KEPT = 10
ASK_AGAIN_S = 15.0  # after a backend refused to give nodes to a replica that has served


class Executor:
    """Holds the record of a run and is the only one that changes it."""

    def __init__(self, ground: Ground, record: RunRecord, store: Store) -> None:
        self._ground = ground
        self._store = store
        self.record = record
        self._failed_step: Step | None = None

    def apply(self, plan: Plan, now: float) -> None:
        """Every step of the plan, in order; what could not be done is told and tried again."""
        if plan.steps:
            self.record = self.record.model_copy(update={"seen_at": now})
        stuck: set[str] = set()
        for step in plan.steps:
            if step.about in stuck:
                continue
            if isinstance(step, Release):
                self._release(step, now)
                continue
            before = self.record
            self._save(remember(self.record, step, now))
            again = step == self._failed_step
            if not again and not isinstance(step, Remind):
                self._store.note(type(step).__name__.lower(), **_details(step))
            try:
                self._act(step)
                if isinstance(step, Allocate):
                    self._save(asked(self.record, step.allocation))
            except FleetError as error:
                if not again:  # the same step failing each round is told once
                    name = type(step).__name__.lower()
                    self._store.note("failed", step=name, error=str(error))
                self._failed_step = step
                if isinstance(step, Allocate):
                    self._save(refused(self.record, step, error, now))
                elif not isinstance(step, Assign | Remind):
                    # Nothing was done: forget the intent, so that the next round tries again.
                    self._save(before)
                    stuck.add(step.about)
                # Whether an order has arrived is not known: it stands, and is told again if not.

    def set_endpoint(self, endpoint: str) -> None:
        """The fleet's address, as clients call it."""
        self._save(self.record.model_copy(update={"endpoint": endpoint}))
        self._store.note("endpoint", endpoint=endpoint)

    def _release(self, step: Release, now: float) -> None:
        """The intent is in the record since End; here the end is, once it is reached."""
        again = step == self._failed_step
        if not again:
            self._store.note("release", **_details(step))
        try:
            self._act(step)
        except FleetError as error:
            held = self.record.allocations[step.allocation]
            tries = held.release_tries + 1
            if not again:
                self._store.note("failed", step="release", error=str(error), tries=tries)
            self._failed_step = step
            wait_s = min(RELEASE_WAIT_S * 2 ** (tries - 1), RELEASE_WAIT_MAX_S)
            held = held.model_copy(update={"release_tries": tries, "retry_at": now + wait_s})
            leftovers = {**self.record.leftovers, step.allocation: str(error)}
            self._save(
                with_allocation(self.record, held).model_copy(update={"leftovers": leftovers})
            )
            unheard = isinstance(error, SlurmError) and error.unreachable and not step.whole
            if step.insists or unheard or tries < RELEASE_TRIES:
                return
        else:
            rest = {k: v for k, v in self.record.leftovers.items() if k != step.allocation}
            self._save(self.record.model_copy(update={"leftovers": rest}))
        self._save(remember(self.record, step, now))

    def _act(self, step: Step) -> None:
        backend = self._ground.backend
        match step:
            case Allocate():
                held = self.record.allocations[step.allocation]
                self._store.keep_rendered(held.name, self._ground.rendered(self.record.run, held))
                backend.allocate(self._ground.allocation(self.record.run, held))
            case Assign(seat=seat, assignment=assignment):
                held = self.record.allocations[seat.allocation]
                allocation = self._ground.allocation(self.record.run, held)
                backend.assign(allocation, seat.node, assignment)
            case Remind(seat=seat):
                held = self.record.allocations[seat.allocation]
                allocation = self._ground.allocation(self.record.run, held)
                backend.assign(allocation, seat.node, held.assignments[seat.node])
            case Release(nodes=nodes, whole=whole):
                held = self.record.allocations[step.allocation]
                backend.release(
                    self._ground.allocation(self.record.run, held), None if whole else nodes
                )
            case Quarantine(cordon=cordon):
                self._store.change_ledger(lambda ledger: ledger.with_cordon(cordon))
            case Pass(passed=passed):
                self._store.change_ledger(lambda ledger: ledger.with_passed(passed))
            case _:
                return

    def _save(self, record: RunRecord) -> None:
        if record != self.record:
            self._store.save(record)
            self.record = record


def remember(record: RunRecord, step: Step, now: float) -> RunRecord:
    """The record after the intent of this step. Pure."""
    match step:
        case Allocate():
            return _with_new_allocation(record, step, now)
        case Settle(allocation=name, nodes=nodes):
            held = record.allocations[name]
            changed = held.model_copy(update={"nodes": nodes or held.nodes, "running_at": now})
            return with_allocation(record, changed)
        case Assign(seat=seat, assignment=assignment):
            held = record.allocations[seat.allocation]
            changes = {
                "assignments": {**held.assignments, seat.node: assignment},
                "ordered_at": {**held.ordered_at, seat.node: now},
            }
            drills = (*record.drills, step.drill)[-DRILLS_KEPT:] if step.drill else record.drills
            record = with_allocation(record, held.model_copy(update=changes))
            return record.model_copy(update={"drills": drills})
        case Remind(seat=seat):
            held = record.allocations[seat.allocation]
            ordered = {**held.ordered_at, seat.node: now}
            return with_allocation(record, held.model_copy(update={"ordered_at": ordered}))
        case End(allocation=name):
            held = record.allocations[name]
            return with_allocation(record, held.model_copy(update={"ending_at": now}))
        case Release():
            return _without_nodes(record, step)
        case Quarantine():
            return record
        case Close(reason=reason):
            return record.model_copy(update={"closed": reason})
        case _:
            replica = record.replicas[step.about]
            after = replica.model_copy(update=_changes(replica, step, now))
            replicas = {**record.replicas, replica.name: after}
            return _with_loss(record, step, now).model_copy(update={"replicas": replicas})


def _changes(replica: ReplicaRecord, step: Step, now: float) -> dict[str, Any]:
    match step:
        case Sit(seats=seats):
            return {"seats": seats, "running_at": None, "agents_at": None}
        case Interrupt(incident=incident, not_before=not_before, story=story):
            asked = int(incident.code == "asked")
            return {
                "stopping_at": now,
                "not_before": not_before,
                "incidents": (*replica.incidents, incident)[-INCIDENTS_KEPT:],
                "restarts_asked": replica.restarts_asked + asked,
                "story": replica.told(story),
            }
        case Fail(failure=failure):
            at = min(replica.failure.at, failure.at) if replica.failure else failure.at
            return {
                "intent": "down",
                "failure": failure.model_copy(update={"at": at}),
                "stopping_at": replica.stopping_at or now,
            }
        case Down():
            return {"intent": "down", "stopping_at": now}
        case Over():
            return {"over": True}
        case Revive():
            fresh = ReplicaRecord(name=replica.name, slot=replica.slot, requested_at=now)
            kept = {"generation": replica.generation, "served": replica.served}
            return {
                **dict(fresh),
                **kept,
                "restarts_asked": replica.restarts_asked + 1,
                "story": replica.told("brought up again because a person asked for it"),
            }
        case Pass():
            return {"rehearses": False}
        case Note(changes=changes):
            return changes
        case _:
            return {}


def with_allocation(record: RunRecord, held: AllocationRecord) -> RunRecord:
    return record.model_copy(update={"allocations": {**record.allocations, held.name: held}})


def asked(record: RunRecord, allocation: str) -> RunRecord:
    """The backend has taken the request for this allocation."""
    held = record.allocations[allocation]
    return with_allocation(record, held.model_copy(update={"asked": True}))


def _with_new_allocation(record: RunRecord, step: Allocate, now: float) -> RunRecord:
    if step.allocation in record.allocations:
        return record  # asked for again: the controller before us may not have come to it
    held = AllocationRecord(
        name=step.allocation,
        owner=step.about,
        number=step.number,
        size=step.size,
        nodes=step.nodes,
        exclude=step.exclude,
        requested_at=now,
    )
    counts = {**record.counts, step.about: step.number}
    record = with_allocation(record, held).model_copy(update={"counts": counts})
    replica = record.replicas.get(step.about)
    if replica is None or replica.requested_at is not None:
        return record
    asked = replica.model_copy(update={"requested_at": now})
    return record.model_copy(update={"replicas": {**record.replicas, asked.name: asked}})


def _without_nodes(record: RunRecord, step: Release) -> RunRecord:
    """An allocation that is over is forgotten once nobody sits in it, not even for the story."""
    held = record.allocations[step.allocation]
    if not step.whole:
        rest = tuple(node for node in held.nodes if node not in step.nodes)
        return with_allocation(record, held.model_copy(update={"nodes": rest}))
    record = with_allocation(record, held.model_copy(update={"released": True}))
    used = {seat.allocation for one in record.replicas.values() for seat in one.seats}
    kept = {
        name: one
        for name, one in record.allocations.items()
        if not one.released or name in used or name == step.allocation
    }
    return record.model_copy(update={"allocations": kept})


def _with_loss(record: RunRecord, step: Step, now: float) -> RunRecord:
    if not (isinstance(step, Interrupt) and step.incident.code == "node_lost"):
        return record
    node = step.incident.node
    times = (*record.losses.get(node, ()), now)[-LOSSES_KEPT:]
    return record.model_copy(update={"losses": {**record.losses, node: times}})


def refused(record: RunRecord, step: Allocate, error: FleetError, now: float) -> RunRecord:
    """The backend did not give nodes, or only some: what there is goes back. Who never served is
    given up; others try again later."""
    held = record.allocations[step.allocation].model_copy(update={"ending_at": now})
    record = with_allocation(record, held)
    replica = record.replicas.get(step.about)
    if replica is None:
        later = {"spares_not_before": now + ASK_AGAIN_S, "spares_problem": error.message}
        return record.model_copy(update=later)
    if not replica.served:
        return remember(record, Fail(step.about, _failure_of(error, now)), now)
    told = replica.told(f"no nodes: {error.message}")
    story = told if replica.story[-1:] != told[-1:] else replica.story
    changes = {"not_before": now + ASK_AGAIN_S, "story": story}
    return remember(record, Note(step.about, changes), now)


def _failure_of(error: FleetError, now: float) -> Failure:
    return Failure(
        code=error.code,
        exit_code=error.exit_code,
        message=error.message,
        where=error.where,
        hint=error.hint,
        at=now,
    )


def _details(step: Step) -> dict[str, object]:
    """What the journal keeps of a step; `replica` is who it is about."""
    about: dict[str, object] = {"replica": step.about}
    match step:
        case Allocate():
            return {**about, "allocation": step.number, "nodes": step.nodes, "size": step.size}
        case Settle():
            return {**about, "allocation": step.allocation, "nodes": step.nodes}
        case Assign():
            member = step.assignment.member
            return {
                **about,
                "node": step.seat.node,
                "allocation": step.seat.allocation,
                "goal": step.assignment.goal,
                "revision": step.assignment.revision,
                "generation": member.generation if member else None,
                **({"drill": step.assignment.drill} if step.drill else {}),
            }
        case Sit():
            seats = [f"{seat.node} ({seat.allocation})" for seat in step.seats]
            return {**about, "seats": seats, "story": step.story}
        case Interrupt():
            incident = step.incident
            return {**about, "message": incident.message, "where": incident.node}
        case Fail():
            evidence: Evidence | None = step.failure.evidence
            return {
                **about,
                "message": step.failure.message,
                "where": step.failure.where,
                "evidence": evidence.model_dump() if evidence else None,
            }
        case Close(reason=reason):
            return {"reason": reason}
        case End():
            return {**about, "allocation": step.allocation, "reason": step.reason}
        case Release():
            return {**about, "allocation": step.allocation, "nodes": step.nodes}
        case Note():
            return {**about, **step.changes}
        case Quarantine():
            return {**about, **step.cordon.model_dump()}
        case _:
            return about
