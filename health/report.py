"""Findings: what a probe saw on a node and what it means. Pure."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["healthy", "degraded", "unhealthy", "unknown"]


class Finding(BaseModel):
    """One checked thing. `unknown` is a verdict of its own: a probe that failed is not a pass."""

    model_config = ConfigDict(frozen=True)

    check: str
    verdict: Verdict
    message: str
    hint: str = ""


class NodeFacts(BaseModel):
    """All that preflight found on one node, once."""

    model_config = ConfigDict(frozen=True)

    findings: tuple[Finding, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    gpus: int | None = None

    @property
    def unfit(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict == "unhealthy")
