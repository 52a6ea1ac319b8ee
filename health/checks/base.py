"""What a check is, and what it may look at. Pure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from health.evidence import NodeEvidence
from health.report import Advice, Finding, Verdict
from health.thresholds import Thresholds


@dataclass(frozen=True)
class Needs:
    """What the fleet wants of a node. Nothing asked for: the node is judged by itself."""

    gpus: int | None = None
    executor: str | None = None
    weights_bytes: int | None = None
    # The machine plays several nodes: limits of the whole machine only warn.
    shares_machine: bool = False
    # A replica serves here: what waits for an idle window does not end it.
    serving: bool = False


@dataclass(frozen=True)
class Ground:
    """Everything that a check may look at beside its own subject."""

    evidence: NodeEvidence
    needs: Needs = field(default_factory=Needs)
    limits: Thresholds = field(default_factory=Thresholds)

    @property
    def engine_is_cpu(self) -> bool:
        """Whether the engine's environment holds a build for CPUs, which needs no GPU."""
        software = self.evidence.software
        versions = software.versions if software and software.versions else {}
        return any("cpu" in versions.get(name, "") for name in ("vllm", "torch"))


@dataclass(frozen=True)
class Said:
    """What a check has to say about one device; the table adds the check's name."""

    verdict: Verdict
    message: str
    value: object = ""
    threshold: object = ""
    advice: Advice = "none"
    hint: str = ""
    device: str = ""


Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """One check: its name, where its rule comes from, how a person repeats it by hand.

    `judge` yields nothing when all is well, and raises nothing: what could not be read is no
    fault. `reads` names the value without which the check says nothing about this subject.
    """

    name: str
    source: str
    repeat: str
    judge: Callable[[Subject, Ground], Iterator[Said]]
    reads: str = ""

    def findings(self, subject: Subject, device: str, ground: Ground) -> tuple[Finding, ...]:
        return tuple(
            Finding(
                check=self.name,
                verdict=said.verdict,
                message=said.message,
                hint=said.hint,
                device=said.device or device,
                advice=said.advice,
                value=str(said.value),
                threshold=str(said.threshold),
            )
            for said in self.judge(subject, ground)
        )
