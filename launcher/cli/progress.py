"""Progress while something is awaited: a live table on a terminal, a line per change elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

from launcher.cli import output, screens
from launcher.status import Status


class Progress:
    """Shows every status given to it; elapsed times count from its beginning."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = time.monotonic()
        self._last_line = ""
        self._live: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                self._title, console=Console(stderr=True), refresh_per_second=4, transient=True
            )
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def update(self, status: Status) -> None:
        elapsed = time.monotonic() - self._began
        if self._live is not None:
            self._live.update(_renderable(self._title, status, elapsed))
            return
        line = screens.progress_line(status)
        if line != self._last_line:
            self._last_line = line
            output.say(f"[{elapsed:6.1f}s] {line}")


def _renderable(title: str, status: Status, elapsed: float) -> Any:
    from rich.text import Text

    now = time.time()
    rows = [["NODE", "REPLICA", "PHASE", "FOR", "WAITING FOR"]]
    for replica in status.replicas:
        for node in replica.nodes:
            rows.append(
                [
                    node.node,
                    replica.name,
                    node.phase,
                    output.ago(node.since, now),
                    node.waiting_for,
                ]
            )
    lines = [f"{title}  {output.span(elapsed)}"]
    if len(rows) > 1:
        lines.append(output.table(rows, "  "))
    lines += [f"  waiting for {reason}" for reason in status.waiting_for[:5]]
    return Text("\n".join(lines), overflow="ellipsis", no_wrap=True)
