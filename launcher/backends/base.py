"""What a backend answers. Everything else of the product is shared between backends."""

from dataclasses import dataclass, field
from typing import Protocol

from inventory.model import Pool
from launcher.documents import AgentConfig, Assignment, Report
from launcher.paths import BasePaths
from launcher.snapshot import AllocationView

LOG_READ_MAX_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Allocation:
    """One allocation: enough to ask for it, find it again, and give it back.

    owner: the replica or spare that it is for. nodes: those that it holds, none before Slurm has
    chosen `size` of them.
    """

    fleet: str
    run: int
    owner: str
    number: int
    size: int
    nodes: tuple[str, ...]
    base: BasePaths
    config: AgentConfig
    secrets: dict[str, str]
    exclude: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.fleet}.{self.owner}.a{self.number}"


@dataclass(frozen=True)
class Seen:
    """One look at an agent's report; `problem` says why there is none, where that is known."""

    report: Report | None = None
    problem: str = ""
    ended: bool = False


@dataclass(frozen=True)
class Question:
    """A program to run once on a node, outside any fleet's allocation.

    It runs in a private folder that holds `files`, with `input` on stdin. `program` is "probes"
    (our own `health.collect`) or the name of one of the files, a bash script.
    """

    program: str
    input: str
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What it printed, or the problem that kept it from being run; by our clock.

    is_busy: the node has other work and was not asked, which says nothing about its health."""

    began_at: float
    ended_at: float
    output: str = ""
    errors: str = ""
    problem: str = ""
    is_busy: bool = False


class Backend(Protocol):
    """One of local, ssh, slurm. Every method that talks to the outside has a deadline.

    Expected errors are FleetErrors; `observe` and `look` return what they could not see as values.
    """

    kind: str
    shares_machine: bool
    chooses_nodes: bool

    def check(self) -> None:
        """Refuse what cannot work before anything is started: exit codes 2 and 5."""

    def pool(self) -> Pool:
        """The nodes that this fleet may use."""

    def commands(self, allocation: Allocation) -> dict[str, str]:
        """What `allocate` will run, as files by name, for `render`."""

    def allocate(self, allocation: Allocation) -> None:
        """Get agents onto nodes; harmless when repeated."""

    def observe(self, allocation: Allocation) -> AllocationView:
        """What became of the allocation."""

    def look(self, allocation: Allocation, nodes: tuple[str, ...]) -> dict[str, Seen]:
        """The newest report of each of these nodes."""

    def assign(self, allocation: Allocation, node: str, assignment: Assignment) -> None:
        """Replace a node's assignment.json."""

    def release(self, allocation: Allocation, nodes: tuple[str, ...] | None = None) -> None:
        """Give the nodes back and remove what is left; harmless when repeated.

        nodes: only these; a Slurm job gets smaller, as far as its cluster allows.
        """

    def logs(self, allocation: Allocation, node: str) -> list[str]:
        """The names of this node's logs."""

    def read_log(self, allocation: Allocation, node: str, name: str, offset: int) -> bytes:
        """A log from this offset (negative: from its end), at most LOG_READ_MAX_BYTES."""

    def ask(self, questions: dict[str, Question], deadline_s: float) -> dict[str, Answer]:
        """Run a program on each of these nodes, all at once. What a node did not answer is in
        its answer; nobody's silence holds up the others."""

    def close(self) -> None:
        """End connections."""
