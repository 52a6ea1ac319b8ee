"""What this node has of the model's weights: looked at now and then, by a child. I/O, in a thread.

It is for people and decides nothing. One child at a time: where even its end waits for a dead file
system, nobody looks again before that has come.
"""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

from health.probes.storage import is_over_network
from launcher.agent import processes, weighing
from launcher.agent.processes import MARK_VARIABLE, Reaper
from launcher.documents import ModelPlace, Weights

Stage = Literal["idle", "starting", "serving"]
WITHIN_S = 20.0
EVERY_S = 300.0
REST_FACTOR = 100  # a look that takes long is rarer
_PROGRAM = [sys.executable, "-I", "-S", str(Path(weighing.__file__))]


class WeightsWatch:
    """`found` is for the report; None before the first look."""

    def __init__(
        self, reaper: Reaper, place: ModelPlace | None, environment: dict[str, str], mark: str
    ) -> None:
        self._reaper = reaper
        self._place = place
        self._environment = {**environment, MARK_VARIABLE: f"{mark}/weights"}
        self._stage: Stage = "idle"
        self._next_at = 0.0
        self._took_s = 0.0
        self._thread: threading.Thread | None = None
        self.found: Weights | None = None

    def turn(self, now: float, stage: Stage) -> None:
        """Look if it is time: at first, every few minutes, when an engine begins to serve. While
        it starts it reads them, and what is cached would be told too late."""
        if stage != self._stage:
            self._stage, self._next_at = stage, now
            if stage == "starting":
                self._forget_page_cache()
        if self._place is None or stage == "starting" or now < self._next_at or self.is_looking:
            return
        pause_s = max(EVERY_S, self._took_s * REST_FACTOR)
        self._next_at = now + pause_s * random.uniform(1.0, 1.2)
        self._thread = threading.Thread(
            target=self._look, args=(self._place,), name="weights", daemon=True
        )
        self._thread.start()

    @property
    def is_looking(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _forget_page_cache(self) -> None:
        found = self.found
        if found and found.page_cache_bytes is not None and not found.is_all_cached:
            update = {"page_cache_bytes": None, "reason": "the engine is reading them"}
            self.found = found.model_copy(update=update)

    def _look(self, place: ModelPlace) -> None:
        if place.in_container and not place.model.startswith("/"):
            reason = "the hub's cache is inside the engine's container"
            self.found = Weights(at=time.time(), reason=reason)
            return
        began = time.monotonic()
        try:
            child = self._reaper.converse(_PROGRAM, {**self._environment, **place.environment})
        except OSError as error:
            self.found = Weights(at=time.time(), reason=f"cannot look: {error.strerror}")
            return
        self._reaper.reserved.add(child.pid)  # an engine's end does not wait for it
        try:
            said, broken = _asked(child, place)
            self._took_s = time.monotonic() - began
            self.found = _parsed(said, broken)
            if self._stage == "starting":
                self._forget_page_cache()
        finally:
            child.wait()
            self._reaper.reserved.discard(child.pid)
            self._reaper.forget(child.pid)


def _asked(child: subprocess.Popen[bytes], place: ModelPlace) -> tuple[bytes, str]:
    """What the child said, and why it said no more, if it did not end by itself."""
    question = place.model_dump(include={"model", "revision", "download_folder"})
    try:
        said, _ = child.communicate(json.dumps(question).encode() + b"\n", WITHIN_S)
    except subprocess.TimeoutExpired as late:
        processes.signal_group(child.pid, signal.SIGKILL)
        return late.output or b"", f"no answer within {WITHIN_S:g} s"
    return said, f"the look ended with code {child.returncode}" if child.returncode else ""


def _parsed(said: bytes, broken: str) -> Weights:
    """The last line that came whole is all that is known."""
    lines = said.split(b"\n")[:-1]
    answer = json.loads(lines[-1]) if lines else {}
    kinds = [kind for kind in answer.get("file_system", "").split(", ") if kind]
    reason = "; ".join(filter(None, (answer.get("reason", ""), broken)))
    over_network = any(map(is_over_network, kinds)) if kinds else None
    known = {"at": time.time(), "over_network": over_network, "reason": reason}
    return Weights.model_validate({**answer, **known})
