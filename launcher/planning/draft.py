"""One round's plan in the making: what was decided so far, for the parts that come after. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from health.report import Finding
from inventory.ledger import Cordon
from launcher.record import AllocationRecord, ReplicaRecord, RunRecord, Seat
from launcher.snapshot import NOTHING, AllocationView, NodeView, Snapshot
from launcher.steps import Allocate, Context, Quarantine, Step
from launcher.verdicts import is_dead, is_lost, is_silent

PAUSE_MAX_S = 60.0
# A spare's successor is asked for so long before its walltime ends, for it may have to queue; a
# job of less than two hours gives a quarter of its time.
SUCCESSOR_S = 1800.0


@dataclass
class Draft:
    """taken: seats that were given away in this round."""

    context: Context
    record: RunRecord
    snapshot: Snapshot
    steps: list[Step] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    taken: set[Seat] = field(default_factory=set)
    fit: list[Seat] | None = None  # who stands by, looked up once

    @property
    def now(self) -> float:
        return self.snapshot.now

    @property
    def is_all_over(self) -> bool:
        """Whether no replica is wanted any more: spares alone do not keep a fleet."""
        return all(replica.over for replica in self.record.replicas.values())

    def do(self, *steps: Step) -> None:
        self.steps += steps

    def wait(self, about: str, reason: str) -> None:
        self.waits.append(f"{about}: {reason}")

    def view(self, allocation: str) -> AllocationView:
        return self.snapshot.allocations.get(allocation, NOTHING)

    @cached_property
    def living(self) -> list[AllocationRecord]:
        """Allocations that are not being given back."""
        return [
            one
            for one in self.record.allocations.values()
            if not one.released and one.ending_at is None
        ]

    @cached_property
    def living_of(self) -> dict[str, list[AllocationRecord]]:
        """The same, by owner."""
        found: dict[str, list[AllocationRecord]] = {}
        for one in self.living:
            found.setdefault(one.owner, []).append(one)
        return found

    @cached_property
    def sitting(self) -> dict[Seat, ReplicaRecord]:
        """Who sits where; a replica that is over sits nowhere."""
        return {
            seat: replica
            for replica in self.record.replicas.values()
            if not replica.over
            for seat in replica.seats
        }

    @cached_property
    def _free(self) -> dict[str, None]:
        """In the pool's order, those that were lost of late last."""
        held = {
            node
            for one in self.record.allocations.values()
            if not one.released
            for node in one.nodes
        }
        barred = held | self.snapshot.ledger.cordons.keys()
        free = [node for node in self.context.pool if node not in barred]
        return dict.fromkeys(sorted(free, key=lambda node: bool(self.record.losses.get(node))))

    def is_usable(self, seat: Seat) -> bool:
        """Whether the agent there lives, or is still expected, in an allocation that is kept."""
        held = self.record.allocations.get(seat.allocation)
        if held is None or held.released or held.ending_at is not None:
            return False
        if seat.node not in held.nodes or self.view(held.name).state == "gone":
            return False
        agent = self.snapshot.agent(seat)
        if agent.report is None:
            limit_s = self.context.spec.limits.agents
            return self.now - (held.running_at or self.now) <= limit_s
        return not is_lost(agent) and not is_dead(agent) and not self.is_told_to_stop(seat)

    def is_fresh(self, seat: Seat) -> bool:
        """Whether a rank may be given there: usable, and not about to be found lost."""
        agent = self.snapshot.agent(seat)
        return self.is_usable(seat) and (agent.report is None or not is_silent(agent))

    def lasts(self, allocation: str) -> bool:
        """Whether its walltime is far from over, as far as that is known."""
        held = self.record.allocations[allocation]
        ends_at = self.view(allocation).ends_at
        if ends_at is None or held.running_at is None:
            return True
        lead_s = min(SUCCESSOR_S, (ends_at - held.running_at) / 4)
        return ends_at - self.now > lead_s

    def is_told_to_stop(self, seat: Seat) -> bool:
        order = self.record.order(seat)
        return order is not None and order.goal == "stopped"

    def free_nodes(self, count: int, near: tuple[str, ...] = ()) -> list[str]:
        """Nodes of the pool that nobody holds and nobody has cordoned; the nearest first."""
        if not near or not self.context.places:
            return list(islice(self._free, count))
        return sorted(self._free, key=lambda node: self.distance(node, near))[:count]

    def refused(self, size: int) -> set[str]:
        """Nodes that Slurm shall not choose. A spare beside the rank that it is to replace would
        die with it: who is asked for alone must not come onto a node of ours."""
        refused = self.snapshot.ledger.cordons.keys() & set(self.context.known)
        if size < self.context.spec.nodes or self.context.spec.nodes == 1:
            refused |= {node for held in self.living for node in held.nodes}
        return refused

    def distance(self, node: str, near: tuple[str, ...]) -> int:
        """How far a node is from a replica's others: 0 same switch, 1 same rack, 2 neither."""
        places = self.context.places
        mine = places.get(node, ())
        levels = [
            next(
                (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a and a == b), 2
            )
            for other in near
            if (theirs := places.get(other, ()))
        ]
        return max(levels, default=0)

    def brake(self, check: str, nodes: Iterable[str]) -> str:
        """Why these nodes may not all be quarantined for this check now; empty if they may. What
        this round has decided counts."""
        ledger = self.snapshot.ledger
        for step in self.steps:
            if isinstance(step, Quarantine):
                ledger = ledger.with_cordon(step.cordon)
        for node in nodes:
            if why := ledger.brake(check, len(self.context.known), self.now):
                return why
            cordon = Cordon(
                node=node, kind="quarantine", reason=check, at=self.now, by="", check=check
            )
            ledger = ledger.with_cordon(cordon)
        return ""

    def quarantine(self, about: str, node: str, finding: Finding, boot_id: str = "") -> None:
        """Let no new work onto this node, with what was found there."""
        device = f"{finding.device}: " if finding.device else ""
        cordon = Cordon(
            node=node,
            kind="quarantine",
            reason=f"{device}{finding.message}",
            at=self.now,
            by=f"fleet {self.context.spec.name}",
            check=finding.check,
            device=finding.device,
            advice=finding.advice,
            boot_id=boot_id,
        )
        self.do(Quarantine(about, cordon))

    def allocate(self, owner: str, size: int, nodes: tuple[str, ...]) -> None:
        """Ask for nodes: these, or any but the cordoned ones and our own where Slurm chooses."""
        number = self.record.counts.get(owner, 0) + 1
        exclude: tuple[str, ...] = ()
        if not self.context.pool:
            exclude = tuple(sorted(self.refused(size)))
        for node in nodes:
            self._free.pop(node, None)
        self.do(Allocate(owner, number, size, nodes, exclude))


def agent_views(draft: Draft, replica: ReplicaRecord) -> dict[str, NodeView]:
    return draft.snapshot.agents(replica.seats)


def rests(until: float, now: float) -> bool:
    """Whether a pause goes on; a clock that was set back does not prolong it."""
    return 0 < until - now <= PAUSE_MAX_S
