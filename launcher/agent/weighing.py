"""How much of a model's weights is on this node's disk and in its page cache. Reads no weights.

A program by itself, on the standard library alone: a file system may hang below it, so it is asked
by a line of JSON on stdin, says all that it knows so far by each line on stdout, and can be ended
at any time. A value that cannot be known is None, with the reason.
"""

import contextlib
import ctypes
import fnmatch
import itertools
import json
import mmap
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As vLLM takes them: the first of these that there is, and no other.
PATTERNS = ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.gguf", "*.pt")
# Beside weights in *.bin and *.pt, and of no use to an engine.
_OF_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_SHARD = re.compile(r"(.*)-\d+-of-(\d+)\.\w+\Z")
NAMES_MAX, FILES_MAX = 100_000, 10_000
WINDOW_BYTES = 1024**3
_CACHESTAT = 451
# An overlay's own file has no pages: they belong to the file below it, which only mmap reaches.
_NO_CACHESTAT = ("overlay",)
_OWN_CACHE = ("zfs", "gpfs")  # what was read is in the ARC, in the pagepool
_MOUNTS = Path("/proc/self/mountinfo")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class UnknownError(Exception):
    """Why something cannot be known."""


@dataclass(frozen=True)
class File:
    """One file of weights. occupied_bytes is less than its size where it has holes."""

    path: str
    size: int
    occupied_bytes: int


def main() -> None:
    os.nice(19)
    question = json.loads(sys.stdin.readline())
    try:
        for found in weigh(**question):
            _tell(found)
    except (UnknownError, OSError) as error:
        _tell({"reason": _said(error)})


def weigh(model: str, revision: str = "", download_folder: str = "") -> Iterator[dict[str, Any]]:
    """What is there, then how much of it is cached. Raises UnknownError where nothing is."""
    folder = model if model.startswith("/") else in_hub_cache(model, revision, download_folder)
    every = _names(folder)
    names, missing = weight_names(every)
    if len(every) == NAMES_MAX:
        missing = _joined(missing, f"only the first {NAMES_MAX} names")
    files, unread = _files(os.path.join(folder, name) for name in names)  # noqa: PTH118
    if not files:
        raise UnknownError(unread or f"no weights in {folder}")
    kinds = sorted({file_system_of(file.path) for file in files})
    found = {
        "folder": folder,
        "total_bytes": sum(file.size for file in files),
        "disk_bytes": sum(_on_disk(file, kinds) for file in files),
        "file_system": ", ".join(filter(None, kinds)),
        "missing": _joined(unread, missing),
    }
    yield found
    try:
        cached = sum(cached_bytes(file.path, kinds) for file in files)
    except (UnknownError, OSError) as error:
        yield {**found, "reason": _said(error)}
    else:
        yield {**found, "page_cache_bytes": cached}


