"""The documents on disk between controller and agents, each a model with a version. Pure.

assignment.json says what a node shall be, report.json what it is. Both are replaced whole.
Readers ignore keys that they do not know, so that an older agent can read a newer controller.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from health.report import NodeFacts

NodePhase = Literal[
    "starting",
    "preflight",
    "idle",
    "staging",
    "warm",
    "joining",
    "serving",
    "draining",
    "stopped",
    "failed",
    "lost",
]
Goal = Literal["idle", "rank", "stopped"]


class Document(BaseModel):
    model_config = ConfigDict(frozen=True)
    version: Annotated[int, Field(ge=1)] = 1


class ModelPlace(BaseModel):
    """Where an engine of this fleet finds its weights, as far as the spec says. in_container: a
    hub's cache that only the engine sees."""

    model_config = ConfigDict(frozen=True)
    model: str
    revision: str = ""
    download_folder: str = ""
    environment: dict[str, str] = Field(default_factory=dict)
    in_container: bool = False


class AgentConfig(Document):
    """agent.json: what every agent of one allocation needs before its first assignment."""

    fleet: str
    mark: str
    package_version: str
    orphan_timeout_s: int
    addresses: dict[str, str] = Field(default_factory=dict)
    cache_folder: str = ""
    model: ModelPlace | None = None


class NetAddress(BaseModel):
    """One IPv4 address of a node, with the interface that holds it."""

    model_config = ConfigDict(frozen=True)
    interface: str
    ip: str
    prefix: int


class Peer(BaseModel):
    """Another agent of the same replica, and where it might be asked for its heartbeat."""

    model_config = ConfigDict(frozen=True)
    node: str
    port: int
    addresses: tuple[str, ...]


class Checks(BaseModel):
    """What the node shall find out about itself before it takes work."""

    model_config = ConfigDict(frozen=True)
    probe_script: str
    executor: str
    model_folder: str | None
    image: str = ""
    ports: tuple[int, ...]
    gpus: int
    shares_machine: bool
    weights_folders: tuple[str, ...] = ()
    weights_bytes: int | None = None


class Command(BaseModel):
    """One process of the engine. `after_port`: wait until the leader listens there, and `after_s`
    seconds longer. `after_others`: a parked process waits for these to listen, too."""

    model_config = ConfigDict(frozen=True)
    name: str
    script: str
    after_port: int | None = None
    after_s: float = 0.0
    after_others: tuple[tuple[str, int], ...] = ()
    parkable: bool = False  # a parked engine process may become it


class Park(BaseModel):
    """An engine process to be kept ready: everything imported, nothing opened."""

    model_config = ConfigDict(frozen=True)
    script: str
    secret_environment: dict[str, str] = Field(default_factory=dict)


class Rehearsal(BaseModel):
    """A collective check in the engine's own environment, beside the engine's start."""

    model_config = ConfigDict(frozen=True)
    script: str
    order: str
    timeout_s: float


class Member(BaseModel):
    """What this node is in one generation of a replica, exact enough to need no decision."""

    model_config = ConfigDict(frozen=True)
    replica: str
    generation: int
    rank: int
    size: int
    address: str
    interface: str
    leader_address: str
    ports: dict[str, int]
    commands: tuple[Command, ...]
    ranks_per_node: int
    secret_environment: dict[str, str] = Field(default_factory=dict)
    served_model: str
    start_timeout_s: int
    peers: tuple[Peer, ...]
    guard_port: int
    rehearsal: Rehearsal | None = None

    @property
    def scope(self) -> str:
        """What leases of this member are about; another generation is another scope."""
        return f"{self.replica}/g{self.generation}"


class Assignment(Document):
    """assignment.json: what this node shall be. A higher revision replaces a lower one."""

    revision: int
    goal: Goal
    reason: str = ""
    checks: Checks | None = None
    peers: tuple[Peer, ...] = ()
    member: Member | None = None
    park: Park | None = None
    stop_grace_s: int = 10
    after_failure: bool = False  # look at the engine's processes before they are ended
    drill: str = ""  # a fault that whoever is this member already inflicts on itself, once


class Drill(BaseModel):
    """A fault that a person wants to see survived by one generation of a replica."""

    model_config = ConfigDict(frozen=True)
    id: str
    replica: str
    generation: int
    node: str
    kind: str


class Evidence(BaseModel):
    """Why something failed or was lost: who, when, how it ended, and its last words."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["exit", "lost_peer", "deadline", "preflight", "stopped", "error", "stall"]
    message: str
    node: str
    at: float
    process: str = ""
    exit_code: int | None = None
    log_tail: str = ""
    hint: str = ""


class Parked(BaseModel):
    """The parked engine process of a node, or why there is none."""

    model_config = ConfigDict(frozen=True)
    state: Literal["importing", "ready", "none"]
    since: float
    took_s: float | None = None  # from its start until it was ready
    reason: str = ""


class Weights(BaseModel):
    """The model's weights as a node has them. None is unknown, and `reason` says why. missing:
    what should be there and is not. disk_bytes is less than total_bytes where files have holes or
    are compressed."""

    model_config = ConfigDict(frozen=True)
    at: float
    folder: str = ""
    total_bytes: int | None = None
    disk_bytes: int | None = None
    file_system: str = ""
    over_network: bool | None = None
    page_cache_bytes: int | None = None
    missing: str = ""
    reason: str = ""

    @property
    def is_all_cached(self) -> bool:
        return bool(self.total_bytes) and self.page_cache_bytes == self.total_bytes


class MemberReport(BaseModel):
    """What became of the member that was assigned."""

    model_config = ConfigDict(frozen=True)
    replica: str
    generation: int
    rank: int
    endpoint: str | None = None
    processes: dict[str, int] = Field(default_factory=dict)
    first_token_at: float | None = None
    waiting_for: str = ""
    started: str = ""  # "parked", "plain", or "plain: " and why it was not the parked process
    begun_at: float | None = None  # when its order was taken up
    started_at: float | None = None
    ray_workers: str = ""  # how many were parked, how many started plainly, and why
    parked: Parked | None = None  # the process that it became, as it was before
    rehearsed: str | None = None  # what the collective check printed, once it has ended
    suspects: tuple[str, ...] = ()  # processes of the engine that stand still, in words


class Report(Document):
    """report.json: what this node is. `revision` grows with content, `beat` with time."""

    revision: int
    beat: int
    node: str
    host: str
    pid: int
    package_version: str
    boot_id: str
    phase: NodePhase
    since: float
    assignment_revision: int
    addresses: tuple[NetAddress, ...] = ()
    heartbeat_port: int = 0
    facts: NodeFacts | None = None
    checks_for: int | None = None
    health: NodeFacts | None = None
    reach: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    member: MemberReport | None = None
    parked: Parked | None = None
    weights: Weights | None = None
    evidence: Evidence | None = None
