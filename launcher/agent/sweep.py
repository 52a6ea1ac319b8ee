"""Remove what an allocation left on this machine: by its mark, never by a name. I/O."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import psutil

from launcher.agent import segments
from launcher.agent.processes import SCRATCH_MARK, is_below, kill_all, marked, scratch_root
from launcher.paths import NodePaths

GONE_WITHIN_S = 5.0


def sweep(mark: str, nodes: Iterable[NodePaths] = ()) -> int:
    """Kill every process of this user whose mark is `mark` or lies below; returns how many.

    Shared-memory segments that they had mapped and the scratch folders they ran in go, too, and
    what agents of these nodes had noted before they were killed with their engines.
    """
    found = marked(mark, below=True)
    left = segments.mapped_by(found)
    kill_all(found)
    psutil.wait_procs(found, timeout=GONE_WITHIN_S)
    segments.remove(left.union(*(segments.noted(node.segments) for node in nodes)))
    for folder in scratch_root().glob(f"fl-{os.getuid()}-*"):
        if is_below(_mark_of(folder), mark):
            shutil.rmtree(folder, ignore_errors=True)
    return len(found)


def _mark_of(folder: Path) -> str:
    try:
        return (folder / SCRATCH_MARK).read_text(encoding="utf-8")
    except OSError:
        return ""
