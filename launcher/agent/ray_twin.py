"""The twin of a parked process: Ray's processes are forked from it, with all imports done.

It lives as long as the parked process, also when that one has become the engine. Ray starts an
interpreter for each worker and helper; there ray_hook.py hands words, environment and output over
to us, and stays in its place. Where something in its environment differs that imports may have
read, it starts plainly. Runs inside the engine's environment, by the standard library alone.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "ray-twin"  # in ps and top
_PR_SET_PDEATHSIG = 1
_ORDER_MAX_BYTES = 4 << 20
_ORDER_WITHIN_S = 5.0
_GRACE_S = 5.0
_OURS = ("LAUNCHER_", "RAY_")
_PIDFD_OPEN = 434  # on every machine
_PIDS = "/proc/self/ns/pid"
_WORKER = "/ray/_private/workers/default_worker.py"
# What Ray's library reads once, when it is imported: the job of a worker, and the process with
# which a worker ends. A cluster of ours has one job, and a worker of ours ends with our parent.
_FIRST_JOB = "01000000"
_BY_INPUT = "RAY_enable_pipe_based_agent_to_parent_health_check"  # see ray_hook.py
# What Ray loads into its helpers: it handles memory otherwise, and nothing else.
_ALLOCATOR = "/ray/core/libjemalloc.so"
# The last two are of Ray's own making: how it writes titles, and see _take_over.
_HARMLESS = {"_", "SHLVL", "PWD", "OLDPWD", "SPT_NOENV", "OMP_NUM_THREADS"}


def foresee() -> None:
    """Before imports: set what Ray's library is going to read."""
    os.environ.update(RAY_JOB_ID=_FIRST_JOB, RAY_RAYLET_PID=str(os.getpid()), **{_BY_INPUT: "1"})


def forget() -> None:
    """After imports: nobody but workers and a raylet's agents has these."""
    for name in ("RAY_JOB_ID", "RAY_RAYLET_PID", _BY_INPUT):
        os.environ.pop(name, None)


@dataclass(frozen=True)
class Own:
    """What the parked process lends. files: those of its own, to be closed. call: how a process
    names itself. wake: what is done once when work comes. stale: why it is too old to be used."""

    files: tuple[int, ...]
    call: Callable[[str], None]
    wake: Callable[[], None]
    stale: Callable[[], str]


def leave(folder: Path, before: Mapping[str, str], late: set[str], own: Own) -> list[str] | None:
    """Fork the twin, which listens in this folder. Back with None in the parked process, and with
    its words in each process of Ray, which has taken over everything else already. Raises OSError
    where there can be no twin.

    before: the environment before all imports. late: variables that are read at a start.
    """
    os.close(_pidfd(os.getpid()))  # a kernel before 5.3 has none
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / "twin"
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen(64)
    parent = os.getpid()
    if os.fork():
        listening.close()
        return None
    _die_with(parent)
    for file in own.files:
        os.close(file)
    own.call(NAME)
    variables = Variables(before, dict(os.environ), late)
    return Twin(listening, variables, folder / "workers", own).run()


