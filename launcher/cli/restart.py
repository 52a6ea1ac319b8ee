"""`launcher restart REPLICA`: wish it, watch until the next generation serves."""

import time

from launcher import fleets
from launcher.cli import output, screens
from launcher.cli.progress import Progress
from launcher.errors import DeadlineError, UsageError
from launcher.paths import FleetPaths
from launcher.status import ReplicaStatus, Status
from launcher.wish import Wish, read_record, read_wish, wish_restart


def restart(paths: FleetPaths, replica: str, *, wait: bool, as_json: bool) -> int:
    """Restart it and stay until it serves again or was given up. The others go on meanwhile."""
    wish = _wanted_up(paths)
    names = _names(paths, wish)
    if replica not in names:
        raise UsageError(
            f"there is no replica {replica}",
            where=paths.root.name,
            hint=f"Its replicas: {', '.join(names)}.",
        )
    began = time.monotonic()
    wish = wish_restart(paths, wish, replica)
    since = fleets.ensure_driven(paths, wish)
    output.say(f"{replica} of {paths.root.name} is to restart")
    status = _watch(paths, wish, replica, since, wait=wait)
    its = _of(status, replica)
    if as_json:
        output.document(status.model_dump(mode="json"))
    else:
        output.show(screens.fleet_screen(status, time.time()))
    if not wait:
        return 0
    if its is not None and its.phase == "serving":
        took_s = time.monotonic() - began
        output.say(f"{replica} serves in generation {its.generation}, after {took_s:.1f} s")
        return 0
    failure = its.failure if its else None
    return failure.exit_code if failure else status.exit_code or 1


def _wanted_up(paths: FleetPaths) -> Wish:
    wish = read_wish(paths)
    if wish is None or not fleets.is_up(paths):
        raise UsageError(
            "the fleet is not up, so no replica of it can be restarted",
            where=paths.root.name,
            hint="`launcher up` starts it again.",
        )
    return wish


def _names(paths: FleetPaths, wish: Wish) -> list[str]:
    record = read_record(paths, wish.run)
    if record is not None:
        return list(record.replicas)
    # Its controller has not begun: it will make these.
    return [f"r{number}" for number in range(1, fleets.spec_of(paths, wish.run).replicas + 1)]


def _watch(paths: FleetPaths, wish: Wish, replica: str, since: float, *, wait: bool) -> Status:
    """The status in which it is settled; the first one where nobody waits for that."""
    with Progress(f"restarting {replica} of {paths.root.name}") as progress:
        for status in fleets.watch(paths, wish, since):
            if status is None:
                continue
            if not wait:
                return status
            progress.update(status)
            if status.finished or _is_settled(_of(status, replica), wish.restarts[replica]):
                return status
    raise DeadlineError("the run ended without a word", where=str(paths.status))


def _is_settled(its: ReplicaStatus | None, asked: int) -> bool:
    """Whether what was asked has been taken up, and has come to an end."""
    if its is None or its.restarts_asked < asked:
        return False
    return its.phase in ("serving", "failed", "stopped")


def _of(status: Status, replica: str) -> ReplicaStatus | None:
    return next((one for one in status.replicas if one.name == replica), None)
