"""What one round of observation saw, gaps included. Pure data."""

from dataclasses import dataclass, field
from typing import Literal

from inventory.ledger import Ledger
from launcher.documents import Report

AllocationState = Literal["none", "pending", "running", "gone", "unknown"]


@dataclass(frozen=True)
class AllocationView:
    """What the backend says of one allocation. `unknown`: it did not answer; nothing is known."""

    state: AllocationState
    identity: str = ""
    nodes: tuple[str, ...] = ()
    reason: str = ""
    expected_start: float | None = None
    ends_at: float | None = None


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


@dataclass(frozen=True)
class ReplicaView:
    allocation: AllocationView
    nodes: dict[str, NodeView] = field(default_factory=dict)


@dataclass(frozen=True)
class GatewayView:
    """The one address: whether it takes requests, and how many are under way at each replica.

    requests: by replica; None where the gateway has not told since its last orders.
    """

    is_up: bool = False
    address: str = ""
    requests: dict[str, int | None] = field(default_factory=dict)
    waiting: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Snapshot:
    """The world at `now` (seconds since the epoch, for people and deadlines of minutes)."""

    now: float
    desired: Literal["up", "down"]
    replicas: dict[str, ReplicaView]
    ledger: Ledger = field(default_factory=Ledger)
    gateway: GatewayView = field(default_factory=GatewayView)
