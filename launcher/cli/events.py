"""`launcher events`: what was done to a fleet and why, from the journal of its run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inventory import nodeset
from launcher import journal
from launcher.cli import output
from launcher.errors import UsageError
from launcher.paths import FleetPaths
from launcher.wish import read_wish

FOLLOW_S = 0.5
_MARKS = {
    "running_at": "its nodes are there",
    "ranked_at": "ranks were given; the engine starts",
    "serving_at": "serves",
}


def events(paths: FleetPaths, *, limit: int, follow: bool, as_json: bool) -> int:
    """The last events, oldest first; then, if asked, each as it comes."""
    wish = read_wish(paths)
    if wish is None:
        raise UsageError(f"{paths.root.name} has no run yet", where="events")
    path = paths.run(wish.run).journal
    found, offset = journal.since(path, 0)
    for event in found[-limit:]:
        _tell(event, as_json=as_json)
    if not found and not as_json:
        output.say("nothing has happened yet")
    if follow:
        go_on(path, offset, as_json=as_json)
    return 0


def go_on(path: Path, offset: int, *, as_json: bool) -> None:
    """Tell what happens from this byte of the journal on, for ever."""
    while True:
        found, offset = journal.since(path, offset)
        for event in found:
            _tell(event, as_json=as_json)
        time.sleep(FOLLOW_S)


def _tell(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        output.line(event)
    elif told := story(event):
        output.show(f"{_clock(event)}  {event.get('replica', '')!s:4}{told}")


def story(event: dict[str, Any]) -> str | None:
    """One event in words; None for what only the next controller needs to know. Pure."""
    name = event.get("event")
    teller = _STORIES.get(str(name))
    return teller(event) if teller else None


def _controller(event: dict[str, Any]) -> str:
    return f"a controller drives the fleet (pid {event.get('pid')} on {event.get('host')})"


def _allocate(event: dict[str, Any]) -> str:
    nodes = event.get("nodes") or []
    where = nodeset.fold(nodes) if nodes else "any that are free"
    return f"asked for nodes: {where} (allocation {event.get('allocation')})"


def _assign(event: dict[str, Any]) -> str | None:
    node, goal = event.get("node"), event.get("goal")
    if event.get("drill"):
        return f"{node} is drilled: {event['drill']}"
    if goal == "rank":
        return f"{node} becomes a rank of generation {event.get('generation')}"
    return f"{node} is told to stop" if goal == "stopped" else None


def _seats(event: dict[str, Any]) -> str | None:
    seats = ", ".join(event.get("seats") or []) or "none"
    return f"{event['story']}; seats: {seats}" if event.get("story") else None


def _note(event: dict[str, Any]) -> str | None:
    told = [words for key, words in _MARKS.items() if event.get(key)]
    return "; ".join(told) or None


def _gateway(event: dict[str, Any]) -> str | None:
    if "start" in event:
        return f"the gateway starts on port {event['start']}"
    if event.get("members"):
        members = ", ".join(f"{name} {goal}" for name, goal in event["members"].items())
        return f"traffic: {members}" + ("" if event.get("open", True) else "; no new requests")
    if "stopped" in event:
        return f"the gateway has ended{_because(event.get('leftover'))}"
    return None


def _release(event: dict[str, Any]) -> str:
    nodes = nodeset.fold(event.get("nodes") or [])
    return f"{event.get('allocation')} is given back" + (f" ({nodes})" if nodes else "")


def _because(reason: object) -> str:
    return f": {reason}" if reason else ""


_STORIES: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "controller": _controller,
    "allocate": _allocate,
    "assign": _assign,
    "note": _note,
    "gateway": _gateway,
    "endpoint": lambda event: f"the address is {event.get('endpoint')}",
    "fail": lambda event: f"given up: {event.get('where') or ''} {event.get('message')}".strip(),
    "interrupt": lambda event: f"this generation ended: {event.get('message')}",
    "sit": _seats,
    "revive": lambda _: "is brought up again",
    "close": lambda event: f"the fleet ends: {event.get('reason')}",
    "end": lambda event: f"{event.get('allocation')} goes back: {event.get('reason')}",
    "quarantine": lambda event: f"{event.get('node')} is cordoned: {event.get('reason')}",
    "down": lambda _: "is to end",
    "release": _release,
    "failed": lambda event: f"{event.get('step')} did not work: {event.get('error')}",
    "told": lambda event: f"the {event.get('receiver')} was told: {event.get('about')}",
    "refused": lambda event: f"a plan was refused: {'; '.join(event.get('problems') or [])}",
}


def _clock(event: dict[str, Any]) -> str:
    at = event.get("at")
    return time.strftime(
        "%m-%d %H:%M:%S", time.localtime(at if isinstance(at, int | float) else 0)
    )
