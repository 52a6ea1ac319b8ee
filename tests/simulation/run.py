"""Run one seed: faults first, then peace, then rest; whatever breaks a rule is told."""

import random
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inventory.ledger import Cordon, Ledger
from launcher.apply import Executor
from launcher.backends.base import Allocation
from launcher.documents import AgentConfig
from launcher.errors import StateError
from launcher.loop import Loop
from launcher.observe import Observer
from launcher.paths import BasePaths
from launcher.planning import make_plan, new_record
from launcher.record import AllocationRecord, RunRecord
from launcher.snapshot import GatewayView
from launcher.steps import Quarantine
from launcher.verdicts import replica_phase
from launcher.wish import Wish
from tests.simulation import invariants
from tests.simulation.backends import (
    KilledError,
    Mischief,
    SimBackend,
    SimClock,
    SimHosts,
    SimPulse,
    SimSlurm,
)
from tests.simulation.invariants import BrokenError, Undisturbed
from tests.simulation.scenario import FAULTS_FOR_S, Fault, Scenario, context_of, draw
from tests.simulation.world import World

REST_WITHIN_S = 900.0
RESTED_S = 70.0  # a new controller needs a minute to know that an agent it never heard is lost
DOWN_WITHIN_S = 200.0
CONFIG = AgentConfig(fleet="sim", mark="m", package_version="0", orphan_timeout_s=1800)


@dataclass
class Outcome:
    """What became of one seed; `broken` is empty where all rules held."""

    seed: int
    broken: str = ""
    rounds: int = 0
    given_up: int = 0
    restarts: int = 0
    history: list[str] = field(default_factory=list)


class SimStore:
    """The controller's disk: in memory, full at times, and the place where controllers die."""

    def __init__(self, simulation: "Simulation") -> None:
        self._sim = simulation
        self.kept: RunRecord | None = None
        self.cordons = Ledger()
        self.full = False

    def save(self, record: RunRecord) -> None:
        if self._sim.rng.random() < self._sim.mischief.killed:
            raise KilledError
        if self.full:
            raise StateError("the disk is full", where="record.json")
        self.kept = record
        self._sim.backend.record = record

    def note(self, event: str, **details: Any) -> None:
        if event not in ("note", "assign"):
            self._sim.world.tell(f"    {event} {details}")

    def ledger(self) -> Ledger:
        return self.cordons

    def change_ledger(self, edit: Callable[[Ledger], Ledger]) -> None:
        before, self.cordons = self.cordons, edit(self.cordons)
        for cordon in self.cordons.recent:
            if cordon not in before.recent:
                # By the controllers' clock, which is all that the brake can go by.
                self._sim.quarantines.append((cordon.at, cordon.node, cordon.check))

    def keep_rendered(self, allocation: str, scripts: Mapping[str, str]) -> None:
        return


class SimGround:
    """What the executor asks of the ground it stands on."""

    def __init__(self, backend: SimBackend) -> None:
        self.backend = backend

    def allocation(self, run: int, held: AllocationRecord) -> Allocation:
        return Allocation(
            fleet="sim",
            run=run,
            owner=held.owner,
            number=held.number,
            size=held.size,
            nodes=held.nodes,
            base=BasePaths(Path(held.name)),
            config=CONFIG,
            secrets={},
            exclude=held.exclude,
        )

    def rendered(self, run: int, held: AllocationRecord) -> dict[str, str]:
        return {}


