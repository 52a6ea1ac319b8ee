"""The parked engine process of a node: when it is made, handed to an engine, or ended. I/O.

It is a help and never a condition: whatever goes wrong with it, the engine starts plainly, and the
report says why. All is done in the agent's own turns, for the kernel ends a child when the thread
that started it ends; only the question to the start script has a thread.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.agent import handover, memory, processes
from launcher.agent.processes import SCRATCH_MARK, Reaper
from launcher.agent.surroundings import Surroundings, scratch_folder
from launcher.agent.waiting import TELL_WITHIN_S, Start, Waiting
from launcher.documents import Park, Parked
from launcher.errors import StateError
from launcher.files import make_private, read_tail, write_text

READY_WITHIN_S = 180.0  # 15 s where the files are in memory; a cold shared file system takes long
TAKE_WITHIN_S = 5.0
LOOK_EVERY_S = 5.0
AGAIN_AFTER_S = 60.0
LATER_S = 600.0  # after what passes only if whatever slowed or killed it does
_TURN_S = 0.3  # for what mostly takes some milliseconds: the agent's turn goes on then


@dataclass(frozen=True)
class Adopted:
    """A process that became the engine; its mark lies below that of the node."""

    child: subprocess.Popen[bytes]
    mark: str
    parked: Parked | None


@dataclass
class Parking:
    """At most one parked process. `parked` is for the report; None where none is wanted."""

    reaper: Reaper
    around: Callable[[], Surroundings]
    available_bytes: Callable[[], int] = memory.available_bytes
    parked: Parked | None = None
    _order: Park | None = None
    _process: Waiting | None = None
    _aside: Waiting | None = None  # given up, but Ray's head is of its twin
    _reason: str = ""  # why there is none, or why the last start was plain
    _is_refused: bool = False  # it failed in a way that will not change
    _again_at: float = 0.0
    _looked_at: float = 0.0
    _count: int = 0

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
        process = self._heard()
        if process is None:
            is_time = (idle or serving) and now >= self._again_at
            if self._order and is_time and not self._is_refused:
                self._make(self._order, now, quietly=serving)
        elif process.child.poll() is not None:
            self._lost(process, now)
        elif process.state == "importing" and now - process.made_at > READY_WITHIN_S:
            self._again_at = now + LATER_S
            self._drop(f"its imports took longer than {READY_WITHIN_S:.0f} s")
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
        process = self._heard()
        if process is None or not process.claimed:
            return self._reason or "no process was parked"
        if process.sent_at is not None:
            return self._taken(process, now)
        if process.asked_at is None:
            process.asked_at = now
            if process.state == "importing" and process.quietly and not process.hurry():
                return self._give_up(
                    "its imports had begun at the lowest priority, and stay there"
                )
        process.ask(wanted, within_s=0.0)
        if process.state == "importing":
            if now - process.asked_at <= wanted.wait_s:
                return None
            return self._give_up(
                f"its imports were not done {wanted.wait_s:.0f} s after the order"
            )
        process.ask(wanted, within_s=_TURN_S)
        if process.answer is None:
            if now - process.asked_at <= TELL_WITHIN_S + TAKE_WITHIN_S:
                return None
            return self._give_up("its start script did not tell what it would start")
        if isinstance(process.answer, str):
            self._again_at = now + LATER_S
            return self._give_up(process.answer)
        change = process.change(process.answer)
        if why := handover.refusal(change):
            self._is_refused = True  # the next one would know no better
            return self._give_up(why)
        if why := process.send(process.answer, change, wanted, now):
            return self._give_up(why)
        process.listen(_TURN_S)
        return self._taken(process, now)

    def release(self) -> None:
        """The engine is being ended; a process that it did not take has lost its folder."""
        if self._process and self._process.claimed:
            self._drop("the engine ended before it was taken")

    def clear(self) -> None:
        """The engine is over."""
        self.release()
        if self._aside:
            self._aside.end()
            self._aside = None

    def kill_claimed(self) -> None:
        """From any thread: one that is about to become the engine shall not, after a fence."""
        for process in (self._process, self._aside):
            if process is not None and process.claimed:
                processes.signal_group(process.child.pid, signal.SIGKILL)
                processes.kill_all(processes.marked(process.mark))

    def end(self) -> None:
        """Nothing is parked any more, and nothing will be."""
        self.want(None)
        if self._process:
            self._drop("")

    @property
    def is_ready(self) -> bool:
        """Whether a process is there that has only to be told."""
        process = self._heard()
        return process is not None and process.state == "ready"

    @property
    def scratch(self) -> Path | None:
        """Where the parked process works."""
        process = self._process
        return process.scratch if process else None

    @property
    def waiting_for(self) -> str:
        process = self._process
        if process is None or process.asked_at is None:
            return ""
        is_importing = process.state == "importing"
        return "the engine's imports" if is_importing else "the parked engine process"

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
            "LAUNCHER_PARK_LATE": " ".join(sorted(handover.READ_LATE)),
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
        self._process = Waiting(self.reaper, child, scratch, mark, now, quietly=quietly)
        self.parked = Parked(state="importing", since=time.time())

    def _heard(self) -> Waiting | None:
        """The process, after it was listened to; None where there is none or it is unfit."""
        process = self._process
        if process is None:
            return None
        process.listen()
        if process.state == "unfit":
            self._is_refused = True
            self._drop(process.reason)
        elif process.state == "stale":
            self._again_at = 0.0  # the next one has what is installed now
            self._give_up(process.reason)
        elif process.state == "ready" and self.parked and self.parked.state == "importing":
            self.parked = Parked(
                state="ready", since=time.time(), took_s=process.took_s, reason=process.reason
            )
        return self._process

    def _taken(self, process: Waiting, now: float) -> Adopted | str | None:
        if process.state != "taken":
            assert process.sent_at is not None
            if process.child.poll() is None and now - process.sent_at < TAKE_WITHIN_S:
                return None
            return self._give_up("it did not take its order")
        process.let_go()
        adopted = Adopted(process.child, process.mark, self.parked)
        self._process, self._again_at = None, 0.0
        self._tell_none("")
        return adopted

    def _lost(self, process: Waiting, now: float) -> None:
        code = process.child.returncode
        how = f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}"
        if process.state != "importing":
            self._again_at = now + AGAIN_AFTER_S
            self._drop(how)
            return
        self._again_at = now + LATER_S
        lines = read_tail(self.around().logs / "park.log", 2000).strip().splitlines()
        self._drop(how + (f": {lines[-1][:200]}" if lines else ""))

    def _give_up(self, reason: str) -> str:
        """The engine starts plainly. Where its Ray's head was forked from the twin, that one has
        to live as long."""
        process = self._process
        if process and process.claimed and process.has_twin and process.child.poll() is None:
            self._aside, self._process = process, None
        return self._drop(reason)

    def _drop(self, reason: str) -> str:
        if self._process:
            self._process.end()
        self._process = None
        self._tell_none(reason)
        return reason

    def _tell_none(self, reason: str) -> None:
        self._reason = reason
        if self._order is None:
            self.parked = None
        elif self.parked is None or (self.parked.state, self.parked.reason) != ("none", reason):
            self.parked = Parked(state="none", since=time.time(), reason=reason)


def _gib(size: int) -> str:
    return f"{size / memory.GIB:.1f} GiB"
