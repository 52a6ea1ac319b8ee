"""What the commands print: one JSON document on stdout, what people read on stderr."""

import json
import os
import sys
import tempfile
import time
import traceback
from typing import Any

from inventory.errors import FleetError


def say(text: str = "") -> None:
    """A line for a person."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """The result itself, for a person, on stdout."""
    print(text, flush=True)


def document(content: dict[str, Any]) -> None:
    """The one JSON document of a command."""
    print(json.dumps(content, indent=1, ensure_ascii=False), flush=True)


def line(content: dict[str, Any]) -> None:
    """One of many JSON documents, on a line of its own, for what follows or watches."""
    print(json.dumps(content, ensure_ascii=False), flush=True)


def error_of(error: FleetError) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": error.message,
        "where": error.where,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }


def complain(error: FleetError) -> None:
    """One paragraph: what was wrong, where, what to do."""
    where = f"{error.where}: " if error.where else ""
    say(f"launcher: {where}{error.message}")
    if error.hint:
        say(f"  {error.hint}")


def table(rows: list[list[str]], indent: str = "") -> str:
    """Columns as wide as their widest cell; numbers stay where they are."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(indent + line for line in lines)


def ago(at: float | None, now: float | None = None) -> str:
    """12s, 4m03s, 6h12m or 3d04h since then."""
    if at is None:
        return "-"
    return span((time.time() if now is None else now) - at)


def span(seconds: float) -> str:
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def size(count: int) -> str:
    """812 B, 12.1 MiB or 131.4 GiB."""
    for unit, name in ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def write_crash() -> str:
    """The present traceback in a file, for a report; where it lies."""
    handle, name = tempfile.mkstemp(prefix="launcher-crash-", suffix=".txt", text=True)
    with os.fdopen(handle, "w") as file:
        traceback.print_exc(file=file)
    return name
