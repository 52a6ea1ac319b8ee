"""What the CLI does to a fleet: begin a run, wish it up or down, watch its status. I/O."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher import controller_job, driving, secretstore
from launcher.context import Ground
from launcher.errors import FleetError, PreflightError, SpecError, StateError, UsageError
from launcher.files import make_private, read_document, read_tail, write_document
from launcher.freshness import read_status
from launcher.gateway.door import Gateway
from launcher.gateway.owner import check_port_is_free
from launcher.paths import RUNS_KEPT, FleetPaths, state_root
from launcher.spec import FleetSpec, differences
from launcher.status import Status
from launcher.wish import (
    Driver,
    Wish,
    is_driven,
    next_run,
    read_wish,
    write_wish,
)

CONTROLLER_STARTS_MAX = 3
CONTROLLER_APPEARS_S = 8.0
WATCH_S = 0.2


@dataclass(frozen=True)
class Begun:
    """A run that is being brought up: ours, or one that was already there."""

    paths: FleetPaths
    wish: Wish
    adopted: bool
    since: float = 0.0  # an older status was left by a controller that is no more


def begin(
    spec: FleetSpec, ground: Ground, *, drives: bool = False, asked_at: float | None = None
) -> Begun:
    """Bring a fleet up, or join the run that already does. Raises before anything is started.

    drives: the caller becomes its controller; no other one is started. asked_at: when the command
    began, from which a new run counts.
    """
    paths = FleetPaths.of(spec.name)
    make_private(paths.root)
    current = read_wish(paths)
    start = _check_driverless if drives else ensure_driven
    if current and is_driven(paths) and (current.desired == "down" or _closes(paths, current)):
        wait_until_over(paths, current, spec.limits.drain + 60)
    if current and current.desired == "up" and not _is_over(paths, current):
        running = read_document(paths.run(current.run).spec, FleetSpec)
        changed = differences(running, spec) if running else []
        if changed:
            raise UsageError(
                f"fleet {spec.name} runs with another spec ({'; '.join(changed)})",
                where="up",
                hint=f"`launcher down --fleet {spec.name}` first, then up again.",
            )
        if running != spec:  # the keys that may change while it runs
            secretstore.provide_changed(spec, paths.secrets)
            write_document(paths.run(current.run).spec, spec)
        return Begun(paths, current, adopted=True, since=start(paths, current))
    ground.backend.close()
    check_address(spec, paths)
    controller_job.check(spec)
    run = next_run(paths)
    secretstore.provide(spec, paths.secrets)
    make_private(paths.run(run).root)
    write_document(paths.run(run).spec, spec)
    wish = write_wish(paths, run, "up", asked_at)
    since = start(paths, wish)
    _rotate(paths, run)
    return Begun(paths, wish, adopted=False, since=since)


def check_address(spec: FleetSpec, paths: FleetPaths) -> None:
    """Refuse a port that somebody else has, or a certificate that is not there, before anything
    is started. Raises PreflightError and SpecError."""
    for file in (spec.gateway.tls.certificate, spec.gateway.tls.key) if spec.gateway.tls else ():
        if not os.access(file, os.R_OK):
            raise SpecError("cannot be read", where=f"gateway.tls: {file}")
    if spec.controller_job:
        return  # nobody knows yet where it will listen
    if spec.port is None or Gateway(paths.gateway).is_supervised():
        return
    host = "127.0.0.1" if spec.backend.kind == "local" else "0.0.0.0"
    try:
        check_port_is_free(host, spec.port)
    except FleetError as error:
        raise PreflightError(error.message, where="port", hint=error.hint) from error


def is_up(paths: FleetPaths) -> bool:
    """Whether there is a run that `up` would join."""
    current = read_wish(paths)
    return current is not None and current.desired == "up" and not _is_over(paths, current)


def end(paths: FleetPaths) -> Wish | None:
    """Wish the fleet down; None where nothing is left to end."""
    current = read_wish(paths)
    if current is None or (_is_over(paths, current) and not is_driven(paths)):
        driving.withdraw(paths)
        return None
    wish = write_wish(paths, current.run, "down")
    driving.withdraw(paths)
    ensure_driven(paths, wish)
    return wish


def ensure_driven(paths: FleetPaths, wish: Wish) -> float:
    """Start a controller unless one lives; from when on its statuses count (0: all of them)."""
    if is_driven(paths):
        return 0.0
    now = time.time()
    driving.start(paths, wish)
    return now


def _check_driverless(paths: FleetPaths, wish: Wish) -> float:
    if is_driven(paths):
        driver = read_document(paths.controller, Driver)
        who = f" (pid {driver.pid} on {driver.host})" if driver else ""
        raise UsageError(
            f"run {wish.run} has a controller already{who}",
            where="--foreground",
            hint="Leave --foreground out to watch it, or end that process first.",
        )
    return time.time()


def watch(paths: FleetPaths, wish: Wish, since: float = 0.0) -> Iterator[Status | None]:
    """The run's status again and again (none older than `since`); a dead controller is replaced.

    Ends when the run is over. Raises StateError when no controller stays alive.
    """
    starts, quiet_since = 0, time.monotonic()
    absence = driving.Absence(paths, wish)
    while True:
        status = read_status(paths, wish.run)
        if status is not None and status.updated_at < since:
            status = None
        yield absence.tell(status)
        if status is not None and status.finished:
            return
        if is_driven(paths):
            absence.forget()
            quiet_since = time.monotonic()
            time.sleep(WATCH_S)
            continue
        absence.look()
        patience_s = max(2.0 if status else CONTROLLER_APPEARS_S, absence.patience_s)
        if absence.must_wait():
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since > patience_s:
            starts += 1
            if starts > CONTROLLER_STARTS_MAX:
                raise StateError(
                    "the controller does not stay alive: "
                    + (
                        read_tail(paths.run(wish.run).controller_log)[-600:].strip() or "no output"
                    ),
                    where=str(paths.run(wish.run).controller_log),
                )
            driving.start(paths, wish)
            quiet_since = time.monotonic()
        time.sleep(WATCH_S)


def wait_until_over(paths: FleetPaths, wish: Wish, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for status in watch(paths, wish):
        if status is not None and status.finished:
            return
        if time.monotonic() > deadline:
            raise UsageError(
                f"run {wish.run} is still going down",
                where=str(paths.root),
                hint="`launcher status` says what it waits for.",
            )


def all_fleets() -> list[FleetPaths]:
    try:
        folders = sorted(state_root().iterdir())
    except OSError:
        return []
    return [FleetPaths(folder) for folder in folders if (folder / "wish.json").is_file()]


def find(name: str | None, spec_name: str | None) -> FleetPaths:
    """The fleet that a command is about. Raises UsageError with the choice there is."""
    chosen = name or spec_name
    fleets = {paths.root.name: paths for paths in all_fleets()}
    if chosen:
        if chosen not in fleets:
            known = ", ".join(fleets) or "none"
            raise UsageError(
                f"there is no fleet {chosen}", where="--fleet", hint=f"Known fleets: {known}."
            )
        return fleets[chosen]
    if len(fleets) == 1:
        return next(iter(fleets.values()))
    if not fleets:
        raise UsageError("there is no fleet yet", hint="`launcher up` makes one.")
    raise UsageError("which fleet?", where="--fleet", hint=f"One of {', '.join(fleets)}.")


def spec_of(paths: FleetPaths, run: int) -> FleetSpec:
    spec = read_document(paths.run(run).spec, FleetSpec)
    if spec is None:
        raise StateError("is not there", where=str(paths.run(run).spec))
    return spec


def _is_over(paths: FleetPaths, wish: Wish) -> bool:
    status = read_status(paths, wish.run)
    return status is not None and status.finished


def _closes(paths: FleetPaths, wish: Wish) -> bool:
    """Whether the run is ending by itself."""
    status = read_status(paths, wish.run)
    return status is not None and bool(status.closed)


def _rotate(paths: FleetPaths, newest: int) -> None:
    """Keep the last few runs; older ones are over and only hold logs."""
    runs: Path = paths.root / "runs"
    for folder in runs.iterdir():
        if folder.name.isdecimal() and int(folder.name) <= newest - RUNS_KEPT:
            shutil.rmtree(folder, ignore_errors=True)
