"""What the user wants: written by the CLI, read by the controller. And who drives. I/O."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field

from launcher.documents import Document, Drill
from launcher.errors import StateError, UsageError
from launcher.files import make_private, read_document, write_document
from launcher.paths import FleetPaths
from launcher.record import RunRecord

DRIVER_STALE_S = 10.0
DRILLS_KEPT = 20


class Wish(Document):
    """wish.json: this run, up or down. restarts: how often each replica was asked to restart.

    drills: faults that were asked for; the controller remembers which it took up. asked_at: when
    the command began that made this run.
    """

    run: int
    desired: Literal["up", "down"]
    at: float
    restarts: dict[str, int] = Field(default_factory=dict)
    drills: tuple[Drill, ...] = ()
    asked_at: float | None = None


class Driver(Document):
    """controller.json: which process drives the fleet. `beat` grows while it lives.

    job: the Slurm job that it runs in. ended: it left in order, so nobody need watch its beat.
    """

    host: str
    pid: int
    run: int
    beat: int
    started_at: float
    job: str = ""
    ended: bool = False


def read_wish(paths: FleetPaths) -> Wish | None:
    return read_document(paths.wish, Wish)


def write_wish(
    paths: FleetPaths, run: int, desired: Literal["up", "down"], asked_at: float | None = None
) -> Wish:
    wish = Wish(run=run, desired=desired, at=time.time(), asked_at=asked_at)
    with _changing(paths):
        write_document(paths.wish, wish)
    return wish


def wish_restart(paths: FleetPaths, wish: Wish, replica: str) -> Wish:
    """Ask for one more restart of this replica; the controller counts what it took up. Raises
    UsageError where the run is wished down meanwhile."""

    def once_more(now: Wish) -> Wish:
        return now.model_copy(
            update={"restarts": {**now.restarts, replica: now.restarts.get(replica, 0) + 1}}
        )

    return _add(paths, wish.run, once_more)


def wish_drill(paths: FleetPaths, wish: Wish, drill: Drill) -> Wish:
    """Ask for a fault. Raises UsageError where the run is wished down meanwhile."""

    def one_more(now: Wish) -> Wish:
        return now.model_copy(update={"drills": (*now.drills, drill)[-DRILLS_KEPT:]})

    return _add(paths, wish.run, one_more)


def _add(paths: FleetPaths, run: int, add: Callable[[Wish], Wish]) -> Wish:
    """Add to the wish of a run as it is now: a `down` of the same instant must not be undone."""
    with _changing(paths):
        now = read_wish(paths)
        if now is None or now.run != run or now.desired != "up":
            raise UsageError(
                "the fleet is going down",
                where=paths.root.name,
                hint="`launcher up` starts it again.",
            )
        wish = add(now).model_copy(update={"at": time.time()})
        write_document(paths.wish, wish)
    return wish


@contextlib.contextmanager
def _changing(paths: FleetPaths) -> Iterator[None]:
    """Who changes the wish at the same time waits, and sees the change."""
    make_private(paths.root)
    handle = os.open(paths.wish_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def take_the_wheel(paths: FleetPaths) -> int | None:
    """Become the one controller of this fleet: a lock handle, or None where another one lives."""
    make_private(paths.root)
    handle = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    driver = _read_driver(paths)
    if driver and driver.host != socket.gethostname() and _beats(paths, driver):
        os.close(handle)  # locks do not cross hosts on every file system; its beat does
        return None
    return handle


def is_driven(paths: FleetPaths) -> bool:
    """Whether a controller of this fleet lives."""
    driver = _read_driver(paths)
    if driver is None:
        return _is_locked(paths)
    if driver.host == socket.gethostname():
        return _is_locked(paths)
    return _is_locked(paths) or _beats(paths, driver)


def next_run(paths: FleetPaths) -> int:
    """The number of a new run: one more than any that has left a trace."""
    numbers = [0]
    with contextlib.suppress(OSError):
        numbers += [int(e.name) for e in (paths.root / "runs").iterdir() if e.name.isdecimal()]
    wish = read_wish(paths)
    return max([*numbers, wish.run if wish else 0]) + 1


def read_record(paths: FleetPaths, run: int) -> RunRecord | None:
    return read_document(paths.run(run).record, RunRecord)


def _read_driver(paths: FleetPaths) -> Driver | None:
    try:
        return read_document(paths.controller, Driver)
    except StateError:
        return None


def _is_locked(paths: FleetPaths) -> bool:
    try:
        handle = os.open(paths.lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _beats(paths: FleetPaths, seen: Driver) -> bool:
    """Watch whether the beat of a controller on another host grows."""
    deadline = time.monotonic() + DRIVER_STALE_S
    while time.monotonic() < deadline:
        now = _read_driver(paths)
        if now is None or now.ended:
            return False
        if now.beat != seen.beat:
            return True
        time.sleep(0.5)
    return False
