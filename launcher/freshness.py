"""What the status on disk is worth: who wrote it may be silent, or no more. I/O."""

import shutil
import time
from pathlib import Path

from launcher import driving
from launcher.errors import UsageError
from launcher.files import read_document
from launcher.gateway.door import FRESH_S, Gateway
from launcher.paths import FleetPaths
from launcher.status import Status
from launcher.wish import is_driven, read_wish

SILENT_AFTER_S = 30.0  # it writes at least each 5 s
FULL_BYTES = 1024 * 1024
STALE_S = 60.0  # a controller that takes over from a lost host has the lock before it drives


def read_status(paths: FleetPaths, run: int | None = None) -> Status | None:
    """The newest status; None where there is none (of this run)."""
    status = read_document(paths.status, Status)
    return status if status and (run is None or status.run == run) else None


def current_status(paths: FleetPaths) -> Status | None:
    """The newest status, told apart by whether somebody still drives the fleet."""
    status, wish = read_status(paths), read_wish(paths)
    its = status if wish is None or (status and status.run == wish.run) else None
    if wish is None or (its and its.finished):
        return status
    is_lively = is_driven(paths)
    if is_lively and its is not None and _age_s(paths.status) < STALE_S:
        return _with_doubt(paths, its)
    absence = driving.Absence(paths, wish)
    absence.look()
    told = absence.tell(its)
    if told is not None and told is not its:
        return _as_reachable(paths, told)
    if status is None or status.finished:
        return status
    if is_lively:
        return _with_doubt(paths, status)
    status = _as_reachable(paths, status)
    seen = time.strftime("%H:%M:%S", time.localtime(status.updated_at))
    last = f" ({absence.last})" if absence.last else ""
    return status.model_copy(
        update={
            "controller": f"not running since {seen}{last}",
            "waiting_for": [
                *status.waiting_for,
                f"a controller (last seen {seen}); `launcher up` starts one and adopts the fleet",
            ],
        }
    )


def known_status(paths: FleetPaths) -> Status:
    """The same. Raises UsageError where there is none yet."""
    status = current_status(paths)
    if status is None:
        raise UsageError(
            f"{paths.root.name} has no status yet",
            where=str(paths.status),
            hint="Its controller is starting; try again in a moment.",
        )
    return status


def _age_s(file: Path) -> float:
    """By the file, not by what it says: the clock of who wrote it may be another one."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return float("inf")


def _with_doubt(paths: FleetPaths, status: Status) -> Status:
    """Say that a status is old though a controller lives: it waits for the disk, or for a tool."""
    written_s = _age_s(paths.status)
    if written_s < SILENT_AFTER_S:
        return status
    try:
        is_full = shutil.disk_usage(paths.root).free < FULL_BYTES
    except OSError:
        is_full = False
    why = f"{paths.root} is full" if is_full else "its controller.log says more"
    silent = f"silent for {written_s:.0f} s"
    waits = [*status.waiting_for, f"the controller, {silent}: {why}; what serves goes on"]
    return status.model_copy(update={"controller": silent, "waiting_for": waits})


def _as_reachable(paths: FleetPaths, status: Status) -> Status:
    """What a controller that is no more said last, with what became of the gateway since: it ends
    with the Slurm job that it runs in."""
    state = Gateway(paths.gateway).state()
    is_up = state is not None and state.front == "up" and _age_s(paths.gateway.state) < FRESH_S
    if status.phase != "serving" or is_up:
        return status
    silent = f"the gateway, which says nothing ({status.endpoint})"
    return status.model_copy(
        update={"phase": "degraded", "waiting_for": [*status.waiting_for, silent]}
    )
