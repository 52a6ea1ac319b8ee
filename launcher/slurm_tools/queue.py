"""What squeue says of a fleet's jobs: one question for all of them, asked beside the loop. I/O.

A controller of Slurm that is away lets squeue wait for half a minute; nobody who looks here waits
for that. And a site with many fleets is asked once for each of them, not once for each job.
"""

import threading
import time

from launcher.errors import SlurmError
from launcher.slurm_tools import jobs
from launcher.slurm_tools.jobs import Job

MOVING_S = 1.0  # between questions while a job waits or ends
CALM_S = 3.0  # while all of them run
ANSWERS_WITHIN_S = 2.0  # who looks waits so long for an answer that is new enough
STALE_S = 10.0  # an answer that is older counts no more
AWAY_AFTER_S = 10.0  # a question that waits for longer meets nobody


class Queue:
    """One per controller. Its thread begins with the first look, and ends with `close`."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._names: set[str] = set()
        self._asked: set[str] = set()  # the names that the last answer was about
        self._answer: list[Job] | SlurmError = []
        self._began_at = (
            self._since
        ) = -STALE_S  # when that question was put; what is older is void
        self._running_since: float | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def look(self, name: str) -> list[Job]:
        """The jobs of this name, finished ones included while Slurm remembers. Raises SlurmError,
        `unreachable` where there is no answer that is new enough."""
        limit = time.monotonic() + ANSWERS_WITHIN_S
        with self._change:
            self._names.add(name)
            self._start()
            while not self._knows(name):
                left_s = limit - time.monotonic()
                if left_s <= 0 or isinstance(self._answer, SlurmError):
                    raise self._no_answer()
                self._change.notify_all()
                self._change.wait(left_s)
            assert isinstance(self._answer, list)
            return [job for job in self._answer if job.name == name]

    def outdated(self) -> None:
        """A job was just submitted or changed: answers to earlier questions say nothing of it."""
        with self._change:
            self._since = time.monotonic()
            self._change.notify_all()

    def forget(self, name: str) -> None:
        """Nobody will look for this job any more."""
        with self._change:
            self._names.discard(name)

    def check_reachable(self) -> None:
        """Before Slurm is told something. Raises SlurmError where it did not answer of late: who
        acts would wait for half a minute, and everything else with it."""
        with self._change:
            if self._is_away():
                raise self._no_answer()

    def close(self) -> None:
        with self._change:
            self._closing = True
            self._change.notify_all()

    def _knows(self, name: str) -> bool:
        fresh = time.monotonic() - self._began_at < STALE_S and self._began_at >= self._since
        return fresh and name in self._asked and isinstance(self._answer, list)

    def _is_away(self) -> bool:
        """Whether the last question got no answer, or the present one waits for long."""
        waits_s = time.monotonic() - self._running_since if self._running_since else 0.0
        return isinstance(self._answer, SlurmError) or waits_s > AWAY_AFTER_S

    def _no_answer(self) -> SlurmError:
        if isinstance(self._answer, SlurmError) and not self._answer.unreachable:
            return self._answer
        return SlurmError("Slurm's controller does not answer", unreachable=True)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="squeue", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._change:
                if self._closing:
                    return
                names = set(self._names)
                began_at = self._running_since = time.monotonic()
            try:
                answer: list[Job] | SlurmError = jobs.find_all(sorted(names))
            except SlurmError as error:
                answer = error
            with self._change:
                self._answer, self._asked, self._began_at = answer, names, began_at
                self._running_since = None
                self._change.notify_all()
                self._change.wait_for(self._is_due, self._pause_s())

    def _is_due(self) -> bool:
        """Whether somebody needs a new answer now."""
        if isinstance(self._answer, SlurmError):
            return self._closing
        return self._closing or not self._names <= self._asked or self._began_at < self._since

    def _pause_s(self) -> float:
        if isinstance(self._answer, SlurmError):
            return MOVING_S
        calm = all(job.state in ("running", "ended") for job in self._answer)
        return CALM_S if calm else MOVING_S
