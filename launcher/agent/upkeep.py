"""Folders of compile caches between starts: those in use stay, old ones go. I/O, in a thread.

Several agents may look after the same folder, on a file system that they share. Only what carries
our stamp is removed, and no link is followed.
"""

import contextlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from launcher.agent.caches import ENGINES, NOTE, STAMP

KEPT_S = 30 * 24 * 3600.0
LOOK_EVERY_S = 24 * 3600.0
MARK_EVERY_S = 3600.0
_LOOKED = ".looked"  # its time: when somebody looked for old folders
_GONE = ".gone-"
_LEVELS = 3  # versions, GPU type, model


class Upkeep:
    """`scratches`: the temporary folders of the engines of this node, parked ones included."""

    def __init__(self, cache: Path, scratches: Callable[[], Iterable[Path]]) -> None:
        self._cache = cache
        self._scratches = scratches
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="caches", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while True:
            for scratch in self._scratches():
                mark_used(scratch)
            with contextlib.suppress(OSError):  # another time, or never: it is only room
                remove_old(self._cache, time.time())
            if self._ended.wait(MARK_EVERY_S):
                return


def mark_used(scratch: Path) -> None:
    """An engine that runs for weeks writes little into its caches, and reads them no more."""
    with contextlib.suppress(OSError):
        os.utime(Path(os.fsdecode((scratch / NOTE).read_bytes()), STAMP))


def remove_old(cache: Path, now: float) -> list[Path]:
    """Remove what nobody used for a month; once a day, whoever comes first."""
    root = cache / ENGINES
    if root.is_symlink() or not root.is_dir():
        return []
    looked = root / _LOOKED
    if looked.exists() and 0 <= now - looked.stat().st_mtime < LOOK_EVERY_S:
        return []
    looked.touch()
    limit = looked.stat().st_mtime - KEPT_S  # by the clock that stamps the folders, too
    removed = []
    for folder in list(_folders(root, _LEVELS)):
        if folder.name.startswith(_GONE):
            shutil.rmtree(folder, ignore_errors=True)
        elif (used_at := _used_at(folder)) is not None and used_at < limit:
            removed += [folder] if _remove(folder, limit) else []
    return removed


def _remove(folder: Path, limit: float) -> bool:
    gone = folder.with_name(f"{_GONE}{secrets.token_hex(4)}")
    try:
        folder.rename(gone)
    except OSError:
        return False
    used_at = _used_at(gone)
    if used_at is None or used_at >= limit:  # an engine began in it at this very moment
        with contextlib.suppress(OSError):
            gone.rename(folder)
            return False
    shutil.rmtree(gone, ignore_errors=True)
    for above in (folder.parent, folder.parent.parent):
        with contextlib.suppress(OSError):
            above.rmdir()
    return True


def _folders(root: Path, levels: int) -> Iterator[Path]:
    """The folders of ours so many levels below; nothing that a link leads to."""
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                continue
            if levels == 1:
                yield Path(entry.path)
            else:
                yield from _folders(Path(entry.path), levels - 1)


def _used_at(folder: Path) -> float | None:
    """When it was used last; None where it does not carry our stamp."""
    try:
        found = (folder / STAMP).lstat()
    except OSError:
        return None
    is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
    return found.st_mtime if is_ours else None
