"""The controller's own Slurm job, from outside: submitted once, found again, cancelled. I/O.

Never two of them are submitted: a job is looked for before (by name and mark), and where Slurm
does not answer nothing is submitted. Should there be two all the same, the lock and the beat of
wish.py let one of them drive, and the other one waits.
"""

import contextlib
import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.documents import Document
from launcher.errors import SlurmError, SpecError
from launcher.files import make_private, read_document, write_document, write_text
from launcher.paths import FleetPaths
from launcher.render import controller_job_name, controller_script
from launcher.slurm_tools import cluster, jobs
from launcher.slurm_tools.jobs import Job
from launcher.spec import ControllerJob, FleetSpec
from launcher.succession import living

SCRIPT = "controller.sbatch"
ENDS_WITHIN_S = 20.0
LOOK_S = 0.5


class Submitted(Document):
    """controller-job.json: the newest job of this fleet's controller."""

    job: str
    at: float


class Heir(Document):
    """controller-heir.json: the job that waits for the wheel, while another one drives."""

    job: str


def check(spec: FleetSpec) -> None:
    """Refuse what Slurm would refuse, or take and never start, before anything is begun."""
    job = spec.controller_job
    if job is None:
        return
    near = spec.backend.slurm
    try:
        pool = cluster.read_partition(job.partition or (near.partition if near else None))
    except SpecError as error:
        where = "controller.slurm.partition"
        raise SpecError(error.message, where=where, hint=error.hint) from error
    if job.walltime and pool.limit_s and job.walltime > pool.limit_s:
        raise SpecError(
            f"{job.walltime} s is more than the {pool.limit_s} s that {pool.name} allows",
            where="controller.slurm.walltime",
            hint="Ask for less: its successor is submitted before it ends.",
        )


def script_of(spec: FleetSpec, job: ControllerJob, paths: FleetPaths, run: int) -> str:
    return controller_script(
        spec,
        job,
        root=paths.root,
        log=paths.run(run).controller_log,
        python=sys.executable,
        mark=_mark(paths),
    )


def find(paths: FleetPaths) -> list[Job]:
    """All that Slurm knows of, finished ones included. Raises SlurmError."""
    known = read_document(paths.controller_job, Submitted)
    name = controller_job_name(paths.root.name)
    return jobs.find_ours(name, _mark(paths), known.job if known else "")


def is_known(paths: FleetPaths) -> bool:
    """Whether one was submitted since the last `down`."""
    return paths.controller_job.exists()


def submitted_at(paths: FleetPaths) -> float | None:
    known = read_document(paths.controller_job, Submitted)
    return known.at if known else None


def submit(
    spec: FleetSpec, job: ControllerJob, paths: FleetPaths, run: int, own: str = ""
) -> None:
    """Submit one, unless one lives beside `own`. One that waits and was asked for in other words
    (a partition that the user has corrected) is replaced. Raises SlurmError."""
    script = script_of(spec, job, paths, run)
    file = paths.run(run).rendered / SCRIPT
    with _alone(paths):
        others = [other for other in living(find(paths)) if other.identity != own]
        is_same = file.is_file() and file.read_text(encoding="utf-8") == script
        if any(other.state == "running" for other in others) or (others and is_same):
            return
        for other in others:
            jobs.cancel(other.identity)
        make_private(file.parent)
        write_text(file, script, mode=0o700)
        identity = _submit(file, paths, {own, *(other.identity for other in others)})
        write_document(paths.controller_job, Submitted(job=identity, at=time.time()))


def withdraw(paths: FleetPaths) -> None:
    """Cancel those that have not started. Raises SlurmError."""
    for job in living(find(paths)):
        if job.state == "pending":
            jobs.cancel(job.identity)


def end(paths: FleetPaths, within_s: float = ENDS_WITHIN_S) -> str:
    """After the run: those that run end by themselves, in time or not. What is left, in words."""
    deadline = time.monotonic() + within_s
    try:
        while left := living(find(paths)):
            is_late = time.monotonic() > deadline
            for job in left:
                if is_late or job.state == "pending":
                    jobs.cancel(job.identity)
            if is_late:
                break
            time.sleep(LOOK_S)
    except SlurmError as error:
        return (
            f"the controller's Slurm job may be there still ({error.message}); it ends by itself"
        )
    paths.controller_job.unlink(missing_ok=True)
    return ""


def _submit(script: Path, paths: FleetPaths, before: set[str]) -> str:
    try:
        return jobs.submit(script)
    except SlurmError as error:
        if not error.unreachable:
            raise
        found = [job for job in living(find(paths)) if job.identity not in before]
        if not found:
            raise
        return found[-1].identity  # the answer was lost, the job was not


def _mark(paths: FleetPaths) -> str:
    """By which we tell our job from another one of the same name."""
    seed = f"{os.getuid()}/{paths.root}/controller"
    return hashlib.sha256(seed.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(paths: FleetPaths) -> Iterator[None]:
    """Who looks and submits at the same time waits, and finds what the other one submitted."""
    handle = os.open(paths.controller_job_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
