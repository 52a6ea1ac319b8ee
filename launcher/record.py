"""What the controller must remember because it cannot be observed: intents. Pure.

record.json of a run. It is written before each act, so that a controller killed in between finds
what it was about to do, looks whether it was done, and does it once.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from launcher.documents import Assignment, Document, Evidence

Intent = Literal["none", "up", "swap", "down"]


class Failure(BaseModel):
    """Why a replica or the whole run was given up."""

    model_config = ConfigDict(frozen=True)
    code: str
    exit_code: int
    message: str
    where: str = ""
    hint: str = ""
    at: float
    evidence: Evidence | None = None


class ReplicaRecord(BaseModel):
    """One replica: its present allocation, its engine's generation, and what we ordered."""

    model_config = ConfigDict(frozen=True)
    name: str
    intent: Intent = "none"
    allocation: int = 0
    generation: int = 0
    slot: int
    slots_tried: int = 0
    nodes: tuple[str, ...] = ()
    requested_at: float | None = None
    running_at: float | None = None
    ranked_at: float | None = None
    serving_at: float | None = None
    rehearses: bool = False  # a collective check runs beside the engine's start
    stopping_at: float | None = None
    released: bool = False
    release_tries: int = 0
    leftover: str = ""  # what could not be cleaned, and why
    exclude: tuple[str, ...] = ()  # nodes that the backend may not choose
    swaps: int = 0
    story: tuple[str, ...] = ()  # what happened on the way, for people
    assignments: dict[str, Assignment] = Field(default_factory=dict)
    failure: Failure | None = None

    def revision_of(self, node: str) -> int:
        assignment = self.assignments.get(node)
        return assignment.revision if assignment else 0


class RunRecord(Document):
    """One run of a fleet."""

    run: int
    started_at: float
    replicas: dict[str, ReplicaRecord] = Field(default_factory=dict)
    endpoint: str | None = None
    timings: dict[str, float] = Field(default_factory=dict)
