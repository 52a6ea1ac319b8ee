"""What engines have mapped in /dev/shm: it is removed when nobody maps it any more. I/O.

Whoever is killed leaves its segments behind, and whose they were can be told only while it lives.
So an agent notes them in its node's folder, for who comes after it when it is killed, too.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

from health.probes.host import boot_id
from launcher.documents import Document
from launcher.errors import StateError
from launcher.files import read_document, write_document

FOLDER = Path("/dev/shm")


class Noted(Document):
    """segments.json: names in /dev/shm with their inodes, in one boot of this node."""

    boot_id: str
    inodes: dict[str, int]


def present() -> frozenset[int]:
    """Inodes of what this user has there now."""
    return frozenset(_own().values())


class Segments:
    """Those of one engine. before: what was there before the agent is another's, mapped or not."""

    def __init__(self, note: Path, before: frozenset[int] = frozenset()) -> None:
        self._note = note
        self._before = before
        self._mapped: set[int] = set()
        self._noted: dict[str, int] = {}

    def look(self, engine: Iterable[psutil.Process]) -> None:
        """What these have mapped by now. The note is written where it has become more."""
        self._mapped |= mapped_by(engine) - self._before
        named = {name: inode for name, inode in _own().items() if inode in self._mapped}
        if named.items() <= self._noted.items():
            return
        with contextlib.suppress(StateError):  # a full disk: at the next look again
            write_document(self._note, Noted(boot_id=boot_id(), inodes=named))
            self._noted = named

    def remove(self) -> None:
        """The engine is over."""
        remove(self._mapped)
        with contextlib.suppress(OSError):
            self._note.unlink()


def mapped_by(processes: Iterable[psutil.Process]) -> set[int]:
    """Inodes of what they have mapped there: theirs to leave behind when killed.

    By inode, for a named semaphore is mapped under the name that it had before it was linked; and
    in our own /dev/shm, for a container may have another, which counts anew.
    """
    found, below = set[int](), f" {FOLDER}/"
    try:
        number = FOLDER.stat().st_dev
    except OSError:
        return found
    device = f"{os.major(number):02x}:{os.minor(number):02x}"
    for process in processes:
        with contextlib.suppress(OSError):
            with open(f"/proc/{process.pid}/maps", encoding="utf-8", errors="replace") as maps:
                for row in maps:  # thousands for an engine: look before splitting
                    if below in row and row.split(maxsplit=5)[3] == device:
                        found.add(int(row.split(maxsplit=5)[4]))
    return found


def noted(note: Path) -> set[int]:
    """Inodes of what an agent has noted, as far as the names still mean what they meant."""
    try:
        found = read_document(note, Noted)
    except StateError:
        return set()
    if found is None or found.boot_id != boot_id():
        return set()
    return set(dict(found.inodes.items() & _own().items()).values())


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
