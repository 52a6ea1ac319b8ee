"""What engines have mapped in /dev/shm: it is removed when nobody maps it any more. I/O.

Whoever is killed leaves its segments behind, and whose they were can be told only while it lives.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

FOLDER = Path("/dev/shm")


def mapped_by(processes: Iterable[psutil.Process]) -> set[int]:
    """Inodes of what they have mapped there: theirs to leave behind when killed.

    By inode, for a named semaphore is mapped under the name that it had before it was linked.
    """
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            with open(f"/proc/{process.pid}/maps", encoding="utf-8", errors="replace") as maps:
                for row in maps:  # thousands for an engine: look before splitting
                    if f" {FOLDER}/" in row:
                        found.add(int(row.split(maxsplit=5)[4]))
    return found


def remove(inodes: set[int]) -> list[str]:
    """Remove those that are ours and that nobody maps any more; which these were."""
    owned = {name: inode for name, inode in _own().items() if inode in inodes}
    if not owned:
        return []
    still_mapped = mapped_by(psutil.process_iter())
    removed = []
    for name, inode in owned.items():
        if inode not in still_mapped:
            with contextlib.suppress(OSError):
                (FOLDER / name).unlink()
                removed.append(name)
    return removed


def _own() -> dict[str, int]:
    """Names and inodes of what belongs to this user."""
    found = {}
    try:
        paths = list(FOLDER.iterdir())
    except OSError:
        return {}
    for path in paths:
        with contextlib.suppress(OSError):
            stat = path.lstat()
            if stat.st_uid == os.getuid():
                found[path.name] = stat.st_ino
    return found
