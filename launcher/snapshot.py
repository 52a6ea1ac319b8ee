"""What one round of observation saw, gaps included. Pure data."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from inventory.ledger import Ledger
from launcher.documents import Drill, Report
from launcher.record import Seat

AllocationState = Literal["none", "pending", "running", "gone", "unknown"]


@dataclass(frozen=True)
class NodeView:
    """What we know of one agent. Silence is measured on our own clock."""

    node: str
    report: Report | None = None
    heartbeat_silent_s: float | None = None  # None: it never answered a heartbeat of ours
    beat_silent_s: float | None = None  # None: no report was ever read
    answers_at: tuple[str, ...] = ()
    problem: str = ""
    ended: bool = False  # the backend knows that the agent's process is no more
    reachable: bool = True  # whether its disk could be read now


@dataclass(frozen=True)
class AllocationView:
    """What the backend says of one allocation. `unknown`: it did not answer; nothing is known.

    is_ordinary: gone as jobs go (walltime, preemption, a node), which says nothing of the engine.
    """

    state: AllocationState
    identity: str = ""
    nodes: tuple[str, ...] = ()
    reason: str = ""
    expected_start: float | None = None
    ends_at: float | None = None
    is_ordinary: bool = False
    agents: dict[str, NodeView] = field(default_factory=dict)


NOTHING = AllocationView("none")


@dataclass(frozen=True)
class GatewayView:
    """The one address: whether it takes requests, and how many are under way at each replica.

    requests: by replica; None where the gateway has not told since its last orders. quiet_s: for
    how long nobody has asked anything; None where that is not known.
    """

    is_up: bool = False
    address: str = ""
    requests: dict[str, int | None] = field(default_factory=dict)
    waiting: int = 0
    quiet_s: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Snapshot:
    """The world at `now` (seconds since the epoch, for people and deadlines of minutes).

    restarts: how often a person has asked for each replica to be restarted, in this run.
    drills: the faults that a person has asked for, taken up or not.
    """

    now: float
    desired: Literal["up", "down"]
    allocations: dict[str, AllocationView]
    ledger: Ledger = field(default_factory=Ledger)
    gateway: GatewayView = field(default_factory=GatewayView)
    restarts: dict[str, int] = field(default_factory=dict)
    drills: tuple[Drill, ...] = ()

    def agent(self, seat: Seat) -> NodeView:
        """What is known of this seat's agent; an empty view where nothing is."""
        view = self.allocations.get(seat.allocation, NOTHING)
        return view.agents.get(seat.node) or NodeView(seat.node)

    def agents(self, seats: Iterable[Seat]) -> dict[str, NodeView]:
        """By node, in the order of the seats."""
        return {seat.node: self.agent(seat) for seat in seats}
