"""What lies on disk between the controller, the command line and the gateway. Pure.

orders.json   who takes traffic; the controller writes it, each process of the tier reads it
keys.json     who may ask; the command line writes it, supervisor and tier read it
settings.json what the spec says of the gateway; a change is a reload
state.json    what is; the supervisor writes it each second
owner.json    which processes run, so that the next supervisor adopts them
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from launcher.documents import Document

MEMBERS_MAX = 1024
KEYS_MAX = 512

MemberGoal = Literal["serving", "draining", "dead"]


class Member(BaseModel):
    """One place that can answer: a replica in one generation, or a fallback.

    slot: its column in the shared counters, its own as long as it is a member.
    weight: how much it can take, relative to the others.
    model: what the model is called there; empty: as the client calls it.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    slot: Annotated[int, Field(ge=0, lt=MEMBERS_MAX)]
    url: str
    goal: MemberGoal = "serving"
    weight: Annotated[float, Field(gt=0)] = 1.0
    fallback: bool = False
    model: str = ""
    key_file: str = ""
    where: str = ""


class Orders(Document):
    """Who takes traffic. `expects`: a replica is coming up, so hold rather than refuse.

    `open`: whether new requests are taken at all; a fleet that goes down takes none.
    """

    revision: int = 0
    members: tuple[Member, ...] = ()
    expects: bool = False
    open: bool = True


class Key(BaseModel):
    """A client's key by its name; only its SHA-256 is kept. Keys are random: no salt is needed.

    slot: its column in the shared counters. waiting_max: how many of its requests may wait.
    """

    model_config = ConfigDict(frozen=True)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@\-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    slot: Annotated[int, Field(ge=0, lt=KEYS_MAX)]
    waiting_max: Annotated[int, Field(ge=1)] | None = None
    made_at: float


class Keys(Document):
    keys: tuple[Key, ...] = ()


class Settings(Document):
    """The gateway of one fleet, every default filled in.

    host: what it binds to. announced: how clients call that host.
    """

    fleet: str
    host: str
    announced: str = ""
    port: Annotated[int, Field(ge=1, le=65535)]
    processes: Annotated[int, Field(ge=1, le=8)] = 2
    certificate: str = ""
    certificate_key: str = ""
    body_max_bytes: int = 64 * 1024 * 1024
    waiting_max: int = 1000
    hold_s: float = 300.0
    drain_s: float = 30.0
    continue_streams: bool = False
    goal: Literal["up", "stopped"] = "up"


class Process(BaseModel):
    """A process of ours that outlives its supervisor. A pid alone may be another's by now."""

    model_config = ConfigDict(frozen=True)
    pid: int
    started_ticks: int
    boot_id: str


class TierProcess(Process):
    row: int
    index: int


class Owner(Document):
    """Who holds the port, and with which processes.

    job, node: the Slurm job that it runs in, and its node there; both empty outside of Slurm.
    """

    fleet: str
    folder: str
    user: str
    host: str
    port: int
    run_folder: str
    supervisor: Process
    front: Process | None = None
    tier: tuple[TierProcess, ...] = ()
    metrics_port: int | None = None
    job: str = ""
    node: str = ""


BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)


class Histogram(BaseModel):
    """Counts by upper bound (BUCKETS_S, then infinity), and the sum in seconds."""

    counts: list[int] = Field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    sum_s: float = 0.0


class MemberTally(BaseModel):
    """What one process of the tier has done with one member since it started."""

    in_flight: int = 0
    reachable: bool = True
    sure: bool = True
    sent: int = 0
    answered: int = 0
    retried: int = 0  # left without a token and tried on another member
    broken: int = 0  # ended in the middle of its tokens
    continued: int = 0  # begun here, finished by another member
    aborted: int = 0  # the client went away
    errors: int = 0  # failed on the last try that it had
    queue: Histogram = Field(default_factory=Histogram)
    first_token: Histogram = Field(default_factory=Histogram)


class TierState(BaseModel):
    """One process of the tier, as its admin socket tells it."""

    pid: int
    index: int
    row: int
    retiring: bool = False
    orders_revision: int = 0
    in_flight: int = 0
    waiting: int = 0
    quiet_s: float = 0.0  # since a request was under way here, or since this process started
    holding: int = 0
    body_bytes: int = 0
    rescued: int = 0
    refused: dict[str, int] = Field(default_factory=dict)
    by_key: dict[str, int] = Field(default_factory=dict)
    fell_back: int = 0
    members: dict[str, MemberTally] = Field(default_factory=dict)


class State(Document):
    """What the gateway does now, over all its processes."""

    fleet: str
    address: str
    host: str
    supervisor_pid: int
    front: Literal["up", "down"]
    processes: list[TierState]
    orders: Orders
    metrics_port: int | None
    problem: str = ""
    restarts: int = 0
    at: float
