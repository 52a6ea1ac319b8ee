"""The simulated ways to nodes: hosts by SSH, and Slurm with a queue and other users. Fakes."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from launcher.backends.base import Allocation, Seen
from launcher.documents import Assignment
from launcher.errors import RemoteError, SlurmError
from launcher.pulse import Contact, Target
from launcher.record import RunRecord
from launcher.snapshot import AllocationView
from tests.simulation.world import SimError, World


class KilledError(Exception):
    """The controller dies at this instant."""


@dataclass
class Mischief:
    """How often the outside misbehaves, as probabilities for each call."""

    lost_before: float = 0.0  # the call fails, nothing was done
    lost_after: float = 0.0  # it was done, the answer was lost
    killed: float = 0.0  # the controller is killed, before or after the act
    scheduler_down: bool = False


@dataclass
class SimBackend:
    """What both kinds share: mischief around each act, reports that arrive late."""

    world: World
    rng: random.Random
    mischief: Mischief
    kind: str = "ssh"
    shares_machine: bool = False
    chooses_nodes: bool = False
    record: RunRecord | None = None  # what the store holds: an act without intent is a fault
    acts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        return

    def _around(self, name: str) -> bool:
        """Whether the act's answer is lost. Raises where it is not done at all."""
        self.acts.append(name)
        if self.rng.random() < self.mischief.killed:
            raise KilledError
        if self.rng.random() < self.mischief.lost_before:
            raise self._error()
        return self.rng.random() < self.mischief.lost_after

    def _end(self, *, lost: bool) -> None:
        if self.rng.random() < self.mischief.killed:
            raise KilledError
        if lost:
            raise self._error()

    def _error(self) -> Exception:
        return RemoteError("timeout", "no answer", where="sim")

    def assign(self, allocation: Allocation, node: str, assignment: Assignment) -> None:
        held = self.record.allocations[allocation.base.root.name] if self.record else None
        if held is None or held.assignments.get(node) != assignment:
            raise SimError(f"{node} is assigned without an intent on disk")
        lost = self._around(f"assign {node}")
        if self.kind == "ssh" and not self.world.in_sight(node):
            raise self._error()
        self.world.assign(allocation.base.root.name, node, assignment)
        self._end(lost=lost)

    def _sweep(self, name: str, node: str) -> None:
        """What serves as it should is not swept."""
        agent = self.world.agents.get((name, node))
        serves = agent and agent.alive and agent.engine and agent.engine.serving
        for replica in self.record.replicas.values() if self.record and serves else ():
            sits = any((seat.allocation, seat.node) == (name, node) for seat in replica.seats)
            ranked = replica.ranked_at is not None and not replica.is_restarting
            if sits and ranked and replica.intent == "up" and agent.engine.gone_at is None:
                raise SimError(f"{name}/{node} serves {replica.name} and is swept")
        self.world.sweep(name, node)

    def look(self, allocation: Allocation, nodes: tuple[str, ...]) -> dict[str, Seen]:
        name = allocation.base.root.name
        seen = {}
        for node in nodes:
            agent = self.world.agents.get((name, node))
            if self.kind == "ssh" and not self.world.in_sight(node):
                seen[node] = Seen(problem="no route to host")
            else:
                seen[node] = Seen(agent.report if agent else None)
        return seen

    def commands(self, allocation: Allocation) -> dict[str, str]:
        return {}

    def close(self) -> None:
        return


class SimHosts(SimBackend):
    """As launcher.backends.ssh: agents on hosts that are named."""

    def allocate(self, allocation: Allocation) -> None:
        name = allocation.base.root.name
        if self.record is None or name not in self.record.allocations:
            raise SimError(f"{name} is asked for without an intent on disk")
        lost = self._around(f"allocate {name}")
        away = [node for node in allocation.nodes if not self.world.in_sight(node)]
        for node in allocation.nodes:
            if node not in away:
                self.world.start_agent(name, node)
        if away:
            raise RemoteError("unreachable", "no route to host", where=away[0])
        self._end(lost=lost)

    def observe(self, allocation: Allocation) -> AllocationView:
        return AllocationView("running", identity="hosts", nodes=allocation.nodes)

    def release(self, allocation: Allocation, nodes: tuple[str, ...] | None = None) -> None:
        name = allocation.base.root.name
        lost = self._around(f"release {name}")
        away = []
        for node in allocation.nodes if nodes is None else nodes:
            if self.world.in_sight(node):
                self._sweep(name, node)
            else:
                away.append(node)
        if away:
            raise RemoteError("unreachable", "no route to host", where=away[0])
        self._end(lost=lost)


@dataclass
class Job:
    name: str
    size: int
    exclude: tuple[str, ...]
    starts_at: float
    state: str = "pending"
    nodes: tuple[str, ...] = ()
    began_at: float = 0.0


