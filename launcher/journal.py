"""The journal: one line before each act and one after. I/O, append only."""

import json
import time
from pathlib import Path
from typing import Any

from launcher.files import append_line, read_tail


class Journal:
    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **details: Any) -> None:
        """Add an event. Secrets never belong into details."""
        row = {"at": round(time.time(), 3), "event": event, **details}
        append_line(self._path, json.dumps(row, default=str, ensure_ascii=False))


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a journal; lines that were cut off are left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return _parse(text)


def since(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The events from this byte on, as far as they are whole, and where the next one begins."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read()
    except OSError:
        return [], offset
    whole = raw[: raw.rfind(b"\n") + 1]
    return _parse(whole.decode("utf-8", "replace")), offset + len(whole)


def read_end(path: Path, limit_bytes: int) -> list[dict[str, Any]]:
    """The last events, however long the journal is."""
    return _parse(read_tail(path, limit_bytes))


def _parse(text: str) -> list[dict[str, Any]]:
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
