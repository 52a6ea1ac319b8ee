"""Watches a serving engine: figures, canaries, and the verdict when it is stuck. I/O, in threads.

Threads of the agent of rank 0, from the first token on. One judges twice a second and asks nobody;
one asks /metrics, one sends canaries, one looks closer at an engine that is quiet, so that no
question that hangs stops another one or the verdict. None of them touches a file but in /proc: a
hanging file system does not blind them.
"""

import threading
import time
from collections.abc import Callable

from launcher.agent import processes, progress
from launcher.agent.probe import Api, Failed
from launcher.agent.progress import Outcome, Progress

LOOK_S = 0.5
FIGURES_EVERY_S = 2.0
FIGURES_TIMEOUT_S = 10.0  # a busy API server may take its time; its silence is judged, not this
HEALTH_TIMEOUT_S = 2.0
CLOSER_S = 8.0  # quiet for so long, it is looked at more closely
CLOSER_EVERY_S = 1.0
FIGURES_PREFIX = "vllm:"


class StallWatch:
    """`stalled` says in words why the engine is stuck; empty as long as it is not."""

    def __init__(self, api: Api, compiles: Callable[[], bool] = processes.compiles) -> None:
        self._api = api
        self._compiles = compiles
        self._lock = threading.Lock()
        self._progress = Progress(time.monotonic())
        self._ended = threading.Event()
        self._health = ""
        self._canary = ""
        self.stalled = ""

    def start(self) -> None:
        for work, name in (
            (self._judge, "stall-verdict"),
            (self._count, "stall-figures"),
            (self._send_canaries, "stall-canary"),
            (self._look_closer, "stall-closer"),
        ):
            threading.Thread(target=work, name=name, daemon=True).start()

    def stop(self) -> None:
        """No more questions; one that is out ends with the engine, or by its timeout."""
        self._ended.set()

    def _judge(self) -> None:
        while not self._ended.wait(LOOK_S):
            with self._lock:
                verdict = self._progress.look(time.monotonic())
                if verdict.state == "stuck":
                    self.stalled = progress.words(verdict, self._health, self._canary)
                    self._ended.set()

    def _count(self) -> None:
        while not self._ended.is_set():
            try:
                lines = self._api.metrics(FIGURES_TIMEOUT_S, FIGURES_PREFIX)
            except Failed:
                lines = []  # silence
            figures = progress.read_figures(lines)
            with self._lock:
                self._progress.counted(time.monotonic(), figures)
            self._ended.wait(FIGURES_EVERY_S)

    def _look_closer(self) -> None:
        """While it is quiet: does it compile, and what does /health say?"""
        while not self._ended.wait(CLOSER_EVERY_S):
            now = time.monotonic()
            with self._lock:
                quiet_s = self._progress.quiet_s(now)
            if quiet_s < CLOSER_S:
                self._health = ""
                continue
            if self._compiles():
                with self._lock:
                    self._progress.compiling(now)
            self._health = self._ask_health()

    def _ask_health(self) -> str:
        try:
            return "answers 200" if self._api.healthy(HEALTH_TIMEOUT_S) else "answers, but not 200"
        except Failed:
            return "does not answer"

    def _send_canaries(self) -> None:
        while not self._ended.wait(LOOK_S / 2):
            with self._lock:
                now = time.monotonic()
                engine = self._progress.canary_due(now)
                if engine is None:
                    continue
                self._progress.canary_sent(now, engine)
                pinned = engine if self._progress.is_parallel else ""
            outcome = self._ask_for_token(pinned)
            with self._lock:
                self._progress.canary_ended(time.monotonic(), outcome)

    def _ask_for_token(self, engine: str) -> Outcome:
        try:
            completion = self._api.token(progress.CANARY_DEADLINE_S, engine)
        except TimeoutError:
            self._canary = "no answer"
            return "nothing"
        except Failed as error:
            self._canary = type(error).__name__
            return "nothing"
        if completion.tokens >= 1:
            self._canary = ""
            return "token"
        self._canary = f"HTTP {completion.status}"
        return "refused" if 400 <= completion.status < 500 else "nothing"
