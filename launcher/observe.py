"""One dated look at the world: allocations, reports, heartbeats. I/O; decides nothing."""

import time
from typing import Literal

from inventory.ledger import Ledger
from launcher.backends.base import Allocation, Backend, Seen
from launcher.errors import FleetError
from launcher.pulse import Pulse, Target
from launcher.record import ReplicaRecord, RunRecord
from launcher.snapshot import AllocationView, GatewayView, NodeView, ReplicaView, Snapshot


class Observer:
    """Remembers when each agent was last heard of, on this process's own clock.

    An agent is a node in one allocation: what an earlier allocation's agent said there (its port,
    its phase) is not true of the next one.
    """

    def __init__(self, backend: Backend, pulse: Pulse | None) -> None:
        self._backend = backend
        self._pulse = pulse
        self._beats: dict[tuple[str, str], tuple[int, float]] = {}
        self._last_seen: dict[tuple[str, str], Seen] = {}

    def observe(
        self,
        record: RunRecord,
        allocations: dict[str, Allocation],
        desired: Literal["up", "down"],
        ledger: Ledger,
        gateway: GatewayView,
    ) -> Snapshot:
        """A snapshot with a view of every replica; what could not be seen is in it as unknown."""
        views = {}
        targets: dict[str, Target] = {}
        for name, replica in record.replicas.items():
            allocation = allocations.get(name)
            if allocation is None or replica.intent == "none":
                views[name] = ReplicaView(AllocationView("none"))
                continue
            views[name] = self._replica(replica, allocation, targets)
        if self._pulse:
            self._pulse.aim(targets)
        return Snapshot(
            now=time.time(), desired=desired, replicas=views, ledger=ledger, gateway=gateway
        )

    def _replica(
        self, replica: ReplicaRecord, allocation: Allocation, targets: dict[str, Target]
    ) -> ReplicaView:
        if replica.released:
            view = AllocationView("gone")
        else:
            try:
                view = self._backend.observe(allocation)
            except FleetError as error:
                view = AllocationView("unknown", reason=str(error))
        nodes = replica.nodes or view.nodes
        if not replica.released and nodes:
            try:
                seen = self._backend.look(allocation, nodes)
            except FleetError as error:
                seen = {node: Seen(problem=str(error)) for node in nodes}
        else:
            seen = {node: self._last_seen.get((allocation.name, node), Seen()) for node in nodes}
        return ReplicaView(
            view,
            {
                node: self._node(replica, (allocation.name, node), seen[node], targets)
                for node in nodes
            },
        )

    def _node(
        self,
        replica: ReplicaRecord,
        agent: tuple[str, str],
        seen: Seen,
        targets: dict[str, Target],
    ) -> NodeView:
        now = time.monotonic()
        node = agent[1]
        if seen.report is None and agent in self._last_seen:
            seen = Seen(self._last_seen[agent].report, seen.problem, seen.ended)
        elif seen.report is not None:
            self._last_seen[agent] = seen
        report = seen.report
        if report is None:
            return NodeView(node, problem=seen.problem)
        beat, since = self._beats.get(agent, (-1, now))
        if report.beat != beat:
            beat, since = report.beat, now
        self._beats[agent] = (beat, since)
        targets[node] = Target(
            tuple(address.ip for address in report.addresses),
            report.heartbeat_port,
            replica.revision_of(node),
        )
        contact = self._pulse.contact(node) if self._pulse else None
        silent = now - contact.answered_at if contact and contact.answered_at else None
        return NodeView(
            node=node,
            report=report,
            heartbeat_silent_s=silent,
            beat_silent_s=now - since,
            answers_at=contact.addresses if contact else (),
            problem=seen.problem,
            ended=seen.ended,
        )
