"""What a plan is made of: steps, exact enough to need no choice, and their context. Pure."""

from dataclasses import dataclass, field
from typing import Any

from inventory.ledger import Cordon, Passed
from launcher.documents import Assignment
from launcher.layout import Layout
from launcher.record import Failure
from launcher.spec import FleetSpec


@dataclass(frozen=True)
class Allocate:
    """Get agents onto nodes. `nodes` is empty where the backend chooses (Slurm), but for those
    in `exclude`."""

    replica: str
    allocation: int
    nodes: tuple[str, ...]
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assign:
    """Write one node's assignment.json."""

    replica: str
    node: str
    assignment: Assignment


@dataclass(frozen=True)
class Fail:
    """Give the replica up: from here on it is only taken down."""

    replica: str
    failure: Failure


@dataclass(frozen=True)
class Down:
    """Begin to end the replica as the user wished."""

    replica: str


@dataclass(frozen=True)
class Release:
    """Give the allocation back and sweep what it left."""

    replica: str
    allocation: int


@dataclass(frozen=True)
class Note:
    """Remember an observed fact about the replica (when it started, that it serves)."""

    replica: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Quarantine:
    """Let no new work onto this node, with the evidence."""

    replica: str
    cordon: Cordon


@dataclass(frozen=True)
class Swap:
    """Give the allocation back and begin again on other nodes; `story` says why."""

    replica: str
    story: str


@dataclass(frozen=True)
class Pass:
    """Remember that these nodes can talk with each other."""

    replica: str
    passed: Passed


Step = Pass | Allocate | Assign | Fail | Down | Release | Note | Quarantine | Swap


@dataclass(frozen=True)
class Plan:
    steps: tuple[Step, ...] = ()
    waiting_for: tuple[str, ...] = ()
    finished: bool = False


@dataclass(frozen=True)
class Context:
    """What does not change during a run: the spec, its layout, and how nodes are to be used."""

    spec: FleetSpec
    layout: Layout
    scripts: dict[str, str]
    user_id: int
    pool: tuple[str, ...] = ()  # empty: the backend chooses nodes
    known: tuple[str, ...] = ()  # every node that there is, also where the backend chooses
    shares_machine: bool = False
    gpus_per_node: int = 1
    secret_names: dict[str, str] = field(default_factory=dict)
    weights_folders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights_bytes: int | None = None
