"""`launcher top`: the fleet, its figures and its last events, again each second."""

import sys
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from launcher import figures, freshness, journal
from launcher.cli import gateway, output, screens
from launcher.cli.events import story
from launcher.cli.meters import Meters
from launcher.figures import Load
from launcher.gateway.documents import State
from launcher.paths import FleetPaths
from launcher.status import Status

EVERY_S = 1.0
EVENTS_SHOWN = 12
JOURNAL_READ_BYTES = 128 * 1024


@dataclass(frozen=True)
class Look:
    """One dated look at a fleet, for a screen or a line of JSON."""

    at: float
    status: Status
    state: State | None
    load: Load
    events: list[dict[str, Any]]


def top(paths: FleetPaths, *, as_json: bool) -> int:
    """Show it until the run is over or somebody stops watching. Changes nothing."""
    meters = Meters()
    with _Screen(as_json=as_json) as screen:
        while True:
            began = time.monotonic()
            look = _look(paths, meters)
            screen.show(look)
            if look.status.finished:
                break
            time.sleep(max(0.0, EVERY_S - (time.monotonic() - began)))
    if not as_json:
        output.say("the run is over")
    return look.status.exit_code


def members_of(status: Status) -> dict[str, str]:
    """What the gateway calls each replica: one in its present generation."""
    return {one.name: f"{one.name}.g{one.generation}" for one in status.replicas if one.generation}


def load_of(paths: FleetPaths, status: Status) -> Load:
    """What the gateway alone tells, at one look."""
    return figures.load(members_of(status), gateway.fresh_state(paths))


def _look(paths: FleetPaths, meters: Meters) -> Look:
    status = freshness.known_status(paths)
    members = members_of(status)
    meters.ask({members[one.name]: one.endpoint for one in status.replicas if one.endpoint})
    state = gateway.fresh_state(paths)
    return Look(
        at=time.time(),
        status=status,
        state=state,
        load=figures.load(members, state, meters.looks()),
        events=journal.read_end(paths.run(status.run).journal, JOURNAL_READ_BYTES),
    )


def screen(look: Look, height: int) -> str:
    """What fits: the fleet first, then as many of its last events as there is room for. Pure."""
    fleet = screens.fleet_screen(look.status, look.at, look.load, with_story=False)
    lines = fleet.splitlines()
    room = min(EVENTS_SHOWN, height - len(lines) - 1)
    told = [(event, words) for event in look.events if (words := story(event))]
    if room > 0 and told:
        lines.append("")
        rows = [
            [f"{output.ago(event.get('at'), look.at)} ago", str(event.get("replica", "")), words]
            for event, words in told[-room:]
        ]
        lines.append(output.table(rows))
    return "\n".join(lines)


def document(look: Look) -> dict[str, Any]:
    """One line of NDJSON."""
    return {
        "version": 1,
        "at": look.at,
        "status": look.status.model_dump(mode="json"),
        "gateway": gateway.described(look.state, look.at) if look.state else None,
        "load": {name: asdict(one) for name, one in look.load.replicas.items()},
        "held": look.load.held,
    }


class _Screen:
    """A live screen on a terminal, a line per change elsewhere, a document per look as JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._live: Any = None
        self._last_line = ""
        self._last: Look | None = None

    def __enter__(self) -> "_Screen":
        if sys.stdout.isatty() and not self._as_json:
            from rich.live import Live

            self._live = Live(screen=True, auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is None:
            return
        self._live.__exit__(kind, error, trace)
        if self._last is not None:  # the screen is gone: what was on it last stays to be read
            output.show(screen(self._last, self._live.console.height))

    def show(self, look: Look) -> None:
        self._last = look
        if self._as_json:
            output.line(document(look))
            return
        if self._live is not None:
            from rich.text import Text

            text = screen(look, self._live.console.height)
            self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)
            return
        line = screens.progress_line(look.status)
        if line != self._last_line:
            self._last_line = line
            output.show(f"{time.strftime('%H:%M:%S', time.localtime(look.at))} {line}")
