"""Processes that the agent starts: each in a group of its own, all of them findable, all killable.

The agent is a sub-reaper: whatever an engine daemonises stays below it. Beside that every process
carries our mark in its environment, by which a later agent finds what an earlier one left. Nothing
is ever killed by its name.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Collection
from pathlib import Path

import psutil

from launcher.files import open_log

MARK_VARIABLE = "LAUNCHER_MARK"
SCRATCH_MARK = ".mark"
_SHORT_ROOT = 16
_REST_WITHIN_S = 1.0
# What an engine starts to compile a kernel; by these names we only look, and end nobody.
_COMPILERS = {
    *("ptxas", "cicc", "nvcc", "cudafe++", "nvlink", "fatbinary", "ninja", "cc1", "cc1plus"),
    *("gcc", "g++", "cc", "c++", "as", "ld", "collect2", "clang", "clang++", "lld", "ld.lld"),
    *("hipcc", "amdclang++", "icpx", "ocloc"),
}
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def _rest(child: subprocess.Popen[bytes]) -> bytes:
    """What a killed child has said; whoever left its group may hold its output for ever."""
    try:
        return child.communicate(timeout=_REST_WITHIN_S)[0]
    except subprocess.TimeoutExpired as late:
        for stream in filter(None, (child.stdin, child.stdout)):
            with contextlib.suppress(OSError):
                stream.close()
        child.poll()
        return late.output or b""


def become_subreaper() -> None:
    """Orphans below us become our children instead of those of PID 1."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Reaper:
    """Starts children and collects every one that ended, adopted ones included."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: dict[int, subprocess.Popen[bytes]] = {}
        self.reserved: set[int] = set()  # children that outlive the engine beside them

    def start(
        self, arguments: list[str], environment: dict[str, str], log: Path, folder: Path
    ) -> subprocess.Popen[bytes]:
        """Start a child in a session of its own, its output appended to `log` (mode 0600)."""
        with open_log(log) as output:
            streams = (subprocess.DEVNULL, output, output)
            return self._spawn(arguments, environment, streams, folder)

    def run(
        self,
        arguments: list[str],
        environment: dict[str, str],
        timeout_s: float,
        question: bytes = b"",
    ) -> tuple[int, str]:
        """Run a short child to its end; (exit code, output), 124 when it was killed for time."""
        code, output = self.run_bytes(arguments, environment, timeout_s, question)
        return code, output[-65_536:].decode("utf-8", "replace")

    def run_bytes(
        self,
        arguments: list[str],
        environment: dict[str, str],
        timeout_s: float,
        question: bytes = b"",
    ) -> tuple[int, bytes]:
        """The same with all of the output, as it is."""
        with self._lock:
            child = subprocess.Popen(
                arguments,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._own[child.pid] = child
        try:
            output, _ = child.communicate(question, timeout=timeout_s)
            code = child.returncode
        except subprocess.TimeoutExpired:
            signal_group(child.pid, signal.SIGKILL)
            output, code = _rest(child), 124
        finally:
            self._own.pop(child.pid, None)
        return code, output

    def park(
        self, arguments: list[str], environment: dict[str, str], log: Path, folder: Path
    ) -> subprocess.Popen[bytes]:
        """Start a child as `start` does, that hears us on its input and answers on its output,
        and is spared when an engine ends. Its answers are read without waiting."""
        with open_log(log) as errors:
            streams = (subprocess.PIPE, subprocess.PIPE, errors)
            child = self._spawn(arguments, environment, streams, folder)
        self.reserved.add(child.pid)
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        return child

    def converse(
        self, arguments: list[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a child that reads lines from us and answers by lines; it dies with us."""
        streams = (subprocess.PIPE, subprocess.PIPE, subprocess.DEVNULL)
        return self._spawn(arguments, environment, streams)

    def _spawn(
        self,
        arguments: list[str],
        environment: dict[str, str],
        streams: tuple[int, int, int],
        folder: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """A child that dies with us; `streams` are its input, its output and its errors."""
        with self._lock:
            child = subprocess.Popen(
                arguments,
                env=environment,
                cwd=folder,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - calls prctl, nothing else
            )
            self._own[child.pid] = child
        return child

    def descendants(self) -> list[psutil.Process]:
        """Everything below us that an engine's end takes along: all but what is reserved."""
        spared: set[int] = set()
        for pid in tuple(self.reserved):
            with contextlib.suppress(psutil.Error):
                reserved = psutil.Process(pid)
                spared |= {pid, *(child.pid for child in reserved.children(recursive=True))}
        return [process for process in descendants() if process.pid not in spared]

    def below(self, own: Collection[int]) -> list[psutil.Process]:
        """What runs below us: these children and every orphan, with all of theirs; no helper."""
        with self._lock:
            helpers = set(self._own).difference(own)
        found = []
        for child in psutil.Process().children():
            if child.pid not in helpers:
                with contextlib.suppress(psutil.Error):
                    found += [child, *child.children(recursive=True)]
        return [one for one in found if _status(one) not in (None, psutil.STATUS_ZOMBIE)]

    def collect_adopted(self) -> None:
        """Reap zombies that were handed to us when their parents died."""
        with self._lock:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error, ChildProcessError):
                    if child.pid not in self._own and child.status() == psutil.STATUS_ZOMBIE:
                        os.waitpid(child.pid, os.WNOHANG)

    def forget(self, pid: int) -> None:
        self._own.pop(pid, None)


def scratch_root() -> Path:
    """Where engines get their short temporary folders: TMPDIR if it is short enough, else /tmp."""
    named = os.environ.get("TMPDIR", "/tmp")
    return Path(named if len(named) <= _SHORT_ROOT else "/tmp")


def signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def descendants() -> list[psutil.Process]:
    """Everything below this process that still runs."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if _status(process) not in (None, psutil.STATUS_ZOMBIE)
    ]


def compiles() -> bool:
    """Whether a compiler runs below this process."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{process.pid}/comm").read_text(encoding="utf-8", errors="replace")
            if name.strip() in _COMPILERS:
                return True
    return False


def marked(mark: str, *, below: bool = False) -> list[psutil.Process]:
    """Processes of this user that carry this mark (or one below it), but for ourselves and our
    ancestors."""
    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid in spared:
            continue
        try:
            if process.uids().real == os.getuid():
                its = process.environ().get(MARK_VARIABLE, "")
                if is_below(its, mark) if below else its == mark:
                    found.append(process)
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or not ours to read
    return found


def is_below(found: str, mark: str) -> bool:
    """Whether a mark is this one, or of something that this one's owner started."""
    return found == mark or found.startswith(f"{mark}/")


def hold_all(processes: list[psutil.Process]) -> None:
    """Stop them where they are; they are to be killed."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.suspend()


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _status(process: psutil.Process) -> str | None:
    try:
        return str(process.status())
    except psutil.Error:
        return None
