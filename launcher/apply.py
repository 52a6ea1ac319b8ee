"""Carry out a plan: for each step the intent first (record and journal), then the act. I/O."""

from typing import Any

from launcher import cordons
from launcher.context import Ground
from launcher.documents import Evidence
from launcher.errors import FleetError
from launcher.files import make_private, write_document, write_text
from launcher.journal import Journal
from launcher.paths import RunPaths
from launcher.record import Failure, ReplicaRecord, RunRecord
from launcher.steps import (
    Allocate,
    Assign,
    Down,
    Fail,
    Note,
    Pass,
    Plan,
    Quarantine,
    Release,
    Step,
    Swap,
)

RELEASE_TRIES = 2
_BEGIN_AGAIN: dict[str, Any] = {
    "intent": "none",
    "nodes": (),
    "running_at": None,
    "stopping_at": None,
    "release_tries": 0,
    "slots_tried": 0,
    "ranked_at": None,
    "rehearses": False,
    "assignments": {},
}


class Executor:
    """Holds the record of a run and is the only one that changes it."""

    def __init__(self, ground: Ground, record: RunRecord, paths: RunPaths) -> None:
        self._ground = ground
        self._paths = paths
        self._journal = Journal(paths.journal)
        self.record = record
        self._failed_step: Step | None = None

    def apply(self, plan: Plan, now: float) -> None:
        stuck: set[str] = set()
        for step in plan.steps:
            if step.replica in stuck:
                continue
            if isinstance(step, Release):
                self._release(step, now)
                continue
            before = self.record
            self._save(remember(self.record, step, now))
            again = step == self._failed_step
            if not again:
                self._journal.write(type(step).__name__.lower(), **_details(step))
            try:
                self._act(step)
            except FleetError as error:
                if not again:  # the same step failing each round is told once
                    name = type(step).__name__.lower()
                    self._journal.write("failed", step=name, error=str(error))
                self._failed_step = step
                if isinstance(step, Allocate):
                    failure = _failure_of(error, now)
                    self._save(remember(self.record, Fail(step.replica, failure), now))
                else:
                    # Nothing was done: forget the intent, so that the next round tries again. A
                    # node that cannot be told to stop must not keep the others from being told.
                    self._save(before)
                    if not (isinstance(step, Assign) and step.assignment.goal == "stopped"):
                        stuck.add(step.replica)

    def resume(self) -> None:
        """After a restart: write every assignment again that may not have been written."""
        for replica in self.record.replicas.values():
            if replica.released:
                continue
            for node, assignment in replica.assignments.items():
                try:
                    self._act(Assign(replica.name, node, assignment))
                except FleetError as error:
                    self._journal.write("failed", step="resume", node=node, error=str(error))
            if replica.intent == "up" and not replica.assignments:
                try:
                    self._act(Allocate(replica.name, replica.allocation, replica.nodes))
                except FleetError as error:
                    self._journal.write("failed", step="resume", error=str(error))

    def set_endpoint(self, endpoint: str) -> None:
        """The fleet's address, as clients call it."""
        self._save(self.record.model_copy(update={"endpoint": endpoint}))
        self._journal.write("endpoint", endpoint=endpoint)

    def _release(self, step: Release, now: float) -> None:
        """The intent is in the record since Down or Fail; here the end is, once it is reached."""
        self._journal.write("release", replica=step.replica, allocation=step.allocation)
        try:
            self._act(step)
        except FleetError as error:
            tries = self.record.replicas[step.replica].release_tries + 1
            self._journal.write("failed", step="release", error=str(error), tries=tries)
            note = Note(step.replica, {"release_tries": tries, "leftover": str(error)})
            self._save(remember(self.record, note, now))
            if tries < RELEASE_TRIES:
                return
        self._save(remember(self.record, step, now))

    def _act(self, step: Step) -> None:
        replica = self.record.replicas[step.replica]
        allocation = self._ground.allocation(
            self.record.run, replica, replica.allocation, replica.nodes
        )
        backend = self._ground.backend
        match step:
            case Allocate():
                self._write_rendered(replica)
                backend.allocate(allocation)
            case Assign(node=node, assignment=assignment):
                backend.assign(allocation, node, assignment)
            case Release():
                backend.release(allocation)
            case Quarantine(cordon=cordon):
                cordons.change(backend.kind, lambda ledger: ledger.with_cordon(cordon))
            case Pass(passed=passed):
                cordons.change(backend.kind, lambda ledger: ledger.with_passed(passed))
            case Fail() | Down() | Note() | Swap():
                return

    def _write_rendered(self, replica: ReplicaRecord) -> None:
        folder = make_private(self._paths.rendered / f"{replica.name}.a{replica.allocation}")
        scripts = self._ground.rendered(
            self.record.run, replica, replica.allocation, replica.nodes
        )
        for name, text in scripts.items():
            write_text(folder / name, text, mode=0o700)

    def _save(self, record: RunRecord) -> None:
        if record != self.record:
            write_document(self._paths.record, record)
            self.record = record


def remember(record: RunRecord, step: Step, now: float) -> RunRecord:
    """The record after the intent of this step. Pure."""
    replica = record.replicas[step.replica]
    changes: dict[str, Any]
    match step:
        case Allocate(allocation=number, nodes=nodes, exclude=exclude):
            changes = {
                "intent": "up",
                "allocation": number,
                "nodes": nodes,
                "exclude": exclude,
                "requested_at": now,
            }
        case Assign(node=node, assignment=assignment):
            changes = {"assignments": {**replica.assignments, node: assignment}}
        case Fail(failure=failure):
            began = replica.stopping_at or now
            at = min(replica.failure.at, failure.at) if replica.failure else failure.at
            failure = failure.model_copy(update={"at": at})
            changes = {"intent": "down", "failure": failure, "stopping_at": began}
        case Down():
            changes = {"intent": "down", "stopping_at": now}
        case Release():
            # After a swap the replica begins again; its counters and its story go on.
            changes = _BEGIN_AGAIN if replica.intent == "swap" else {"released": True}
        case Swap(story=story):
            changes = {
                "intent": "swap",
                "stopping_at": now,
                "swaps": replica.swaps + 1,
                "story": (*replica.story, story),
            }
        case Quarantine():
            changes = {}
        case Pass():
            changes = {"rehearses": False}
        case Note(changes=changes):
            pass
    after = replica.model_copy(update=changes)
    return record.model_copy(update={"replicas": {**record.replicas, replica.name: after}})


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
    match step:
        case Allocate():
            return {"replica": step.replica, "allocation": step.allocation, "nodes": step.nodes}
        case Assign():
            member = step.assignment.member
            generation = member.generation if member else None
            return {
                "replica": step.replica,
                "node": step.node,
                "goal": step.assignment.goal,
                "revision": step.assignment.revision,
                "generation": generation,
            }
        case Fail():
            evidence: Evidence | None = step.failure.evidence
            return {
                "replica": step.replica,
                "message": step.failure.message,
                "where": step.failure.where,
                "evidence": evidence.model_dump() if evidence else None,
            }
        case Note():
            return {"replica": step.replica, **step.changes}
        case Quarantine():
            return {"replica": step.replica, **step.cordon.model_dump()}
        case Swap():
            return {"replica": step.replica, "story": step.story}
        case _:
            return {"replica": step.replica}
