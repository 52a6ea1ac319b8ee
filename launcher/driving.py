"""The one way to a controller: in the background of this host, or in a Slurm job of its own. I/O.

A fleet that goes down is always driven from here: nobody waits in a queue to end something.
"""

import subprocess
import sys
import time

from launcher import controller_job, succession
from launcher.errors import DeadlineError, FleetError, SlurmError, StateError
from launcher.files import open_log, read_document, write_document
from launcher.paths import FleetPaths
from launcher.slurm_tools import jobs
from launcher.spec import FleetSpec
from launcher.status import Status, bare_status
from launcher.succession import NONE
from launcher.wish import Wish, read_record

LOOK_EVERY_S = 2.0
JOB_PATIENCE_S = 30.0  # a node's first import over a slow file system


def start(paths: FleetPaths, wish: Wish) -> None:
    """Start a controller, or see to it that Slurm will. Harmless when repeated.

    Raises SlurmError where the job cannot be submitted. A run that has not begun is over then.
    """
    spec = _spec(paths, wish)
    job = spec.controller_job if spec else None
    if spec is None or job is None or wish.desired == "down":
        _start_in_background(paths, wish.run)
        return
    own = jobs.own_place()
    try:
        controller_job.submit(spec, job, paths, wish.run)
    except FleetError as error:
        is_refused = not (isinstance(error, SlurmError) and error.unreachable)
        if own is None and is_refused and read_record(paths, wish.run) is None:
            write_document(paths.status, _bare(paths, wish, spec, error=error))
        raise


def withdraw(paths: FleetPaths) -> None:
    """The run is to end: a job that has not started shall not. What cannot be cancelled ends by
    itself when it starts, for then the run is over."""
    try:
        if controller_job.is_known(paths):
            controller_job.withdraw(paths)
    except SlurmError:
        return  # `end` says it


def end(paths: FleetPaths) -> str:
    """The run is over: no job of its controller is left afterwards; else which, in words."""
    return controller_job.end(paths) if controller_job.is_known(paths) else ""


class Absence:
    """What a missing controller is waited for, asked of Slurm now and then."""

    def __init__(self, paths: FleetPaths, wish: Wish) -> None:
        self._paths, self._wish = paths, wish
        self._spec = _spec(paths, wish)
        self._looked_at = float("-inf")
        self._stage = NONE

    def must_wait(self) -> bool:
        """Whether nothing can be done but wait. Raises DeadlineError beyond limits.queue."""
        if self._stage.kind == "pending" and self._spec:
            asked_at = controller_job.submitted_at(self._paths)
            limit_s = self._spec.limits.queue
            if asked_at is not None and time.time() - asked_at > limit_s:
                raise DeadlineError(
                    f"waited {limit_s} s for {self._stage.words}",
                    where="limits.queue",
                    hint="`launcher down` cancels it; `controller.slurm` names another partition.",
                )
        return self._stage.kind in ("pending", "unknown")

    @property
    def last(self) -> str:
        """How the last job of it ended, where none is left."""
        return self._stage.last

    @property
    def patience_s(self) -> float:
        """How long what has been started may take to show itself."""
        return JOB_PATIENCE_S if self._stage.kind == "running" else 0.0

    def look(self) -> None:
        if not self._spec or not self._spec.controller_job or self._wish.desired == "down":
            return
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        try:
            self._stage = succession.stage_of(controller_job.find(self._paths))
        except SlurmError as error:
            self._stage = succession.unknown(error.message)

    def forget(self) -> None:
        """There is a controller."""
        self._stage = NONE

    def tell(self, status: Status | None) -> Status | None:
        """The same status with what is waited for; one of its own where there is none yet."""
        words = self._stage.words
        if not words or (status is not None and status.finished):
            return status
        if status is None:
            return _bare(self._paths, self._wish, self._spec, waiting_for=(words,))
        waits = [words, *status.waiting_for]
        return status.model_copy(
            update={"controller": f"waiting for {words}", "waiting_for": waits}
        )


def _spec(paths: FleetPaths, wish: Wish) -> FleetSpec | None:
    try:
        return read_document(paths.run(wish.run).spec, FleetSpec)
    except StateError:
        return None  # the controller says what is wrong with it


def _bare(
    paths: FleetPaths,
    wish: Wish,
    spec: FleetSpec | None,
    waiting_for: tuple[str, ...] = (),
    error: FleetError | None = None,
) -> Status:
    return bare_status(
        fleet=paths.root.name,
        run=wish.run,
        desired=wish.desired,
        spec=spec,
        api_key_file=str(paths.api_key),
        now=time.time(),
        waiting_for=waiting_for,
        error=error,
    )


def _start_in_background(paths: FleetPaths, run: int) -> None:
    """It outlives this process."""
    with open_log(paths.run(run).controller_log) as log:
        subprocess.Popen(
            [sys.executable, "-m", "launcher.controller", str(paths.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
