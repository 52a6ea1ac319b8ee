"""What a plan is made of: steps, exact enough to need no choice, and their context. Pure."""

from dataclasses import dataclass, field
from typing import Any

from inventory.ledger import Cordon, Passed
from launcher.documents import Assignment, Park
from launcher.layout import Layout
from launcher.record import Failure, Incident, Seat
from launcher.spec import FleetSpec


@dataclass(frozen=True)
class Allocate:
    """Get agents onto nodes. `nodes` is empty where the backend chooses (Slurm), but for those
    in `exclude`."""

    about: str  # the replica or spare that they are for
    number: int
    size: int
    nodes: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    @property
    def allocation(self) -> str:
        return f"{self.about}.a{self.number}"


@dataclass(frozen=True)
class Settle:
    """Remember the nodes that an allocation was given."""

    about: str
    allocation: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Assign:
    """Write one node's assignment.json. drill: the id of the drill that is in it, if one is."""

    about: str
    seat: Seat
    assignment: Assignment
    drill: str = ""


@dataclass(frozen=True)
class Remind:
    """Write the assignment again that this node has not taken up: it may never have arrived."""

    about: str
    seat: Seat


@dataclass(frozen=True)
class Sit:
    """These are the replica's seats from now on; `story` tells the journal why they changed."""

    about: str
    seats: tuple[Seat, ...]
    story: str = ""


@dataclass(frozen=True)
class Interrupt:
    """The generation is over; end what is left of it, and bring the replica up again."""

    about: str
    incident: Incident
    not_before: float
    story: str


@dataclass(frozen=True)
class Fail:
    """Give the replica up: from here on it is only taken down."""

    about: str
    failure: Failure


@dataclass(frozen=True)
class Down:
    """Begin to end the replica as the user wished."""

    about: str


@dataclass(frozen=True)
class Over:
    """The replica has ended; nobody waits for it any more."""

    about: str


@dataclass(frozen=True)
class Close:
    """The fleet has lived as long as it was to, or nobody needs it: from now on it goes down."""

    reason: str
    about: str = ""


@dataclass(frozen=True)
class Revive:
    """A person wants a replica again that was given up."""

    about: str


@dataclass(frozen=True)
class End:
    """Begin to give an allocation back."""

    about: str
    allocation: str
    reason: str


@dataclass(frozen=True)
class Release:
    """Give nodes of an allocation back and sweep what is left there; all of them: it is over."""

    about: str
    allocation: str
    nodes: tuple[str, ...]
    whole: bool
    insists: bool = False  # try until it works, for the fleet goes on


@dataclass(frozen=True)
class Note:
    """Remember an observed fact about the replica (when it started, that it serves)."""

    about: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Quarantine:
    """Let no new work onto this node, with the evidence."""

    about: str
    cordon: Cordon


@dataclass(frozen=True)
class Pass:
    """Remember that these nodes can talk with each other."""

    about: str
    passed: Passed


Step = (
    Allocate
    | Settle
    | Assign
    | Remind
    | Sit
    | Interrupt
    | Fail
    | Down
    | Over
    | Close
    | Revive
    | End
    | Release
    | Note
    | Quarantine
    | Pass
)


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
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)  # node → switch, rack
    shares_machine: bool = False
    gpus_per_node: int = 1
    secret_names: dict[str, str] = field(default_factory=dict)
    weights_folders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights_bytes: int | None = None
    park: Park | None = None  # an engine process for every node to keep ready
