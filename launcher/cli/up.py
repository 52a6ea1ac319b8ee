"""`launcher up` and `launcher down`: wish, watch, and say how it went."""

import getpass
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launcher import driving, fleets, freshness
from launcher.cli import events, output, screens
from launcher.cli.progress import Progress
from launcher.context import make_ground
from launcher.errors import DeadlineError
from launcher.paths import FleetPaths
from launcher.specfile import check_model_folder, load
from launcher.status import Status

DOWN_WITHIN_S = 180.0
SETTLED = ("serving", "failed", "stopped")


def up(
    file: Path | None, flags: dict[str, Any], *, wait: bool, foreground: bool, as_json: bool
) -> int:
    """Bring the fleet up and stay until it serves or has failed; in the foreground, to its end."""
    asked_at = _began_at()
    loaded = load(file, flags)
    spec = loaded.spec
    check_model_folder(spec)
    paths = FleetPaths.of(spec.name)
    # A run that is there is joined, also while a host of it is away.
    ground = make_ground(spec, paths, check=not fleets.is_up(paths))
    output.say(screens.plan_screen(ground))
    begun = fleets.begin(spec, ground, drives=foreground, asked_at=asked_at)
    output.say(f"{'joined' if begun.adopted else 'started'} run {begun.wish.run} of {spec.name}")
    if foreground:
        return _drive_here(begun, as_json)
    if not wait:
        status = _first_status(begun)
        _print(status, as_json)
        return 0
    status = _watch_until_settled(begun)
    _print(status, as_json)
    if status.phase == "serving" and not as_json:
        _tell_how_to_use(status, begun.adopted)
    return DeadlineError.exit_code if status.closed else status.exit_code


def down(paths: FleetPaths, *, as_json: bool) -> int:
    """End everything of this fleet and nothing else; harmless when repeated."""
    wish = fleets.end(paths)
    if wish is None:
        output.say(f"{paths.root.name} is down")
        if as_json:
            status = freshness.read_status(paths)
            output.document(status.model_dump(mode="json") if status else {"version": 1})
        return 0
    deadline = time.monotonic() + DOWN_WITHIN_S
    status = None
    with Progress(f"ending {paths.root.name}") as progress:
        for status in fleets.watch(paths, wish):
            if status is not None:
                progress.update(status)
                if status.finished:
                    break
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{paths.root.name} is not down after {DOWN_WITHIN_S:.0f} s",
                    hint="`launcher status` says what it waits for; `launcher down` goes on.",
                )
    left = driving.end(paths)
    if as_json and status is not None:
        output.document(status.model_dump(mode="json"))
    output.say(f"{paths.root.name} is down")
    if left:
        output.say(f"  {left}")
    if status and status.leftover:
        output.say(f"  not ended: {status.leftover}")
    for replica in status.replicas if status else []:
        if replica.leftover:
            output.say(f"  not cleaned: {replica.leftover}")
    return 0


def _drive_here(begun: fleets.Begun, as_json: bool) -> int:
    """Be the controller, and say what happens. Its end by a signal is not the fleet's."""
    from launcher import controller

    path = begun.paths.run(begun.wish.run).journal
    so_far = path.stat().st_size if path.exists() else 0
    threading.Thread(
        target=events.go_on, args=(path, so_far), kwargs={"as_json": as_json}, daemon=True
    ).start()
    code = controller.drive(begun.paths)
    status = freshness.read_status(begun.paths, begun.wish.run)
    if status is None or not status.finished:
        name = begun.paths.root.name
        output.say(
            f"not driven from here any more; the fleet goes on (`launcher down --fleet {name}`)"
        )
        return code or 130
    _print(status, as_json)
    return status.exit_code


def _began_at() -> float:
    """When this command began, its imports included; now, where the system does not tell."""
    try:
        row = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        began_s = int(row.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began_s)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()


def _first_status(begun: fleets.Begun) -> Status:
    for status in fleets.watch(begun.paths, begun.wish, begun.since):
        if status is not None:
            return status
    raise DeadlineError("the controller wrote no status", where=str(begun.paths.status))


def _watch_until_settled(begun: fleets.Begun) -> Status:
    with Progress(f"bringing up {begun.paths.root.name}") as progress:
        for status in fleets.watch(begun.paths, begun.wish, begun.since):
            if status is None:
                continue
            progress.update(status)
            if status.finished or status.phase == "serving":
                return status
    raise DeadlineError("the run ended without a word", where=str(begun.paths.status))


def _print(status: Status, as_json: bool) -> None:
    if as_json:
        output.document(status.model_dump(mode="json"))
    else:
        output.show(screens.fleet_screen(status, time.time()))


def _tell_how_to_use(status: Status, adopted: bool) -> None:
    host, port = (status.endpoint or "").partition("://")[2].removesuffix("/v1").split(":")
    if not adopted:
        output.say(screens.timing_lines(status))
    output.say(f"key:    {status.api_key_file}")
    output.say(
        f"try:    curl {status.endpoint}/chat/completions -H 'Content-Type: application/json' "
        f'-H "Authorization: Bearer $(cat {status.api_key_file})" '
        f'-d \'{{"model": "{status.fleet}", "messages": [{{"role": "user", '
        f'"content": "Hello"}}], "max_tokens": 16}}\''
    )
    if sys.stdout.isatty():
        user, here = getpass.getuser(), socket.gethostname()
        output.say(f"tunnel: ssh -N -L {port}:{host}:{port} {user}@{here}   (on your laptop)")
