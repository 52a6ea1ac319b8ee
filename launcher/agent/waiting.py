"""One process that waits to become an engine: what it says, what it is told, how it ends. I/O."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from launcher.agent import handover, processes
from launcher.agent.handover import Change, Told
from launcher.agent.processes import Reaper

TELL_WITHIN_S = 30.0  # environment modules, before the script knows what it would start
_ORDER_MAX_BYTES = 60_000  # what a pipe takes without a reader


@dataclass(frozen=True)
class Start:
    """What an engine wants to start: its script, as it would be run plainly."""

    script: Path
    environment: dict[str, str]
    log: Path
    folder: Path
    wait_s: float


@dataclass
class Waiting:
    """Its state is what it said last; `told` is the environment that it was parked in."""

    reaper: Reaper
    child: subprocess.Popen[bytes]
    scratch: Path
    mark: str
    made_at: float
    state: Literal["importing", "ready", "unfit", "stale", "taken"] = "importing"
    reason: str = ""
    took_s: float | None = None
    quietly: bool = False  # it was made beside an engine that serves, with what that one left
    claimed: bool = False  # an engine works in its scratch folder
    asked_at: float | None = None
    sent_at: float | None = None
    answer: Told | str | None = None  # what the start script told, or why it did not
    _told: Told | None = None
    _output: bytes = b""
    _question: threading.Thread | None = None

    def listen(self, within_s: float = 0.0) -> None:
        """Read what it has said until now, or says within this time."""
        assert self.child.stdout is not None
        if within_s:
            select.select([self.child.stdout], [], [], within_s)
        with contextlib.suppress(OSError):  # there is nothing more at present
            while part := os.read(self.child.stdout.fileno(), 1 << 16):
                self._output += part
        if self._told is None:
            if (found := handover.split_told(self._output)) is None:
                return
            self._told, self._output = found
        *lines, self._output = self._output.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    self._hear(message)

    def _hear(self, message: dict[str, str]) -> None:
        match message.get("state"):
            case "unfit" | "stale" as state:
                self.state, self.reason = state, message.get("reason", state)
            case "ready":
                missing = ", ".join(message.get("missing") or ())
                told = (message.get("reason"), missing and f"could not import {missing}")
                self.state, self.reason = "ready", "; ".join(filter(None, told))[:500]
                self.took_s = round(time.monotonic() - self.made_at, 2)
            case "taken":
                self.state = "taken"

    def hurry(self) -> bool:
        """Let its imports go on like any other process's; False where that cannot be."""
        try:
            process = psutil.Process(self.child.pid)
            process.ionice(psutil.IOPRIO_CLASS_NONE)
            if process.nice() > 0:
                process.nice(0)
            else:  # it stepped back with its session
                Path(f"/proc/{process.pid}/autogroup").write_text("0", encoding="ascii")
        except (psutil.Error, OSError):
            return False
        return True

    def ask(self, wanted: Start, within_s: float) -> None:
        """Let the start script tell what it would start; the answer may come at a later call."""
        if self._question is None:
            self._question = threading.Thread(
                target=self._ask, args=(wanted,), name="tell", daemon=True
            )
            self._question.start()
        self._question.join(within_s)

    def _ask(self, wanted: Start) -> None:
        environment = {**wanted.environment, "LAUNCHER_TELL": "1"}
        words = ["/bin/bash", str(wanted.script)]
        try:
            code, output = self.reaper.run_bytes(words, environment, TELL_WITHIN_S)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self.answer = f"its start script did not run: {error}"
            return
        found = handover.split_told(output)
        said = output[-300:].decode("utf-8", "replace").strip() if found is None else ""
        self.answer = found[0] if found else f"its start script ended with code {code}: {said}"

    def change(self, told: Told) -> Change:
        """What it has to change of its environment to be what was told."""
        assert self._told is not None
        return handover.change(self._told.environment, told.environment)

    def send(self, told: Told, change: Change, wanted: Start, now: float) -> str:
        """Give it its order; why that cannot be, if it cannot."""
        order = handover.order(told, change, str(wanted.folder), str(wanted.log))
        if len(order) > _ORDER_MAX_BYTES:
            return "its order is too long for a pipe"
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(order)
            self.child.stdin.flush()
        except OSError:
            return "it ended before its order came"
        self.sent_at = now
        return ""

    @property
    def has_twin(self) -> bool:
        """Whether Ray's processes may have been forked from its twin: they end with it."""
        return (self.scratch / "ray/twin").exists()

    def let_go(self) -> None:
        """It is the engine's now: its pipes are closed, and it ends with the engine."""
        self.reaper.reserved.discard(self.child.pid)
        for end in (self.child.stdin, self.child.stdout):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.close()

    def end(self) -> None:
        """End it; its folder goes, too, unless an engine works in there."""
        self.let_go()
        processes.signal_group(self.child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(1.0)
        self.reaper.forget(self.child.pid)  # else it is reaped like an orphan, when it ends
        processes.kill_all(processes.marked(self.mark))
        if not self.claimed:
            shutil.rmtree(self.scratch, ignore_errors=True)
