"""Slurm: one allocation job for each replica, one agent per node in a step of its own. I/O."""

import sys
from collections.abc import Callable

from inventory.model import Pool
from launcher.backends.base import Allocation, Answer, Question
from launcher.backends.shared_files import SharedFiles
from launcher.documents import Document
from launcher.errors import CapacityError, SlurmError, SpecError
from launcher.files import make_private, read_document, write_text
from launcher.paths import FleetPaths
from launcher.render import sbatch_script
from launcher.slurm_tools import cluster, jobs
from launcher.slurm_tools.jobs import Job
from launcher.slurm_tools.queue import Queue
from launcher.snapshot import AllocationView
from launcher.spec import FleetSpec, SlurmBackend

SCRIPT = "replica.sbatch"
ORDINARY_ENDS = ("TIMEOUT", "PREEMPTED", "NODE_FAIL")


class SubmitRecord(Document):
    """job.json beside the script: which job this allocation is, once sbatch has said so."""

    job: str


class ExitRecord(Document):
    """exit.json, left by the supervisor: how the job ended, for clusters without accounting."""

    reason: str
    at: float
    steps: dict[str, int]


class Slurm(SharedFiles):
    kind = "slurm"
    shares_machine = False
    chooses_nodes = True

    def __init__(self, spec: FleetSpec, paths: FleetPaths) -> None:
        self._spec = spec
        self._block = spec.backend.slurm or SlurmBackend()
        self._paths = paths
        self._pool: Pool | None = None
        self._queue = Queue()

    def check(self) -> None:
        pool = self.pool()
        walltime = self._block.walltime
        if walltime and pool.limit_s and walltime > pool.limit_s:
            raise SpecError(
                f"{walltime} s is more than the {pool.limit_s} s that {pool.name} allows",
                where="backend.slurm.walltime",
                hint="Ask for less, or name another partition.",
            )
        usable = [node for node in pool.nodes if node.state != "down"]
        # Slurm accepts a job that can never start and leaves it pending for ever.
        if len(usable) < self._spec.nodes:
            raise CapacityError(
                f"{self._spec.nodes} nodes per replica asked for, {pool.name} has "
                f"{len(usable)} that are up (of {len(pool.nodes)})",
                where="backend.slurm.partition",
                hint="Ask for fewer nodes, or name another partition.",
            )
        gpus = self._spec.gpus_per_node
        most = max((node.gpus for node in pool.nodes), default=0)
        if gpus and self._block.gpu_option != "none" and not self._block.gres and gpus > most:
            raise SpecError(
                f"{gpus} GPUs per node asked for, nodes of {pool.name} have {most}",
                where="gpus_per_node",
                hint="Correct it, or write `gres:` as your site has it.",
            )

    def pool(self) -> Pool:
        if self._pool is None:
            self._pool = cluster.read_partition(self._block.partition)
        return self._pool

    def commands(self, allocation: Allocation) -> dict[str, str]:
        return {SCRIPT: self._script(allocation)}

    def allocate(self, allocation: Allocation) -> None:
        self._queue.check_reachable()
        make_private(self._paths.root)
        self.prepare(allocation)
        self._queue.outdated()
        if self._job(allocation, jobs.find) is not None:
            return  # submitted by an earlier life of the controller
        script = allocation.base.root / SCRIPT
        write_text(script, self._script(allocation), mode=0o700)
        try:
            identity = jobs.submit(script)
        except SlurmError as error:
            job = None if not error.unreachable else self._job(allocation, jobs.find)
            if job is None:
                raise
            identity = job.identity  # the answer was lost, the job was not
        write_text(allocation.base.root / "job.json", SubmitRecord(job=identity).model_dump_json())
        self._queue.outdated()

    def observe(self, allocation: Allocation) -> AllocationView:
        try:
            job = self._job(allocation, self._queue.look)
        except SlurmError as error:
            if error.unreachable:
                return AllocationView("unknown", reason="Slurm's controller does not answer")
            raise
        if job is None:
            return self._gone_or_none(allocation)
        label = f"Slurm job {job.identity}"
        if job.state == "pending":
            return AllocationView(
                "pending",
                label,
                reason=f"{label}: {jobs.plain_reason(job.reason)}",
                expected_start=job.starts_at,
            )
        if job.state == "running":
            return AllocationView("running", label, job.nodes, ends_at=job.ends_at)
        return AllocationView(
            "gone",
            label,
            job.nodes,
            reason=self._ending(allocation, job),
            is_ordinary=job.slurm_state in ORDINARY_ENDS,
        )

    def release(self, allocation: Allocation, nodes: tuple[str, ...] | None = None) -> None:
        self._queue.check_reachable()
        job = self._job(allocation, jobs.find)
        if nodes is not None:
            if job is not None and job.state == "running":
                _shrink(job, nodes)
                self._queue.outdated()
            return
        if job is not None and job.state != "ended":
            jobs.cancel(job.identity)
            self._queue.outdated()
        self.forget_secrets(allocation)
        self._queue.forget(allocation.name)

    def ask(self, questions: dict[str, Question], deadline_s: float) -> dict[str, Answer]:
        from launcher.backends.slurm_probe import ask_nodes  # submitit takes 0.2 s to import

        most = max((n.gpus for n in self.pool().nodes if n.name in questions), default=0)
        return ask_nodes(self._spec, questions, deadline_s, most)

    def close(self) -> None:
        self._queue.close()

    def _script(self, allocation: Allocation) -> str:
        pool = self.pool()
        gpus = self._spec.gpus_per_node or min(
            (node.gpus for node in pool.nodes if node.gpus), default=1
        )
        return sbatch_script(
            self._spec,
            owner=allocation.owner,
            number=allocation.number,
            size=allocation.size,
            base=str(allocation.base.root),
            python=sys.executable,
            gpus_per_node=gpus,
            mark=allocation.config.mark,
            exclude=allocation.exclude,
        )

    def _job(self, allocation: Allocation, find: Callable[[str], list[Job]]) -> Job | None:
        """Our job of this name: the living one, else the one whose id was written down."""
        known = read_document(allocation.base.root / "job.json", SubmitRecord)
        found = find(allocation.name)
        found = jobs.ours(found, allocation.config.mark, known.job if known else "")
        living = [job for job in found if job.state != "ended"]
        if living:
            return living[-1]
        return found[-1] if found else None

    def _gone_or_none(self, allocation: Allocation) -> AllocationView:
        if not (allocation.base.root / "job.json").is_file():
            return AllocationView("none")
        ended = read_document(allocation.base.root / "exit.json", ExitRecord)
        reason = ended.reason if ended else "Slurm does not know the job any more"
        return AllocationView("gone", reason=reason)

    def _ending(self, allocation: Allocation, job: Job) -> str:
        ended = read_document(allocation.base.root / "exit.json", ExitRecord)
        told = f", {ended.reason}" if ended else ""
        words = {
            "TIMEOUT": "its walltime is over",
            "CANCELLED": "it was cancelled",
            "PREEMPTED": "it was preempted",
            "NODE_FAIL": "a node failed",
            "COMPLETED": "it ended",
            "COMPLETING": "it is ending",
        }
        return f"Slurm job {job.identity}: {words.get(job.slurm_state, job.slurm_state)}{told}"


def _shrink(job: Job, nodes: tuple[str, ...]) -> None:
    """Give these nodes of a running job back. The batch host cannot go: its node stays, idle."""
    going = set(nodes) - {job.batch_host}
    kept = tuple(node for node in job.nodes if node not in going)
    if kept and kept != job.nodes:
        jobs.shrink(job.identity, kept)