class SimSlurm(SimBackend):
    """As launcher.backends.slurm with --no-kill: a queue, jobs that outlive a lost node, a
    controller that is away at times. Nodes it believes down are not given out."""

    def __post_init__(self) -> None:
        self.kind, self.chooses_nodes = "slurm", True
        self.jobs: dict[str, Job] = {}
        self.down_after_s = 40.0
        self.walltime_s = 0.0
        self._down_since: dict[str, float] = {}

    def _error(self) -> Exception:
        return SlurmError("Slurm's controller does not answer", unreachable=True)

    def allocate(self, allocation: Allocation) -> None:
        name = allocation.base.root.name
        if self.record is None or name not in self.record.allocations:
            raise SimError(f"{name} is submitted without an intent on disk")
        if name in self.jobs and self.jobs[name].state != "gone":
            return  # found by its name and mark
        if self.mischief.scheduler_down:
            raise self._error()
        # An answer that is lost is looked up by name: to the caller it was not lost.
        self._around(f"submit {name}")
        wait_s = self.rng.choice((1.0, 2.0, 2.0, 30.0))
        starts_at = self.world.now + wait_s
        self.jobs[name] = Job(name, allocation.size, allocation.exclude, starts_at)
        self._end(lost=False)

    def observe(self, allocation: Allocation) -> AllocationView:
        self._schedule()
        if self.mischief.scheduler_down:
            return AllocationView("unknown", reason="Slurm's controller does not answer")
        job = self.jobs.get(allocation.base.root.name)
        if job is None:
            return AllocationView("none")
        state = {"pending": "pending", "running": "running", "gone": "gone"}[job.state]
        ends_at = job.began_at + self.walltime_s if self.walltime_s and job.nodes else None
        return AllocationView(
            state, f"job {job.name}", job.nodes, reason=job.state, ends_at=ends_at
        )

    def release(self, allocation: Allocation, nodes: tuple[str, ...] | None = None) -> None:
        if self.mischief.scheduler_down:
            raise self._error()
        lost = self._around(f"cancel {allocation.base.root.name}")
        job = self.jobs.get(allocation.base.root.name)
        if job is not None and nodes is not None:
            self._shrink(job, nodes)
        elif job is not None:
            for node in job.nodes:
                if self.world.in_sight(node):
                    self._sweep(job.name, node)
            self.end(job)
        self._end(lost=lost)

    def end(self, job: Job) -> None:
        """Steps on nodes that are away go on until slurmd hears of it: Slurm does not fence."""
        job.state = "gone"
        for node in job.nodes:
            if self.world.in_sight(node):
                self.world.sweep(job.name, node)

    def _shrink(self, job: Job, nodes: Iterable[str]) -> None:
        """The job keeps its other nodes; a step on a node in sight is killed."""
        gone = set(nodes)
        job.nodes = tuple(node for node in job.nodes if node not in gone)
        for node in gone:
            if self.world.in_sight(node):
                self.world.sweep(job.name, node)

    def _believed_down(self) -> set[str]:
        for name in self.world.nodes:
            if self.world.in_sight(name):
                self._down_since.pop(name, None)
            else:
                self._down_since.setdefault(name, self.world.now)
        return {
            name
            for name, at in self._down_since.items()
            if self.world.now - at > self.down_after_s
        }

    def _schedule(self) -> None:
        down = self._believed_down()
        self._end_jobs(down)
        self._start_jobs(down)

    def _end_jobs(self, down: set[str]) -> None:
        for job in self.jobs.values():
            if job.state == "running" and down & set(job.nodes):
                self._shrink(job, down)  # --no-kill
                if not job.nodes:
                    job.state = "gone"
            if job.state == "running" and 0 < self.walltime_s < self.world.now - job.began_at:
                self.world.tell(f"the walltime of {job.name} is over")
                self.end(job)
        for job in self.jobs.values():
            agents = [self.world.agents[job.name, node] for node in job.nodes]
            if job.state == "running" and not any(agent.alive for agent in agents):
                job.state = "gone"  # its supervisor sees that all agents have ended
        for agent in self.world.agents.values():
            job = self.jobs.get(agent.allocation)
            gone = job is None or job.state == "gone" or agent.node not in job.nodes
            if agent.alive and self.world.in_sight(agent.node) and gone:
                self.world.sweep(agent.allocation, agent.node)  # slurmd has heard of it

    def _start_jobs(self, down: set[str]) -> None:
        held = {node for job in self.jobs.values() if job.state == "running" for node in job.nodes}
        # A node on which an ended job's step may still run is completing, and not given out.
        held |= {
            agent.node
            for agent in self.world.agents.values()
            if agent.alive and agent.allocation in self.jobs
        }
        for job in self.jobs.values():
            if job.state != "pending" or self.world.now < job.starts_at:
                continue
            free = [
                name
                for name in self.world.nodes
                if name not in held
                and name not in down
                and name not in job.exclude
                and self.world.in_sight(name)
            ]
            if len(free) < job.size:
                continue
            job.state, job.nodes = "running", tuple(free[: job.size])
            job.began_at = self.world.now
            held |= set(job.nodes)
            for node in job.nodes:
                self.world.start_agent(job.name, node)


class SimPulse:
    """The controller's heartbeats: an agent that is in sight has answered just now."""

    def __init__(self, world: World, clock: "SimClock") -> None:
        self._world = world
        self._clock = clock
        self._answered: dict[str, float] = {}
        self.deaf: set[str] = set()  # a firewall for a while: no heartbeats get through

    def aim(self, targets: dict[str, Target]) -> None:
        self._world.heard_by_controller = set(targets)

    def contact(self, node: str) -> Contact:
        allocation, name = node.split("/")
        agent = self._world.agents.get((allocation, name))
        in_sight = self._world.in_sight(name) and name not in self.deaf
        if agent is not None and agent.alive and in_sight:
            self._answered[node] = self._clock.monotonic()
        number = int(name[1:])
        address = f"10.0.{number // 250}.{number % 250 + 1}"
        return Contact(self._answered.get(node), 0, (address,))


class SimClock:
    """The controller's clocks: the wall clock may be set; a controller that runs reads it once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.offset_s = 0.0
        self._offset_seen_s = 0.0

    def begin(self, at_least: float) -> None:
        """A new controller looks at the wall, and at what the one before it noted."""
        self._offset_seen_s = max(self.offset_s, at_least - self._world.now)

    def now(self) -> float:
        return self._world.now + self._offset_seen_s

    def monotonic(self) -> float:
        return self._world.now
