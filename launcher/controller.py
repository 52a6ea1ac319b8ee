"""The controller: `python -m launcher.controller FLEET_FOLDER`, started in the background by `up`.

    observe (I/O) → Snapshot → plan (pure) → check (pure) → journal (I/O) → apply (I/O) → again

It may be killed at any instant: the next one reads the record, looks at the world, and goes on.
"""

import logging
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

from launcher.apply import Executor
from launcher.context import make_ground, read_secrets
from launcher.errors import FleetError, SlurmError, StateError
from launcher.files import make_private, read_document, write_document
from launcher.heartbeat import HURRIED_PERIOD_S, PERIOD_S
from launcher.herald import Herald
from launcher.journal import Journal
from launcher.loop import Loop
from launcher.observe import Observer, RealClock
from launcher.paths import FleetPaths
from launcher.planning import new_record
from launcher.pulse import Pulse
from launcher.record import RunRecord
from launcher.snapshot import Snapshot
from launcher.spec import FleetSpec
from launcher.status import Status, bare_status, make_status
from launcher.steps import Plan
from launcher.store import DiskStore
from launcher.traffic import Traffic
from launcher.verdicts import replica_phase
from launcher.wheel import LostWheelError, Wheel
from launcher.wish import Wish, read_record, read_wish, take_the_wheel

# Until ranks are given every wait of ours delays the engine; afterwards the engine is waited for.
ACTED_TURN_S = 0.05  # what a step brought about is looked at soon
STARTING_TURN_S = 0.15
BUSY_TURN_S = 0.5
CALM_TURN_S = 1.0
STATUS_EVERY_S = 5.0
TRY_AGAIN_S = 2.0

log = logging.getLogger("launcher.controller")


class Controller:
    """One run of one fleet, from the first round to the last."""

    def __init__(self, paths: FleetPaths, wish: Wish, wheel: Wheel) -> None:
        self.paths = paths
        self.wish = wish
        self._wheel = wheel
        self.run_paths = paths.run(wish.run)
        spec = read_document(self.run_paths.spec, FleetSpec)
        if spec is None:
            raise StateError("is not there", where=str(self.run_paths.spec))
        self.spec = spec
        self.journal = Journal(self.run_paths.journal)
        self._herald = Herald(paths, wish.run, self.journal)
        self._last_status: Status | None = None
        self._acted = False
        self._known: tuple[str, ...] = ()
        self._leftover = ""

    def run(self) -> None:
        """Rounds until the run is over, or until we are told to end (the fleet goes on)."""
        self._wheel.hold()
        self.journal.write("controller", pid=os.getpid(), host=socket.gethostname())
        ground = make_ground(self.spec, self.paths, check=False)
        record = read_record(self.paths, self.wish.run)
        if record is None:
            before = read_record(self.paths, self.wish.run - 1)
            asked_at = self.wish.asked_at
            record = new_record(ground.context, self.wish.run, before, time.time(), asked_at)
        store = DiskStore(self.run_paths, ground.backend.kind)
        executor = Executor(ground, record, store)
        traffic = Traffic(self.paths, self.spec, self.run_paths.spec, self.journal)
        self._known = ground.context.known
        pulse = Pulse(read_secrets(self.paths.secrets)["agent_token"].encode())
        pulse.woken = woken = self._wheel.woken
        pulse.start()
        observer = Observer(ground.backend, pulse, RealClock(record.seen_at))
        loop = Loop(ground.context, observer, executor, store, ground.allocation)
        try:
            while not self._wheel.told_to_end.is_set():
                if self._round(loop, executor, traffic):
                    break
                pulse.period_s = PERIOD_S if self._is_calm() else HURRIED_PERIOD_S
                woken.wait(self._turn_s(executor.record))
                woken.clear()
        finally:
            pulse.stop()
            self._herald.close()
            ground.backend.close()

    def _round(self, loop: Loop, executor: Executor, traffic: Traffic) -> bool:
        """One turn of the loop; True when nothing is left to do, ever."""
        self._wheel.hold()
        wish = read_wish(self.paths)
        if wish is not None and wish.run == self.wish.run:
            self.wish = wish
        self._follow_spec(loop)
        snapshot = loop.look(self.wish, traffic.look(executor.record))
        traffic.give_orders(executor.record, snapshot)  # before anything is stopped
        plan = loop.plan(snapshot)
        self._remember_endpoint(executor, snapshot)
        loop.apply(plan, snapshot)
        if plan.finished:
            self._leftover = traffic.stop()
        self._write_status(executor.record, snapshot, plan)
        self._acted = bool(plan.steps)
        return plan.finished

    def _follow_spec(self, loop: Loop) -> None:
        """Some keys may change while the fleet runs: `up` writes them into the run's spec."""
        try:
            spec = read_document(self.run_paths.spec, FleetSpec)
        except StateError as error:  # what was read last goes on to count
            log.error("%s", error)
            return
        if spec is not None and spec != self.spec:
            self.spec = spec
            loop.context = replace(loop.context, spec=spec)

    def _turn_s(self, record: RunRecord) -> float:
        if self._acted:
            return ACTED_TURN_S
        if self._is_calm():
            return CALM_TURN_S
        waiting = any(r.seats and not r.ranked_at and not r.over for r in record.replicas.values())
        return STARTING_TURN_S if waiting else BUSY_TURN_S

    def _is_calm(self) -> bool:
        return self._last_status is not None and self._last_status.phase == "serving"

    def _remember_endpoint(self, executor: Executor, snapshot: Snapshot) -> None:
        """The fleet's address is the gateway's, told once a replica serves behind it."""
        gateway = snapshot.gateway
        if not gateway.is_up or executor.record.endpoint == gateway.address:
            return
        serving = (
            name
            for name, replica in executor.record.replicas.items()
            if replica_phase(replica, snapshot) == "serving"
        )
        if any(gateway.requests.get(name) is not None for name in serving):
            executor.set_endpoint(gateway.address)

    def _write_status(self, record: RunRecord, snapshot: Snapshot, plan: Plan) -> None:
        status = make_status(
            fleet=self.spec.name,
            model=self.spec.model,
            backend=self.spec.backend.kind,
            api_key_file=str(self.paths.api_key),
            record=record,
            snapshot=snapshot,
            waiting_for=plan.waiting_for,
            finished=plan.finished,
            known=self._known,
            leftover=self._leftover,
            ttl_s=self.spec.limits.ttl,
        )
        if place := self._wheel.place:
            words = f"running in Slurm job {place.job} on {place.node}"
            status = status.model_copy(update={"controller": words})
        status = self._herald.look(status)
        last = self._last_status
        fresh = last is not None and status.updated_at - last.updated_at < STATUS_EVERY_S
        if fresh and last is not None:
            if status.model_copy(update={"updated_at": last.updated_at}) == last:
                return
        write_document(self.paths.status, status)
        self._last_status = status


