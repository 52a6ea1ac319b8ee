"""Findings: what a check concluded about a node, and the verdict over all of them. Pure."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["healthy", "degraded", "unhealthy", "unknown"]
Advice = Literal[
    "none",
    "reset GPU",
    "reboot",
    "inspect or RMA",
    "fix configuration",
    "clean up",
    "look at the application",
]
# How much worse one is than another. Unknown is no pass: it stands above what merely warns, and
# below what is known to be broken.
_RANK: dict[Verdict, int] = {"healthy": 0, "degraded": 1, "unknown": 2, "unhealthy": 3}


class Finding(BaseModel):
    """One checked thing. `unknown` is a verdict of its own: a probe that failed is not a pass.

    `device` is the GPU, port, folder or mount; empty where it is the node itself. `value` and
    `threshold` are what was compared.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    verdict: Verdict
    message: str
    hint: str = ""
    device: str = ""
    advice: Advice = "none"
    value: str = ""
    threshold: str = ""


class Coverage(BaseModel):
    """What became of one check: also what was not looked at, and why."""

    model_config = ConfigDict(frozen=True)

    check: str
    state: Literal["covered", "skipped", "not applicable", "checker error"]
    reason: str = ""


class NodeFacts(BaseModel):
    """All that preflight found on one node, once.

    traits: what the nodes of one replica must agree on, by name ("driver", "vllm", …).
    """

    model_config = ConfigDict(frozen=True)

    findings: tuple[Finding, ...] = ()
    traits: dict[str, str] = Field(default_factory=dict)
    coverage: tuple[Coverage, ...] = ()
    gpus: int | None = None
    boot_id: str = ""
    taken_at: float = 0.0
    level: str = ""

    @property
    def unfit(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict == "unhealthy")

    @property
    def verdict(self) -> Verdict:
        return worst(finding.verdict for finding in self.findings)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of the whole; nothing looked at is unknown."""
    return max(verdicts, key=_RANK.__getitem__, default="unknown")