class Simulation:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(f"{scenario.seed}/world")
        names = [f"h{number}" for number in range(1, scenario.nodes + 1)]
        self.world = World(self.rng, names)
        self.world.crash_chance = scenario.crash_chance
        self.mischief = scenario.mischief
        kind = SimHosts if scenario.kind == "ssh" else SimSlurm
        self.backend: SimBackend = kind(self.world, self.rng, self.mischief)
        self._set_walltime(scenario.walltime_s)
        self.context = context_of(
            scenario.kind,
            scenario.nodes,
            scenario.replicas,
            scenario.size,
            scenario.spares,
            scenario.reschedule,
        )
        self.clock = SimClock(self.world)
        self.store = SimStore(self)
        self.wish = Wish(run=1, desired="up", at=self.world.now)
        self.quarantines: list[tuple[float, str, str]] = []
        self.undisturbed = Undisturbed()
        self.outcome = Outcome(scenario.seed)
        self._deaf_until: dict[str, float] = {}
        self._repairs: list[tuple[float, Callable[[], None]]] = []
        self._controller_away_until = 0.0
        self._finished = False
        self._calm = False
        self.loop: Loop | None = None
        self._start_controller()

    @property
    def record(self) -> RunRecord:
        assert self.loop is not None
        return self.loop.record

    def run(self) -> None:
        """Faults, then peace."""
        began = self.world.now
        pending = list(self.scenario.faults)
        while self.world.now - began < FAULTS_FOR_S:
            while pending and self.world.now - began >= pending[0].at_s:
                self._inject(pending.pop(0))
            self._turn()
        self._make_peace()
        self._await_rest()
        self._end()

    def _start_controller(self) -> None:
        self.clock.begin(self.store.kept.seen_at if self.store.kept else 0.0)
        record = self.store.kept or new_record(self.context, 1, None, self.clock.now())
        self.backend.record = self.store.kept
        ground = SimGround(self.backend)
        executor = Executor(ground, record, self.store)
        self.pulse = SimPulse(self.world, self.clock)
        observer = Observer(self.backend, self.pulse, self.clock)
        self.executor = executor
        self.loop = Loop(self.context, observer, executor, self.store, ground.allocation)

    def _turn(self) -> None:
        """One round of the controller, if there is one; then time goes on."""
        self.outcome.rounds += 1
        for at, repair in [one for one in self._repairs if one[0] <= self.world.now]:
            self._repairs.remove((at, repair))
            repair()
        acted = False
        if self.world.now >= self._controller_away_until and not self._finished:
            acted = self._controller_round()
        invariants.one_engine_per_node(self.world)
        if self.scenario.size > 1:  # a replica of one node has no peer to hold a lease on it
            invariants.nothing_serves_twice(self.world)
        invariants.brake_holds(self.quarantines)
        self.world.advance(0.5 if acted else self.rng.choice((1.0, 1.0, 2.0)))

    def _controller_round(self) -> bool:
        self.pulse.deaf = {n for n, until in self._deaf_until.items() if until > self.world.now}
        try:
            if self.loop is None:
                self._start_controller()
            assert self.loop is not None
            return self._round(self.loop)
        except KilledError:
            self.world.tell("the controller is killed")
            self.outcome.restarts += 1
            self.loop = None
            self._controller_away_until = self.world.now + self.rng.uniform(1.0, 10.0)
        except StateError:
            self.loop = None  # it begins again, as controller.main does
            self._controller_away_until = self.world.now + 2.0
        return True

    def _round(self, loop: Loop) -> bool:
        snapshot = loop.look(self.wish, GatewayView(is_up=True))
        self.undisturbed.look(self.world, loop.record, self.pulse.deaf, self.wish.restarts)
        plan = make_plan(self.context, loop.record, snapshot)
        again = make_plan(self.context, loop.record, snapshot)
        if plan != again:
            raise BrokenError("the same snapshot gave two plans")
        checked = loop.plan(snapshot)
        if checked.steps != plan.steps:
            raise BrokenError(f"the linter refused: {'; '.join(checked.waiting_for)}")
        if self.wish.desired == "up":
            self.undisturbed.check(self.world, loop.record, plan)
        for step in plan.steps:
            self._check_cordons(step)
        acts = len(self.backend.acts)
        loop.apply(plan, snapshot)
        quiet = self.mischief.lost_before == self.mischief.lost_after == 0
        if quiet and len(self.backend.acts) > acts and not self.mischief.scheduler_down:
            if all(self.world.in_sight(name) for name in self.world.nodes):
                invariants.nothing_repeated(plan, make_plan(self.context, loop.record, snapshot))
        self._finished = plan.finished
        self._calm = not plan.steps and not plan.waiting_for
        self._waits = plan.waiting_for
        return bool(plan.steps)

    def _check_cordons(self, step: object) -> None:
        if isinstance(step, Quarantine) and step.cordon.node not in self.world.nodes:
            raise BrokenError(f"{step.cordon.node} is no node")

    # --- faults ---

    def _inject(self, fault: Fault) -> None:
        until = self.world.now + fault.for_s
        self.world.tell(f"FAULT {fault.kind} {fault.node} for {fault.for_s:.0f} s")
        if fault.kind in ("agent", "engine", "stubborn"):
            self._at_agent(fault, until)
        elif fault.kind in ("power", "cut", "switch"):
            self._at_machine(fault, until)
        else:
            self._at_controller(fault, until)

    def _at_machine(self, fault: Fault, until: float) -> None:
        world, node = self.world, fault.node
        if fault.kind == "power":
            world.power_off(node)
            self._repairs.append((until, lambda: world.power_on(node)))
            return
        for name in [node] if fault.kind == "cut" else list(world.nodes)[::2]:
            world.link(name, up=False)
            self._repairs.append((until, lambda name=name: world.link(name, up=True)))

    def _at_controller(self, fault: Fault, until: float) -> None:
        node = fault.node
        match fault.kind:
            case "deaf":
                self._deaf_until[node] = until
            case "unfit":
                self.world.nodes[node].fault = "gpu.remap_failed"
            case "rollout":  # of a driver: every node fails the same check
                for one in self.world.nodes.values():
                    one.fault = "gpu.driver"
            case "cordon":
                cordon = Cordon(node=node, kind="manual", reason="x", at=self.world.now, by="me")
                self.store.cordons = self.store.cordons.with_cordon(cordon)
                self._repairs.append((until, lambda: self._uncordon(node)))
            case "restart":
                self._ask_for_restarts(("r1",))
            case "clock":
                self.clock.offset_s += fault.value
            case "scheduler":
                self.mischief.scheduler_down = True
                self._repairs.append((until, self._scheduler_back))
            case "controller":
                self.loop = None
                self._controller_away_until = max(until, self._controller_away_until)
            case "disk":
                self.store.full = True
                self._repairs.append((until, self._disk_free))
            case _:
                raise BrokenError(f"no such fault: {fault.kind}")

    def _at_agent(self, fault: Fault, until: float) -> None:
        there = [a for a in self.world.agents.values() if a.alive and a.node == fault.node]
        for agent in there:
            if fault.kind == "agent":
                self.world.kill_agent(agent)
            elif fault.kind == "engine":
                number = self.rng.randint(1, 1000)
                self.world.crash_engine(agent, f"serve was killed, case {number}")
            else:
                agent.stubborn_until = until

    def _uncordon(self, node: str) -> None:
        self.store.cordons = self.store.cordons.without(node)

    def _set_walltime(self, walltime_s: float) -> None:
        if isinstance(self.backend, SimSlurm):
            self.backend.walltime_s = walltime_s

    def _scheduler_back(self) -> None:
        self.mischief.scheduler_down = False

    def _disk_free(self) -> None:
        self.store.full = False

    def _ask_for_restarts(self, names: tuple[str, ...]) -> None:
        restarts = dict(self.wish.restarts)
        for name in names:
            restarts[name] = restarts.get(name, 0) + 1
        self.wish = self.wish.model_copy(update={"restarts": restarts})

    # --- peace, rest, and the end ---

    def _make_peace(self) -> None:
        self.world.tell("PEACE")
        for _, repair in self._repairs:
            repair()
        self._repairs = []
        for name, node in self.world.nodes.items():
            self.world.power_on(name)
            self.world.link(name, up=True)
            node.fault = ""
            self._uncordon(name)
        self._deaf_until = {}
        self.world.crash_chance = 0.0
        self._set_walltime(0.0)
        self.mischief.lost_before = self.mischief.lost_after = self.mischief.killed = 0.0
        self._controller_away_until = min(self._controller_away_until, self.world.now + 5)

    def _await_rest(self) -> None:
        """All replicas serve, the spares are there, and nothing is left to do."""
        began = at_rest_since = self.world.now
        asked = False
        while self.world.now - began < REST_WITHIN_S:
            self._turn()
            if self._finished:
                self.outcome.given_up += 1
                self._check_nothing_left()
                return
            if self.loop is None:
                continue
            over = tuple(one.name for one in self.record.replicas.values() if one.over)
            if self.world.now - began > 60:
                for name in self.world.nodes:
                    self._uncordon(name)  # a person has looked at the machines
            if over and not asked and self.world.now - began > 30:
                self.outcome.given_up += len(over)
                self._ask_for_restarts(over)
                asked = True
            if not self._rests():
                at_rest_since = self.world.now
            elif self.world.now - at_rest_since > RESTED_S:
                self._check_plan_is_empty()
                return
        raise BrokenError(f"no rest after {REST_WITHIN_S:.0f} s: {self._state()}")

    def _rests(self) -> bool:
        assert self.loop is not None
        snapshot = self.loop.look(self.wish, GatewayView(is_up=True))
        phases = [replica_phase(one, snapshot) for one in self.record.replicas.values()]
        return self._calm and all(phase == "serving" for phase in phases)

    def _check_plan_is_empty(self) -> None:
        assert self.loop is not None
        snapshot = self.loop.look(self.wish, GatewayView(is_up=True))
        plan = make_plan(self.context, self.record, snapshot)
        if plan.steps or plan.waiting_for:
            raise BrokenError(f"the plan of a fleet at rest is not empty: {plan}")
        sitting = {(s.allocation, s.node) for r in self.record.replicas.values() for s in r.seats}
        warm = [
            agent for key, agent in self.world.agents.items() if agent.alive and key not in sitting
        ]
        if len(warm) != self.scenario.spares:
            names = [f"{agent.allocation}/{agent.node}" for agent in warm]
            # What was asked for at once goes at once: a node too many stays beside one in use.
            used = {name for name, _ in sitting}
            count = Counter(agent.allocation for agent in warm)
            extra = [a for a in warm if a.allocation in used or count[a.allocation] > 1]
            if len(warm) - len(extra) > self.scenario.spares or not extra:
                raise BrokenError(f"{self.scenario.spares} spares are wanted, there are {names}")

    def _end(self) -> None:
        if self._finished:
            return
        self.world.tell("DOWN")
        self.wish = self.wish.model_copy(update={"desired": "down"})
        began = self.world.now
        while not self._finished:
            self._turn()
            if self.world.now - began > DOWN_WITHIN_S:
                raise BrokenError(f"down does not end: {self._state()}")
        self._check_nothing_left()

    def _check_nothing_left(self) -> None:
        # What could not be reached at the end, and was told, ends by itself as an orphan.
        self.world.heard_by_controller = set()
        told = self.store.kept is not None and bool(self.store.kept.leftovers)
        self.world.advance(2000.0 if told else 60.0)
        if isinstance(self.backend, SimSlurm):
            self.backend._schedule()
            jobs = [job.name for job in self.backend.jobs.values() if job.state != "gone"]
            if jobs:
                raise BrokenError(f"jobs are left: {jobs}")
        # A replica of one node that serves out of our sight goes on: no peer ends its lease. What
        # could not be reached is named as left over.
        left = [
            f"{agent.allocation}/{agent.node}"
            for agent in self.world.agents.values()
            if agent.alive and not (told and agent.engine and self.scenario.size == 1)
        ]
        if left:
            raise BrokenError(f"agents are left: {left}")

    def _state(self) -> str:
        record = self.store.kept
        if record is None:
            return "no record"
        replicas = [
            f"{one.name} g{one.generation} {one.intent} seats {[s.node for s in one.seats]} "
            f"ranked {one.ranked_at is not None} over {one.over} {one.story[-2:]}"
            for one in record.replicas.values()
        ]
        held = [
            f"{one.name} {one.nodes} ending {one.ending_at is not None}"
            for one in record.allocations.values()
            if not one.released
        ]
        return f"{replicas}; {held}; waits {getattr(self, '_waits', ())}"


def run_seed(seed: int) -> Outcome:
    """One seed from beginning to end; never raises."""
    simulation: Simulation | None = None
    try:
        simulation = Simulation(draw(seed))
        simulation.run()
    except BrokenError as error:
        broken = str(error)
    except Exception:  # noqa: BLE001 - a crash of our own code is what this is for
        broken = traceback.format_exc(limit=-6)
    else:
        return simulation.outcome
    if simulation is None:
        return Outcome(seed, broken=broken)
    simulation.outcome.broken = broken
    simulation.outcome.history = [str(simulation.scenario), *simulation.world.history]
    return simulation.outcome


__all__ = ["Mischief", "Outcome", "run_seed"]
