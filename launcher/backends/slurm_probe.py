"""One-off jobs on a node, by submitit: does it see us, and what do the probes say there? I/O.

A replica's job would only time out waiting for agents; this says why in seconds.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.backends import asking
from launcher.backends.base import Answer, Question
from launcher.errors import DeadlineError, SlurmError
from launcher.files import make_private
from launcher.paths import state_root
from launcher.slurm_tools import jobs, runner
from launcher.slurm_tools.jobs import Job
from launcher.spec import FleetSpec, SlurmBackend

PROBE_MINUTES = 5
WAIT_S = 120.0
BUSY_AFTER_S = 20.0  # a job that has not started by then waits behind other work


def look_around(folder: str) -> dict[str, str]:
    """Runs on the node: what it sees of us. Importable, so that submitit can pickle its name."""
    import socket

    import launcher

    mark = Path(folder) / "seen"
    mark.write_text(socket.gethostname())
    return {"node": socket.gethostname(), "version": launcher.__version__}


def answer_on_node(question: str, node: str, folder: str, deadline_s: float) -> tuple[str, str]:
    """Runs on the node: what the program prints there. Importable, as above."""
    return asking.answer_here(Question(**json.loads(question)), folder, node, deadline_s)


def ask_nodes(
    spec: FleetSpec, questions: dict[str, Question], deadline_s: float, gpus: int
) -> dict[str, Answer]:
    """One one-off job for each node, all at once; those that wait behind other work are busy."""
    submitted: dict[str, tuple[Any, float]] = {}
    answers: dict[str, Answer] = {}
    try:
        for node, question in questions.items():
            folder = make_private(state_root() / spec.name / "ask" / node)
            executor = _executor(spec, folder, "ask", nodelist=node, gpus=gpus)
            asked = json.dumps(asdict(question))
            job = _submit(executor, answer_on_node, asked, node, str(folder), deadline_s)
            submitted[node] = (job, time.time())
        deadline = time.monotonic() + BUSY_AFTER_S
        seen: dict[str, Job] = {}
        while len(answers) < len(submitted) and time.monotonic() < deadline:
            seen = {found.identity: found for found in jobs.find(f"{spec.name}.ask")}
            for node, (job, began_at) in submitted.items():
                if node not in answers and (answer := _answer_of(job, began_at, seen)):
                    answers[node] = answer
                elif node not in answers and _runs(job, seen):
                    deadline = max(deadline, time.monotonic() + 1.0)
                    if time.time() - began_at > deadline_s + BUSY_AFTER_S:
                        answers[node] = Answer(began_at, time.time(), problem="no answer")
            time.sleep(0.2)
        for node, (job, began_at) in submitted.items():
            found = seen.get(job.job_id)
            waits = jobs.plain_reason(found.reason) if found else "the scheduler"
            busy = Answer(
                began_at, time.time(), problem=f"its job waits for {waits}", is_busy=True
            )
            answers.setdefault(node, busy)
        return answers
    finally:
        for job, _ in submitted.values():
            runner.run(["scancel", job.job_id])


def _answer_of(job: Any, began_at: float, seen: dict[str, Job]) -> Answer | None:
    """The answer of a job that has ended, whether it brought a result or not."""
    found = seen.get(job.job_id)
    if job.paths.result_pickle.exists():
        try:
            output, errors = job.results()[0]
        except Exception as error:  # noqa: BLE001 - the function's own error, pickled by submitit
            return Answer(began_at, time.time(), problem=str(error).strip()[-300:])
        return Answer(began_at, time.time(), output, errors)
    if found is not None and found.state == "ended":
        problem = _tail(job.paths.stderr) or found.slurm_state
        return Answer(began_at, time.time(), problem=problem)
    return None


def _runs(job: Any, seen: dict[str, Job]) -> bool:
    found = seen.get(job.job_id)
    return found is not None and found.state == "running"


def probe_one_node(spec: FleetSpec) -> tuple[str, str]:
    """(node, words). Raises SlurmError or DeadlineError that says what is not visible there."""
    folder = make_private(state_root() / spec.name / "probe")
    job = _submit(_executor(spec, folder, "probe"), look_around, str(folder))
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


def _executor(
    spec: FleetSpec, folder: Path, purpose: str, *, nodelist: str = "", gpus: int = 0
) -> Any:
    import submitit

    slurm = spec.backend.slurm or SlurmBackend()
    site = _site(slurm)
    if nodelist:
        site = {**site, "nodelist": nodelist}
        site.pop("exclude", None)
    if gpus and (slurm.gres or slurm.gpu_option == "gres"):
        site["gres"] = slurm.gres or f"gpu:{gpus}"
    elif gpus and slurm.gpu_option == "gpus-per-node":
        site["gpus_per_node"] = str(gpus)
    executor = submitit.SlurmExecutor(folder=str(folder))
    executor.update_parameters(
        job_name=f"{spec.name}.{purpose}",
        time=PROBE_MINUTES,
        nodes=1,
        ntasks_per_node=1,
        use_srun=False,
        additional_parameters=site,
    )
    return executor


def _submit(executor: Any, function: Any, *arguments: Any) -> Any:
    import submitit

    with submitit.helpers.clean_env():
        try:
            return executor.submit(function, *arguments)
        except submitit.core.utils.FailedJobError as error:
            raise SlurmError(f"sbatch refused the probe: {error}") from error


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
