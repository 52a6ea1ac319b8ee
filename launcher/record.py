"""What the controller must remember because it cannot be observed: intents. Pure.

record.json of a run. It is written before each act, so that a controller killed in between finds
what it was about to do, looks whether it was done, and does it once.

Allocations hold nodes, replicas sit on them: a seat is one rank's node in one allocation. So a
replica can lose a node and take a spare's, or one that was asked for alone, and keep the others.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from launcher.documents import Assignment, Document, Evidence

INCIDENTS_KEPT = 20
STORY_KEPT = 20
DRILLS_KEPT = 50  # more than a wish holds

Intent = Literal["up", "down"]


class Failure(BaseModel):
    """Why a replica or the whole run was given up, or why a generation of it ended."""

    model_config = ConfigDict(frozen=True)
    code: str
    exit_code: int
    message: str
    where: str = ""
    hint: str = ""
    at: float
    evidence: Evidence | None = None


class Incident(BaseModel):
    """One generation that ended by itself. counts: whether it is charged to the restart budget.

    node: who failed first, as far as it is known; it need not be at fault. proven: a token had
    come out of that generation.
    """

    model_config = ConfigDict(frozen=True)
    at: float
    code: str
    message: str
    node: str = ""
    counts: bool = True
    proven: bool = False


class Seat(BaseModel):
    """One rank's place: a node, by the agent that one allocation brought there."""

    model_config = ConfigDict(frozen=True)
    node: str
    allocation: str


class AllocationRecord(BaseModel):
    """Nodes that were asked for at once: a job under Slurm, agents on hosts elsewhere.

    owner: the replica or spare that it was asked for first. nodes: those that it still holds.
    asked: whether the backend has taken the request; until then it is made again. ordered_at: when
    each node was told its assignment last.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    owner: str
    number: int
    size: int
    nodes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    requested_at: float
    asked: bool = False
    running_at: float | None = None
    ending_at: float | None = None
    release_tries: int = 0
    retry_at: float = 0.0
    released: bool = False
    assignments: dict[str, Assignment] = Field(default_factory=dict)
    ordered_at: dict[str, float] = Field(default_factory=dict)

    def revision_of(self, node: str) -> int:
        assignment = self.assignments.get(node)
        return assignment.revision if assignment else 0


class ReplicaRecord(BaseModel):
    """One replica: where its ranks sit, its engine's generation, and what became of it."""

    model_config = ConfigDict(frozen=True)
    name: str
    intent: Intent = "up"
    generation: int = 0
    slot: int
    slots_tried: int = 0
    seats: tuple[Seat, ...] = ()  # in rank order; the first is the leader
    requested_at: float | None = None
    running_at: float | None = None  # all seats are taken
    agents_at: float | None = None  # their agents are up
    ranked_at: float | None = None
    serving_at: float | None = None
    served: bool = False  # in any generation of this run
    rehearses: bool = False  # a collective check runs beside the engine's start
    stopping_at: float | None = None
    over: bool = False  # it has ended and will not come again by itself
    swaps: int = 0
    incidents: tuple[Incident, ...] = ()
    not_before: float = 0.0  # the next generation waits until then
    restarts_asked: int = 0  # by a person, as far as they were taken up
    story: tuple[str, ...] = ()  # what happened on the way, for people
    failure: Failure | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(seat.node for seat in self.seats)

    @property
    def is_restarting(self) -> bool:
        """Whether a generation is being ended so that the next one can come."""
        return self.intent == "up" and self.stopping_at is not None

    @property
    def is_restarted_by_a_person(self) -> bool:
        """Then its requests may end before its engine does."""
        return self.is_restarting and bool(self.incidents) and self.incidents[-1].code == "asked"

    def told(self, line: str) -> tuple[str, ...]:
        return (*self.story, line)[-STORY_KEPT:]


class RunRecord(Document):
    """One run of a fleet. counts: allocations by owner, over the fleet's whole life. seen_at: the
    latest time that is in here; the next controller's clock does not begin before it. asked_at:
    when the command began that asked for this run, by its own clock."""

    run: int
    started_at: float
    asked_at: float | None = None
    seen_at: float = 0.0
    replicas: dict[str, ReplicaRecord] = Field(default_factory=dict)
    allocations: dict[str, AllocationRecord] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    losses: dict[str, tuple[float, ...]] = Field(default_factory=dict)  # by node
    leftovers: dict[str, str] = Field(default_factory=dict)  # what could not be cleaned, and why
    spares_not_before: float = 0.0
    spares_problem: str = ""
    drills: tuple[str, ...] = ()  # the ids of those that were taken up
    closed: str = ""  # why the fleet ends although nobody wished it down
    endpoint: str | None = None

    def order(self, seat: Seat) -> Assignment | None:
        """What this seat's agent was told last."""
        held = self.allocations.get(seat.allocation)
        return held.assignments.get(seat.node) if held else None

    def revision(self, seat: Seat) -> int:
        order = self.order(seat)
        return order.revision if order else 0
