"""The parked engine process of a node: made, watched, handed to an engine, ended. I/O.

It is a help and never a condition: whatever goes wrong with it, the engine starts plainly, and the
report says why. All is done in the agent's own turns, for the kernel ends a child when the thread
that started it ends; only the question to the start script has a thread.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.agent import handover, memory, processes
from launcher.agent.handover import Told
from launcher.agent.processes import SCRATCH_MARK, Reaper
from launcher.agent.surroundings import Surroundings, scratch_folder
from launcher.documents import Park, Parked
from launcher.errors import StateError
from launcher.files import make_private, read_tail, write_text

READY_WITHIN_S = 180.0  # 15 s where the files are in memory; a cold shared file system takes long
TELL_WITHIN_S = 30.0  # environment modules, before the script knows what it would start
TAKE_WITHIN_S = 5.0
LOOK_EVERY_S = 5.0
AGAIN_AFTER_S = 60.0
_WAIT_S = 0.3  # for what mostly takes some milliseconds: the turn goes on meanwhile
_ORDER_MAX_BYTES = 60_000  # what a pipe takes without a reader


@dataclass
class _Process:
    child: subprocess.Popen[bytes]
    scratch: Path
    mark: str
    made_at: float
    is_ready: bool = False
    is_taken: bool = False
    output: bytes = b""
    told: Told | None = None  # the environment that it was parked in
    claimed: bool = False  # an engine works in its scratch folder
    asked_at: float | None = None
    sent_at: float | None = None
    question: threading.Thread | None = None
    answer: Told | str = ""


@dataclass(frozen=True)
class Start:
    """What an engine wants to start: its script, as it would be run plainly."""

    script: Path
    environment: dict[str, str]
    log: Path
    folder: Path
    wait_s: float


@dataclass(frozen=True)
class Adopted:
    """A process that became the engine; its mark lies below that of the node."""

    child: subprocess.Popen[bytes]
    mark: str


@dataclass
class Parking:
    """At most one parked process. `parked` is for the report; None where none is wanted."""

    reaper: Reaper
    around: Callable[[], Surroundings]
    available_bytes: Callable[[], int] = memory.available_bytes
    parked: Parked | None = None
    _order: Park | None = None
    _process: _Process | None = None
    _is_refused: bool = False  # it failed in a way that will not change
    _again_at: float = 0.0
    _looked_at: float = 0.0
    _count: int = 0
    _reason: str = field(default="")

    def want(self, order: Park | None) -> None:
        """What the assignment says; another order is another process."""
        if order == self._order:
            return
        self._order, self._is_refused, self._again_at = order, False, 0.0
        if self._process and not self._process.claimed:
            self._drop("")
        self.parked = None

    def turn(self, now: float, *, idle: bool, serving: bool) -> None:
        """Look once. idle: no engine is on the node; serving: one is, and has time."""
        process = self._process
        if process is None:
            if (
                self._order
                and (idle or serving)
                and not self._is_refused
                and now >= self._again_at
            ):
                self._make(self._order, now, quietly=serving)
            return
        self._listen(process)
        if self._process is None:
            return
        if process.child.poll() is not None:
            self._lost(process, now)
        elif not process.is_ready and now - process.made_at > READY_WITHIN_S:
            self._refuse(f"its imports took longer than {READY_WITHIN_S:.0f} s")
        elif not process.claimed and now - self._looked_at > LOOK_EVERY_S:
            self._looked_at = now
            left = self.available_bytes()
            if left < memory.TO_KEEP_BYTES:
                self._again_at = now + AGAIN_AFTER_S
                self._drop(f"the node is short of memory ({_gib(left)} left)")

    def claim(self) -> Path | None:
        """An engine begins: it works in the folder that the parked process knows already."""
        if self._process is None:
            return None
        self._process.claimed = True
        return self._process.scratch

    def start(self, wanted: Start, now: float) -> Adopted | str | None:
        """The process as the engine's, None while that is not known, or why to start plainly."""
        process = self._process
        if process is not None:
            self._listen(process)
        if process is None or self._process is None or not process.claimed:
            return self._reason or "no process was parked"
        if process.asked_at is None:
            process.asked_at = now
            process.question = threading.Thread(
                target=self._ask, args=(process, wanted), name="tell", daemon=True
            )
            process.question.start()
        if process.sent_at is not None:
            return self._taken(process, now)
        if not process.is_ready:
            if now - process.asked_at > wanted.wait_s:
                return self._drop(
                    f"its imports were not done {wanted.wait_s:.0f} s after the order"
                )
            return None
        assert process.question is not None
        process.question.join(_WAIT_S)
        return None if process.question.is_alive() else self._send(process, wanted, now)

    def release(self) -> None:
        """The engine is over; a process that it did not take has lost its folder."""
        if self._process and self._process.claimed:
            self._drop("the engine ended before it was taken")

    def end(self) -> None:
        """Nothing is parked any more, and nothing will be."""
        self.want(None)
        if self._process:
            self._drop("")

    @property
    def waiting_for(self) -> str:
        process = self._process
        if process is None or process.asked_at is None:
            return ""
        return "the engine's imports" if not process.is_ready else "the parked engine process"

    def _make(self, order: Park, now: float, *, quietly: bool) -> None:
        self._again_at = now + AGAIN_AFTER_S
        left = self.available_bytes()
        if left < memory.TO_PARK_BYTES:
            need = _gib(memory.TO_PARK_BYTES)
            self._tell_none(f"too little memory: {_gib(left)} left, {need} needed")
            return
        around = self.around()
        self._count += 1
        mark = f"{around.mark}/parked{self._count}"
        scratch = scratch_folder(mark, "parked")
        environment = {
            **around.environment_in(scratch),
            **around.secrets_of(order.secret_environment),
            "LAUNCHER_MARK": mark,
            **({"LAUNCHER_PARK_QUIETLY": "1"} if quietly else {}),
        }
        try:
            write_text(make_private(scratch) / SCRATCH_MARK, mark)
            make_private(around.cache)
            script = make_private(around.logs.parent / "engine") / "park.sh"
            write_text(script, order.script, mode=0o700)
            words = ["/bin/bash", str(script)]
            child = self.reaper.park(words, environment, around.logs / "park.log", scratch)
        except (OSError, StateError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            self._tell_none(f"cannot start: {error}")
            return
        self._process = _Process(child, scratch, mark, now)
        self.parked = Parked(state="importing", since=time.time())

    def _listen(self, process: _Process) -> None:
        """Read what it has said until now."""
        assert process.child.stdout is not None
        with contextlib.suppress(OSError):
            while part := os.read(process.child.stdout.fileno(), 1 << 16):
                process.output += part
        if process.told is None:
            if (found := handover.split_told(process.output)) is None:
                return
            process.told, process.output = found
        *lines, process.output = process.output.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                self._hear(process, json.loads(line))

    def _hear(self, process: _Process, message: dict[str, str]) -> None:
        match message.get("state"):
            case "unfit":
                self._refuse(message.get("reason", "unfit"))
            case "ready":
                process.is_ready = True
                took = round(time.monotonic() - process.made_at, 2)
                missing = ", ".join(message.get("missing") or ())
                reason = f"could not import {missing}" if missing else ""
                self.parked = Parked(
                    state="ready", since=time.time(), took_s=took, reason=reason[:500]
                )
            case "taken":
                process.is_taken = True

    def _ask(self, process: _Process, wanted: Start) -> None:
        """In a thread: let the start script tell what it would start."""
        environment = {**wanted.environment, "LAUNCHER_TELL": "1"}
        words = ["/bin/bash", str(wanted.script)]
        try:
            code, output = self.reaper.run_bytes(words, environment, TELL_WITHIN_S)
        except OSError as error:
            process.answer = f"its start script did not run: {error.strerror}"
            return
        found = handover.split_told(output)
        said = output[-300:].decode("utf-8", "replace").strip() if found is None else ""
        process.answer = found[0] if found else f"its start script ended with code {code}: {said}"

    def _send(self, process: _Process, wanted: Start, now: float) -> Adopted | str | None:
        told = process.answer
        if isinstance(told, str):
            return self._refuse(told)
        assert process.told is not None
        found = handover.change(process.told.environment, told.environment)
        if why := handover.refusal(found):
            return self._refuse(why)  # the next one would know no better
        order = handover.order(told, found, str(wanted.folder), str(wanted.log))
        if len(order) > _ORDER_MAX_BYTES:
            return self._drop("its order is too long for a pipe")
        assert process.child.stdin is not None
        try:
            process.child.stdin.write(order)
            process.child.stdin.flush()
        except OSError:
            return self._drop("it ended before its order came")
        process.sent_at = now
        assert process.child.stdout is not None
        select.select([process.child.stdout], [], [], _WAIT_S)
        return self._taken(process, now)

    def _taken(self, process: _Process, now: float) -> Adopted | str | None:
        self._listen(process)
        if not process.is_taken:
            assert process.sent_at is not None
            if process.child.poll() is None and now - process.sent_at < TAKE_WITHIN_S:
                return None
            return self._drop("it did not take its order")
        self._process = None
        self._again_at = 0.0
        self.reaper.reserved.discard(process.child.pid)
        _close(process.child)
        self._tell_none("")
        return Adopted(process.child, process.mark)

    def _lost(self, process: _Process, now: float) -> None:
        code = process.child.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if process.is_ready:
            self._again_at = now + AGAIN_AFTER_S
            self._drop(f"it {how}")
        else:
            lines = read_tail(self.around().logs / "park.log", 2000).strip().splitlines()
            self._refuse(f"it {how}" + (f": {lines[-1][:200]}" if lines else ""))

    def _refuse(self, reason: str) -> str:
        self._is_refused = True
        return self._drop(reason)

    def _drop(self, reason: str) -> str:
        """End it; its folder goes, too, unless an engine works in there."""
        process, self._process = self._process, None
        assert process is not None
        _close(process.child)
        processes.signal_group(process.child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.child.wait(1.0)
            self.reaper.forget(process.child.pid)
        self.reaper.reserved.discard(process.child.pid)
        processes.kill_all(processes.marked(process.mark))
        if not process.claimed:
            shutil.rmtree(process.scratch, ignore_errors=True)
        self._tell_none(reason)
        return reason

    def _tell_none(self, reason: str) -> None:
        self._reason = reason
        if self._order is None:
            self.parked = None
        elif self.parked is None or (self.parked.state, self.parked.reason) != ("none", reason):
            self.parked = Parked(state="none", since=time.time(), reason=reason)


def _close(child: subprocess.Popen[bytes]) -> None:
    for end in (child.stdin, child.stdout):
        if end is not None:
            with contextlib.suppress(OSError):
                end.close()


def _gib(size: int) -> str:
    return f"{size / memory.GIB:.1f} GiB"
