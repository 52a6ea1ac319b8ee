"""Faults on order, for `launcher drill`: what a user's own process can do to its node. I/O.

Each ends by itself: a frozen engine goes on after a while, a full disk is free again at once when
we are no more, for the file that fills it has no name.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import psutil

from launcher.agent import processes
from launcher.agent.engine import Engine
from launcher.drilling import DISK_LEFT_BYTES, DISK_S, HANG_S

_IN_MEMORY = ("tmpfs", "ramfs")


def inject(kind: str, engine: Engine, mark: str) -> None:
    """Do it now. A node's death does not return."""
    match kind:
        case "rank":
            _tell(kind, f"kill {kill_rank(engine)}")
        case "node":
            die(mark)
        case "hang":
            frozen = engine_processes(engine.reaper)
            _tell(kind, f"stop {len(frozen)} processes for {HANG_S:.0f} s")
            freeze(frozen, HANG_S)
        case "disk":
            arguments = (engine.scratch, threading.Event())
            threading.Thread(target=fill, args=arguments, daemon=True).start()
        case _:
            _tell(kind, "unknown to this version; nothing is done")


def kill_rank(engine: Engine) -> str:
    """Kill the command that was started last: the API server, a rank, or Ray's worker."""
    name, pid = list(engine.pids.items())[-1] if engine.pids else ("nothing", 0)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return f"{name} ({pid})"


def die(mark: str) -> None:
    """Everything of this node at once and without a word, as by loss of power."""
    everything = [*processes.descendants(), *processes.marked(mark, below=True)]
    processes.kill_all(everything)
    os.kill(os.getpid(), signal.SIGKILL)


def engine_processes(reaper: processes.Reaper) -> list[psutil.Process]:
    """What runs below us, daemonised or not, but for our own probes (and what they started)
    and what is parked for later."""
    below = reaper.descendants()
    probes = {_session(one) for one in below if "health.collect" in _words(one)}
    return [one for one in below if _session(one) not in probes]


def freeze(frozen: list[psutil.Process], for_s: float) -> threading.Timer:
    """Stop them; whoever is still there after a while goes on."""
    _signal(frozen, signal.SIGSTOP)
    timer = threading.Timer(for_s, _signal, (frozen, signal.SIGCONT))
    timer.daemon = True
    timer.start()
    return timer


def fill(folder: Path, over: threading.Event, for_s: float = DISK_S) -> int:
    """Take what is free in the file system of this folder but for a rest, then give it back; how
    many bytes that were. Not where that is memory: the node would be short of it, not of disk."""
    if _file_system(folder) in _IN_MEMORY:
        _tell("disk", f"{folder} lies in memory; nothing is done")
        return 0
    size = shutil.disk_usage(folder).free - DISK_LEFT_BYTES
    if size <= 0:
        _tell("disk", f"{folder} is full already")
        return 0
    _tell("disk", f"take {size} bytes below {folder} for {for_s:.0f} s")
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:  # somebody else took the rest: as full as it gets
            _tell("disk", error.strerror or "cannot be filled")
        over.wait(for_s)
    return size


def _file_system(folder: Path) -> str:
    """Its kind, by the mount that is nearest above the folder."""
    path = str(folder.resolve())
    mounts = {one.mountpoint: one.fstype for one in psutil.disk_partitions(all=True)}
    above = [point for point in mounts if point == "/" or f"{path}/".startswith(f"{point}/")]
    return mounts[max(above, key=len)] if above else ""


def _signal(targets: list[psutil.Process], number: int) -> None:
    for process in targets:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:
        return 0


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _tell(kind: str, what: str) -> None:
    sys.stderr.write(f"drill {kind}: {what}\n")
    sys.stderr.flush()
