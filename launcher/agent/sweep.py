"""Remove what an allocation left on this machine: by its mark, never by a name. I/O."""

import os
import shutil
import time
from pathlib import Path

import psutil

from launcher.agent.processes import (
    MARK_VARIABLE,
    SCRATCH_MARK,
    is_below,
    kill_all,
    remove_segments,
    scratch_root,
    segments_of,
)

GONE_WITHIN_S = 5.0


def sweep(mark: str) -> int:
    """Kill every process of this user whose mark is `mark` or lies below; returns how many.

    Shared-memory segments that they had mapped and the scratch folders they ran in go, too.
    """
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.uids().real != os.getuid():
                continue
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if is_below(environment.get(MARK_VARIABLE, ""), mark):
            found.append(process)
    segments = segments_of(found)
    kill_all(found)
    deadline = time.monotonic() + GONE_WITHIN_S
    psutil.wait_procs(found, timeout=max(0.0, deadline - time.monotonic()))
    remove_segments(segments)
    for folder in scratch_root().glob(f"fl-{os.getuid()}-*"):
        if is_below(_mark_of(folder), mark):
            shutil.rmtree(folder, ignore_errors=True)
    return len(found)


def _mark_of(folder: Path) -> str:
    try:
        return (folder / SCRATCH_MARK).read_text(encoding="utf-8")
    except OSError:
        return ""
