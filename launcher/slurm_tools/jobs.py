"""Jobs: submit, look up by name, cancel. The parsers are pure and tested on recorded outputs."""

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inventory import nodeset
from inventory.errors import InventoryError
from launcher.errors import SlurmError
from launcher.slurm_tools import runner

# Free text comes last, so that a | in it harms nothing.
SQUEUE_FORMAT = "%i|%T|%N|%e|%S|%B|%j|%r|%k"
_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}
_ENDING = {"COMPLETING"}

FORGOTTEN = "Invalid job id"

REASONS = {
    "Resources": "free nodes (next in line)",
    "Priority": "jobs of higher priority",
    "Dependency": "another job",
    "QOSMaxJobsPerUserLimit": "your own jobs to end (QOS limit)",
    "AssocGrpGRES": "your group's GPU quota",
    "AssocGrpCpuLimit": "your group's CPU quota",
    "ReqNodeNotAvail": "nodes that are down, drained or reserved",
    "PartitionNodeLimit": "more nodes than the partition has",
    "PartitionTimeLimit": "a shorter walltime (partition limit)",
    "BeginTime": "its begin time",
    "JobHeldUser": "you to release it (held)",
    "JobHeldAdmin": "an administrator to release it (held)",
    "BadConstraints": "nodes that match its constraint (none does)",
    "None": "the scheduler",
}


@dataclass(frozen=True)
class Place:
    """A job, and the node of it that a process runs on, as Slurm calls both."""

    job: str
    node: str


@dataclass(frozen=True)
class Job:
    """One job as squeue sees it. `state` is ours: pending, running, ending or ended."""

    identity: str
    state: str
    slurm_state: str
    nodes: tuple[str, ...]
    ends_at: float | None
    starts_at: float | None
    batch_host: str
    name: str
    reason: str
    comment: str


def own_place() -> Place | None:
    """Where in Slurm this process runs; None outside. A shell of salloc is on a login node and
    outlives its job: only slurmd, on the node, sets the second variable."""
    job, node = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURMD_NODENAME", "")
    return Place(job, node) if job and node else None


def submit(script: Path) -> str:
    """The new job's id. Raises SlurmError with what sbatch said."""
    output = runner.run(
        ["sbatch", "--parsable", str(script)], environment=runner.minimal_environment()
    )
    return parse_job_id(output)


def find(name: str) -> list[Job]:
    """This user's jobs of exactly this name, finished ones included while Slurm remembers."""
    return find_all([name])


def find_all(names: Sequence[str]) -> list[Job]:
    """The same for several names, by one question."""
    command = ["squeue", "--me", "-h", "-t", "all", "-n", ",".join(names), "-o", SQUEUE_FORMAT]
    return [job for job in parse_squeue(runner.run(command)) if job.name in names]


def find_ours(name: str, mark: str, known: str = "") -> list[Job]:
    """Those of this name that are ours: by the id that sbatch gave us (known), or by our mark in
    the comment where its answer was lost."""
    return ours(find(name), mark, known)


def ours(found: Iterable[Job], mark: str, known: str = "") -> list[Job]:
    """The same of jobs that were looked up already. Pure."""
    return [job for job in found if (known and job.identity == known) or job.comment == mark]


def has_left(identity: str, node: str) -> bool:
    """Whether Slurm is certain that this job has nothing on this node any more: it is over, or it
    was requeued and is elsewhere. Raises SlurmError where Slurm cannot say."""
    try:
        output = runner.run(["squeue", "-h", "-t", "all", "-j", identity, "-o", SQUEUE_FORMAT])
    except SlurmError as error:
        if not error.unreachable and FORGOTTEN in error.message:
            return True  # it ended long ago
        raise
    return not any(may_be_on(job, node) for job in parse_squeue(output))


def may_be_on(job: Job, node: str) -> bool:
    """Whether the batch script of this job may still have processes on this node. Pure."""
    if job.state == "running":
        return job.batch_host == node or not job.nodes
    return job.state == "ending"  # its processes end now, perhaps


def cancel(identity: str) -> None:
    """Cancel a job; one that is over already is fine."""
    runner.run(["scancel", identity])


def shrink(identity: str, kept: tuple[str, ...]) -> None:
    """Leave a running job only these nodes; what runs on the others is killed. Some sites forbid
    it, and some versions refuse a second time: then SlurmError says so."""
    runner.run(["scontrol", "update", f"JobId={identity}", f"NodeList={nodeset.fold(list(kept))}"])


def parse_job_id(output: str) -> str:
    """`123` or `123;cluster` → `123`."""
    identity = output.strip().split("\n")[-1].split(";")[0].strip()
    if not re.fullmatch(r"\d+", identity):
        raise SlurmError(f"sbatch printed no job id: {output.strip()[:200]!r}")
    return identity


def parse_squeue(output: str) -> list[Job]:
    """Rows of SQUEUE_FORMAT. A row that cannot be read is an error, not a missing job."""
    jobs = []
    for line in output.splitlines():
        if not line.strip():
            continue
        fields = line.split("|", 8)
        if len(fields) != 9:
            raise SlurmError(f"squeue printed a row that cannot be read: {line[:200]!r}")
        identity, state, node_list, end, start, batch_host, name, reason, comment = fields
        try:
            nodes = tuple(nodeset.expand(node_list)) if node_list.strip() else ()
        except InventoryError as error:
            raise SlurmError(f"squeue printed a node list that cannot be read: {error}") from error
        jobs.append(
            Job(
                identity=identity,
                state=_translate(state),
                slurm_state=state,
                nodes=nodes,
                ends_at=parse_time(end),
                starts_at=parse_time(start),
                batch_host=batch_host,
                name=name,
                reason=reason,
                comment=comment.strip(),
            )
        )
    return jobs


def parse_time(text: str) -> float | None:
    """`2026-11-21T13:05:00` in the machine's time zone → seconds since the epoch."""
    try:
        return time.mktime(time.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None  # N/A, NONE, Unknown


def plain_reason(reason: str) -> str:
    """Slurm's pending reason in words; the original in brackets."""
    bare = reason.strip("() ").split(",")[0]
    words = REASONS.get(bare)
    return f"{words} ({reason})" if words else reason or "the scheduler"


def _translate(state: str) -> str:
    # 23.x may print several flags: "RUNNING,COMPLETING".
    flags = set(state.upper().split(","))
    if flags & _ENDING:
        return "ending"
    if flags & _RUNNING:
        return "running"
    if flags & _PENDING:
        return "pending"
    return "ended"
