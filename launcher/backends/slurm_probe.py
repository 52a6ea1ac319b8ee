"""A one-off job on one node, by submitit: does the node see our interpreter and state folder? I/O.

A replica's job would only time out waiting for agents; this says why in seconds.
"""

import time
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.errors import DeadlineError, SlurmError
from launcher.files import make_private
from launcher.paths import state_root
from launcher.slurm_tools import jobs, runner
from launcher.spec import FleetSpec, SlurmBackend

PROBE_MINUTES = 5
WAIT_S = 120.0


def look_around(folder: str) -> dict[str, str]:
    """Runs on the node: what it sees of us. Importable, so that submitit can pickle its name."""
    import socket

    import launcher

    mark = Path(folder) / "seen"
    mark.write_text(socket.gethostname())
    return {"node": socket.gethostname(), "version": launcher.__version__}


def probe_one_node(spec: FleetSpec) -> tuple[str, str]:
    """(node, words). Raises SlurmError or DeadlineError that says what is not visible there."""
    import submitit

    slurm = spec.backend.slurm or SlurmBackend()
    folder = make_private(state_root() / spec.name / "probe")
    executor = submitit.SlurmExecutor(folder=str(folder))
    executor.update_parameters(
        job_name=f"{spec.name}.probe",
        time=PROBE_MINUTES,
        nodes=1,
        ntasks_per_node=1,
        use_srun=False,
        additional_parameters=_site(slurm),
    )
    with submitit.helpers.clean_env():
        try:
            job: Any = executor.submit(look_around, str(folder))
        except submitit.core.utils.FailedJobError as error:
            raise SlurmError(f"sbatch refused the probe: {error}") from error
    try:
        seen = _await(job, folder)
    finally:
        runner.run(["scancel", job.job_id])
    if seen["version"] != __version__:
        raise SlurmError(
            f"{seen['node']} runs launcher {seen['version']}, and {__version__} is needed",
            where="backend.slurm",
            hint="Install launcher on a file system that all nodes share.",
        )
    return seen["node"], f"runs launcher {seen['version']} and sees {state_root()}"


def _await(job: Any, folder: Path) -> dict[str, str]:
    """The job's result. State comes from squeue: submitit asks sacct, which many sites lack."""
    deadline = time.monotonic() + WAIT_S
    reason = "the scheduler"
    while time.monotonic() < deadline:
        if job.paths.result_pickle.exists():
            return dict(job.results()[0])
        found = [one for one in jobs.find(job_name(folder)) if one.identity == job.job_id]
        if found and found[0].state == "ended" and not job.paths.result_pickle.exists():
            said = _tail(job.paths.stderr) or _tail(job.paths.stdout)
            raise SlurmError(
                f"the probe ended without an answer ({found[0].slurm_state}): {said}",
                where=f"Slurm job {job.job_id} on {','.join(found[0].nodes)}",
                hint="Is launcher's environment on a file system that the nodes share?",
            )
        if found and found[0].state == "pending":
            reason = jobs.plain_reason(found[0].reason)
        time.sleep(0.5)
    raise DeadlineError(
        f"no node answered within {WAIT_S:.0f} s; waited for {reason}",
        where="backend.slurm",
    )


def job_name(folder: Path) -> str:
    return f"{folder.parent.name}.probe"


def _site(slurm: SlurmBackend) -> dict[str, str]:
    names = ("partition", "account", "qos", "constraint", "reservation", "exclude")
    return {name: value for name in names if (value := getattr(slurm, name))}


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()[-300:]
    except OSError:
        return ""
