"""Processes that outlive whoever started them: known by pid and start, never by name. I/O."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil

from launcher.gateway.documents import Process

_START_SLACK_S = 1.5  # /proc counts in ticks since a boot time that NTP may move


def identity(pid: int) -> Process:
    """The process of this pid, so that it can be told from a later one. Raises psutil.Error."""
    return Process(pid=pid, started_at=psutil.Process(pid).create_time())


def is_alive(process: Process | None) -> bool:
    """Whether this very process still runs. One that has ended is reaped if it is our child."""
    if process is None:
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    try:
        found = psutil.Process(process.pid)
        same = abs(found.create_time() - process.started_at) < _START_SLACK_S
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def tell(process: Process | None, number: signal.Signals) -> bool:
    """Send a signal if it is still this process."""
    if process is None or not is_alive(process):
        return False
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[int]:
    """A log that several processes append to, as a handle for a child."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)