def in_hub_cache(model: str, revision: str, download_folder: str) -> str:
    """The snapshot of a hub id, where huggingface_hub looks for it."""
    environment = os.environ
    home = environment.get("HF_HOME") or (
        os.path.join(environment.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")  # noqa: PTH118
    )
    cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    named = download_folder or cache or f"{home}/hub"
    hub = Path(os.path.expandvars(os.path.expanduser(named)))  # noqa: PTH111
    repository = hub / f"models--{model.replace('/', '--')}"
    wanted = revision or "main"
    commit = wanted
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        commit = (repository / "refs" / wanted).read_text("utf-8", "replace").strip()
    folder = repository / "snapshots" / commit
    if not folder.is_dir():
        of = f" of revision {revision}" if revision else ""
        raise UnknownError(f"no snapshot{of} in {repository}")
    return str(folder)


def weight_names(names: Iterable[str]) -> tuple[list[str], str]:
    """Those that an engine would read, and what is missing between them, in words. Pure."""
    every = sorted(name for name in names if name not in _OF_TRAINING)
    for pattern in PATTERNS:
        if taken := [name for name in every if fnmatch.fnmatchcase(name, pattern)]:
            return taken[:FILES_MAX], _missing(taken)
    return [], ""


def _missing(names: list[str]) -> str:
    sets: dict[tuple[str, int], int] = {}
    for name in names:
        if match := _SHARD.match(name):
            key = (match[1], int(match[2]))
            sets[key] = sets.get(key, 0) + 1
    wanted, there = sum(number for _, number in sets), sum(sets.values())
    return _joined(
        f"{wanted - there} of {wanted} files are missing" if there < wanted else "",
        f"only the first {FILES_MAX} files" if len(names) > FILES_MAX else "",
    )


def _names(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in itertools.islice(entries, NAMES_MAX)]


def _files(paths: Iterable[str]) -> tuple[list[File], str]:
    """Every file once, however many names it has; and why others could not be looked at."""
    files: dict[tuple[int, int], File] = {}
    unread = []
    for path in paths:
        try:
            seen = os.stat(path)  # noqa: PTH116
        except OSError as error:
            unread.append(_said(error))
            continue
        if stat.S_ISREG(seen.st_mode):
            file = File(path, seen.st_size, min(seen.st_size, seen.st_blocks * 512))
            files[seen.st_dev, seen.st_ino] = file
    more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
    return list(files.values()), f"{unread[0]}{more}" if unread else ""


def _on_disk(file: File, kinds: list[str]) -> int:
    """Some file systems of users' daemons do not count blocks."""
    counts = file.occupied_bytes or not any(kind.startswith("fuse") for kind in kinds)
    return file.occupied_bytes if counts else file.size


def file_system_of(path: str, mounts: Path = _MOUNTS) -> str:
    """The type of the mount that holds this file; the newest, where several lie on each other."""
    real = os.path.realpath(path)
    longest, kind = "", ""
    with contextlib.suppress(OSError):
        for row in mounts.read_bytes().splitlines():
            head, _, tail = os.fsdecode(row).partition(" - ")
            place = _unescaped(head.split(" ")[4])
            below = real == place or real.startswith(f"{place.rstrip('/')}/")
            if below and len(place) >= len(longest):
                longest, kind = place, tail.split(" ")[0]
    return kind


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)


def cached_bytes(path: str, kinds: list[str]) -> int:
    """How much of a file is in the page cache. Raises UnknownError where nobody tells us."""
    for kind in kinds:
        if kind in _OWN_CACHE:
            raise UnknownError(f"{kind} has a cache of its own")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        pages = None if set(kinds) & set(_NO_CACHESTAT) else _by_cachestat(handle)
        if pages is None:
            if not _is_told_the_truth(handle, path):
                raise UnknownError("the kernel tells it only to who owns or may write the files")
            pages = _by_mincore(handle, size)
        return min(size, pages * mmap.PAGESIZE)
    finally:
        os.close(handle)


def _by_cachestat(handle: int) -> int | None:
    """Pages in the cache (Linux 6.5 and later), to the file's end; None where it does not say."""
    whole = (ctypes.c_uint64 * 2)(0, 0)
    told = (ctypes.c_uint64 * 5)()
    failed = _libc.syscall(_CACHESTAT, handle, ctypes.byref(whole), ctypes.byref(told), 0)
    return None if failed else int(told[0])


def _is_told_the_truth(handle: int, path: str) -> bool:
    """Since Linux 5.2 mincore says to others that all pages are there."""
    if os.fstat(handle).st_uid == os.geteuid():
        return True
    return os.access(path, os.W_OK, effective_ids=True)


def _by_mincore(handle: int, size: int) -> int:
    """The same by a mapping of which nothing is touched: 35 ns for a page."""
    pages = 0
    for offset in range(0, size, WINDOW_BYTES):
        length = min(WINDOW_BYTES, size - offset)
        place = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, handle, offset)
        if place in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        flags = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        try:
            if _libc.mincore(place, length, flags):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            _libc.munmap(place, length)
        pages += len(flags) - flags.raw.count(b"\0")
    return pages


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


def _tell(found: dict[str, Any]) -> None:
    """One line; a file's name may hold anything, and comes onto screens and into documents."""
    plain = {
        key: "".join(one if one.isprintable() else "?" for one in value)
        if isinstance(value, str)
        else value
        for key, value in found.items()
    }
    os.write(1, json.dumps(plain).encode() + b"\n")


if __name__ == "__main__":
    main()