def write_failed_status(paths: FleetPaths, wish: Wish, error: FleetError) -> None:
    """The run cannot even begin: say so where `up` and `status` look."""
    status = bare_status(
        fleet=paths.root.name,
        run=wish.run,
        desired=wish.desired,
        spec=read_document(paths.run(wish.run).spec, FleetSpec),
        api_key_file=str(paths.api_key),
        now=time.time(),
        error=error,
    )
    write_document(paths.status, status)


def drive(paths: FleetPaths) -> int:
    """Drive the fleet until its run is over, or until a signal ends us; the exit code."""
    make_private(paths.root)
    handle = take_the_wheel(paths)
    if handle is None:
        print("another controller drives this fleet", file=sys.stderr)
        return 0
    wish = read_wish(paths)
    if wish is None:
        print("nothing is wished for", file=sys.stderr)
        return 1
    make_private(paths.run(wish.run).root)
    wheel = Wheel(paths, wish.run)
    code = 0
    while not wheel.told_to_end.is_set():
        try:
            Controller(paths, wish, wheel).run()
            break
        except LostWheelError as error:
            log.error("%s", error)
            return 0
        except StateError as error:
            # A full or hanging state folder: serving goes on without us; try again.
            log.error("%s", error)
            if not paths.root.is_dir():
                return 1
        except FleetError as error:
            log.error("%s", error)
            if not _is_away(error) or read_record(paths, wish.run) is None:
                write_failed_status(paths, wish, error)
                code = error.exit_code
                break
            # What runs goes on; it is adopted when Slurm answers again.
        wheel.told_to_end.wait(TRY_AGAIN_S)
    wheel.leave()
    return code


def _is_away(error: FleetError) -> bool:
    return isinstance(error, SlurmError) and error.unreachable


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("paramiko").setLevel(logging.WARNING)
    return drive(FleetPaths(Path(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
