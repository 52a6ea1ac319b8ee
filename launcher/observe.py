"""One dated look at the world: allocations, reports, heartbeats. I/O; decides nothing."""

import time
from dataclasses import replace
from typing import Literal, Protocol

from inventory.ledger import Ledger
from launcher.backends.base import Allocation, Backend, Seen
from launcher.documents import Drill
from launcher.errors import FleetError
from launcher.pulse import Contact, Target
from launcher.record import AllocationRecord, RunRecord
from launcher.snapshot import AllocationView, GatewayView, NodeView, Snapshot


class Clock(Protocol):
    """now: seconds since the epoch, for people. monotonic: for silence and deadlines."""

    def now(self) -> float: ...

    def monotonic(self) -> float: ...


class Heartbeats(Protocol):
    """Who asks the agents whether they live."""

    def aim(self, targets: dict[str, Target]) -> None: ...

    def contact(self, node: str) -> Contact: ...


class RealClock:
    """The wall clock as it was at the start, carried on by the monotonic one: a clock that is set
    while we run moves no deadline. at_least: the latest time that an earlier controller noted."""

    def __init__(self, at_least: float = 0.0) -> None:
        self._began_at = max(time.time(), at_least) - time.monotonic()

    def now(self) -> float:
        return self._began_at + time.monotonic()

    def monotonic(self) -> float:
        return time.monotonic()


class Observer:
    """Remembers when each agent was last heard of, on this process's own clock.

    An agent is a node in one allocation: what an earlier allocation's agent said there (its port,
    its phase) is not true of the next one.
    """

    def __init__(
        self, backend: Backend, pulse: Heartbeats | None, clock: Clock | None = None
    ) -> None:
        self._backend = backend
        self._pulse = pulse
        self._clock = clock or RealClock()
        self._beats: dict[tuple[str, str], tuple[int, float]] = {}
        self._last_seen: dict[tuple[str, str], Seen] = {}

    def observe(
        self,
        record: RunRecord,
        allocations: dict[str, Allocation],
        desired: Literal["up", "down"],
        ledger: Ledger,
        gateway: GatewayView,
        restarts: dict[str, int] | None = None,
        drills: tuple[Drill, ...] = (),
    ) -> Snapshot:
        """A view of every allocation; what could not be seen is in it as unknown."""
        targets: dict[str, Target] = {}
        views = {
            name: self._allocation(held, allocations[name], targets)
            for name, held in record.allocations.items()
        }
        if self._pulse:
            self._pulse.aim(targets)
        return Snapshot(
            now=self._clock.now(),
            desired=desired,
            allocations=views,
            ledger=ledger,
            gateway=gateway,
            restarts=restarts or {},
            drills=drills,
        )

    def _allocation(
        self, held: AllocationRecord, allocation: Allocation, targets: dict[str, Target]
    ) -> AllocationView:
        if held.released:
            view = AllocationView("gone", nodes=held.nodes)
            seen = {node: self._last_seen.get((held.name, node), Seen()) for node in held.nodes}
        else:
            view, seen = self._look(held, allocation)
        agents = {
            node: self._node(held, (held.name, node), one, targets) for node, one in seen.items()
        }
        return replace(view, agents=agents)

    def _look(
        self, held: AllocationRecord, allocation: Allocation
    ) -> tuple[AllocationView, dict[str, Seen]]:
        try:
            view = self._backend.observe(allocation)
        except FleetError as error:
            view = AllocationView("unknown", reason=str(error))
        nodes = held.nodes or view.nodes
        if not nodes:
            return view, {}
        try:
            return view, self._backend.look(allocation, nodes)
        except FleetError as error:
            return view, {node: Seen(problem=str(error)) for node in nodes}

    def _node(
        self,
        held: AllocationRecord,
        agent: tuple[str, str],
        seen: Seen,
        targets: dict[str, Target],
    ) -> NodeView:
        now = self._clock.monotonic()
        node = agent[1]
        if seen.report is None and agent in self._last_seen:
            seen = Seen(self._last_seen[agent].report, seen.problem, seen.ended)
        elif seen.report is not None:
            self._last_seen[agent] = seen
        report = seen.report
        if report is None:
            return NodeView(node, problem=seen.problem, reachable=seen.ended or not seen.problem)
        beat, since = self._beats.get(agent, (-1, now))
        if report.beat != beat:
            beat, since = report.beat, now
        self._beats[agent] = (beat, since)
        target = "/".join(agent)
        if not held.released:
            targets[target] = Target(
                tuple(address.ip for address in report.addresses),
                report.heartbeat_port,
                held.revision_of(node),
            )
        contact = self._pulse.contact(target) if self._pulse else None
        silent = now - contact.answered_at if contact and contact.answered_at else None
        return NodeView(
            node=node,
            report=report,
            heartbeat_silent_s=silent,
            beat_silent_s=now - since,
            answers_at=contact.addresses if contact else (),
            problem=seen.problem,
            ended=seen.ended,
            reachable=seen.ended or not seen.problem,
        )
