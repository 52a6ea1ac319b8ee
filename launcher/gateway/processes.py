"""Processes that outlive whoever started them: known by pid and start, never by name. I/O."""

import asyncio
import contextlib
import functools
import os
import resource
import signal
from pathlib import Path

from launcher.gateway.documents import Process

DESCRIPTORS = 65_536


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _stat(pid: int) -> tuple[str, int]:
    """State and start of a process, in ticks since boot: no clock that can be set moves them.
    Raises OSError where there is none (proc(5), fields 3 and 22)."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def identity(pid: int) -> Process:
    """The process of this pid, so that it can be told from a later one. Raises OSError."""
    return Process(pid=pid, started_ticks=_stat(pid)[1], boot_id=_boot_id())


def is_alive(process: Process | None) -> bool:
    """Whether this very process still runs. One that has ended is reaped if it is our child."""
    if process is None or process.boot_id != _boot_id():
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    try:
        state, started_ticks = _stat(process.pid)
    except OSError:
        return False
    return started_ticks == process.started_ticks and state not in "ZX"


def tell(process: Process | None, number: signal.Signals) -> bool:
    """Send a signal if it is still this process."""
    if process is None or not is_alive(process):
        return False
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


class DeathWatch:
    """Sets an event when a process ends, also one that somebody else started."""

    def __init__(self, woken: asyncio.Event) -> None:
        self._woken = woken
        self._handles: dict[int, int] = {}

    def watch(self, pids: set[int]) -> None:
        """These from now on, and no others."""
        loop = asyncio.get_running_loop()
        for pid in self._handles.keys() - pids:
            handle = self._handles.pop(pid)
            loop.remove_reader(handle)
            os.close(handle)
        for pid in pids - self._handles.keys():
            with contextlib.suppress(OSError):
                handle = os.pidfd_open(pid)
                self._handles[pid] = handle
                loop.add_reader(handle, self._note, pid)

    def _note(self, pid: int) -> None:
        asyncio.get_running_loop().remove_reader(self._handles[pid])  # it stays readable
        self._woken.set()


def raise_descriptor_limit() -> None:
    """As many open files as we may have: each request takes two, and many shells give 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