@dataclass(frozen=True)
class Variables:
    """What our imports may have read, and what they made of it: some set variables. Pure."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    late: set[str]

    def refused(self, theirs: Mapping[str, str]) -> list[str]:
        """Variables of a worker that our imports did not see as they are there."""
        if theirs.get("RAY_JOB_ID", _FIRST_JOB) != _FIRST_JOB:
            return ["RAY_JOB_ID"]
        return [
            name
            for name in sorted({*self.before, *self.after, *theirs} - self.late - _HARMLESS)
            if not name.startswith(_OURS)
            and theirs.get(name) not in (self.before.get(name), self.after.get(name))
            and not (name == "LD_PRELOAD" and theirs.get(name, "").endswith(_ALLOCATOR))
        ]

    def completed(self, theirs: Mapping[str, str]) -> dict[str, str]:
        """Theirs, with what imports would have set there."""
        names = {*self.before, *self.after} - self.late - _HARMLESS
        made = {n for n in names if self.before.get(n) != self.after.get(n)}
        untouched = {n for n in made if theirs.get(n) == self.before.get(n)}
        put = {n: self.after[n] for n in untouched if n in self.after}
        return {n: v for n, v in theirs.items() if n not in untouched} | put


class Twin:
    """Answers until whoever made it ends. What it forked has its hook's connection and a pidfd."""

    def __init__(
        self,
        listening: socket.socket,
        variables: Variables,
        record: Path,
        own: Own,
    ) -> None:
        self._pid = os.getpid()
        self._own = own
        self._is_awake = False
        self._listening = listening
        self._variables = variables
        self._record = record
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ, self._accept)
        self._hooks: dict[int, socket.socket] = {}  # by the pid of what was forked for it
        self._pidfds: dict[int, int] = {}
        self._kill_at: dict[int, float] = {}

    def run(self) -> list[str]:
        """Comes back only in what was forked, with its words."""
        while True:
            for key, _ in self._selector.select(1.0):
                words: list[str] | None = key.data()
                if words:
                    return words
            now = time.monotonic()
            for pid in [pid for pid, at in self._kill_at.items() if now >= at]:
                del self._kill_at[pid]
                _signal(pid, signal.SIGKILL)

    def _accept(self) -> list[str] | None:
        """Answer one hook; its words in the process that was forked for it."""
        hook, _ = self._listening.accept()
        if not self._is_awake:
            self._own.wake()
            self._is_awake = True
        pid, files = -1, list[int]()
        order: dict[str, Any] = {}
        why = ""
        try:
            hook.settimeout(_ORDER_WITHIN_S)
            order = _received(hook, files)
            why = self._refusal(order) or _not_agreed(hook)
            pid = -1 if why else os.fork()
        except (OSError, ValueError, KeyError) as error:
            why = f"{type(error).__name__}: {error}"
        if pid == 0:
            return self._become(order, files, hook)
        if order.get("words", [""])[0].endswith(_WORKER):
            self._note(why)
        for file in files:
            os.close(file)
        if pid < 0:
            hook.close()
        else:
            self._watch(pid, hook)
        return None

    def _watch(self, pid: int, hook: socket.socket) -> None:
        try:
            pidfd = _pidfd(pid)
        except OSError:  # no file is left: the hook ends, and says by its code that it failed
            _signal(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            hook.close()
            return
        self._hooks[pid], self._pidfds[pid] = hook, pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._ended(pid))
        self._selector.register(hook, selectors.EVENT_READ, lambda: self._told(pid))

    def _ended(self, pid: int) -> None:
        """It is over: its hook ends the same way."""
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._kill_at.pop(pid, None)
        self._selector.unregister(self._pidfds[pid])
        os.close(self._pidfds.pop(pid))
        hook = self._hooks.pop(pid)
        with contextlib.suppress(KeyError):
            self._selector.unregister(hook)
        with contextlib.suppress(OSError):
            hook.sendall(bytes([code if code >= 0 else 128 - code]))
        hook.close()

    def _told(self, pid: int) -> None:
        """A signal that the hook was sent; or its end, and whoever ended it meant the other."""
        if pid not in self._hooks:  # both ended at once
            return
        with contextlib.suppress(OSError):
            if numbers := self._hooks[pid].recv(16):
                for number in numbers:
                    _signal(pid, number)
                return
        self._selector.unregister(self._hooks[pid])
        self._kill_at[pid] = time.monotonic() + _GRACE_S
        _signal(pid, signal.SIGTERM)

    def _become(self, order: dict[str, Any], files: list[int], hook: socket.socket) -> list[str]:
        """In the child: be what Ray would have started."""
        _die_with(self._pid)
        os.setsid()
        for one in (self._listening, hook, *self._hooks.values()):
            one.close()
        self._selector.close()
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return _take_over(order, self._variables.completed(order["environment"]))

    def _refusal(self, order: dict[str, Any]) -> str:
        """Why it has to start plainly, if it has to."""
        words = order["words"]
        if refused := self._variables.refused(order["environment"]):
            return f"{', '.join(refused[:3])} changed since it was parked"
        if order["pids"] != os.readlink(_PIDS):  # noqa: PTH115 - no file, a name
            return "its process ids are those of another container"
        if words[0].endswith(_WORKER) and not any(w.startswith("--worker-id=") for w in words):
            return (
                "this Ray lets workers draw their ids, and those of one twin would draw the same"
            )
        return self._own.stale()

    def _note(self, reason: str) -> None:
        """How a worker came to be, for the report."""
        line = json.dumps({"started": "plain" if reason else "parked", "reason": reason})
        with contextlib.suppress(OSError), self._record.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _received(hook: socket.socket, files: list[int]) -> dict[str, Any]:
    """The order; its output is put into `files`, also where the order is broken."""
    text, found, _, _ = socket.recv_fds(hook, 1 << 16, 3)
    files += found
    while not text.endswith(b"\n"):
        part = hook.recv(1 << 16)
        if not part or len(text) > _ORDER_MAX_BYTES:
            raise ValueError("no whole order")
        text += part
    if len(files) != 3:
        raise ValueError("an order without its output")
    order: dict[str, Any] = json.loads(text)
    return order


def _not_agreed(hook: socket.socket) -> str:
    """Whether it still waits for us, and will. Else it is the worker itself by now; there must not
    be two."""
    said = b""
    with contextlib.suppress(OSError):
        hook.sendall(b"+")
        said = hook.recv(1)
    return "" if said == b"!" else "it was not answered in time"


def _pidfd(pid: int) -> int:
    """As os.pidfd_open, which many builds of Python lack. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (file := libc.syscall(_PIDFD_OPEN, pid, 0)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_open: {os.strerror(number)}")
    return int(file)


def _take_over(order: dict[str, Any], environment: dict[str, str]) -> list[str]:
    before = {*sys.path, *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    # Ray has told the kernel whom to kill first when memory is short: not the one in its place.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(order["oom_score_adj"], encoding="ascii")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(order["folder"])
    words: list[str] = order["words"]
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    hook = f"{os.environ.get('LAUNCHER_TMP', '')}/ray"
    sys.path[1:1] = [one for one in added if one and one not in before and one != hook]
    sys.path[0] = str(Path(words[0]).parent)
    # Ray gives a worker one thread before it imports anything; that variable is read by imports.
    if torch := sys.modules.get("torch"):
        threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        torch.set_num_threads(int(threads) if threads.isdecimal() else 1)
    return words


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
