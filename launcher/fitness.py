"""Is this set of nodes fit for a replica, and if not, which of them is to blame? Pure.

Each node's own findings come first, then what differs between them. A node is blamed only by its
own fault or by a majority of the others; where nobody can be blamed the set is refused as it is.
"""

from dataclasses import dataclass

from health.parity import compare
from health.report import Finding, NodeFacts


@dataclass(frozen=True)
class Unfit:
    """Why a set of nodes cannot serve. `blamed` is empty where no single node is at fault."""

    blamed: dict[str, Finding]
    finding: Finding
    where: str

    @property
    def message(self) -> str:
        device = f"{self.finding.device}: " if self.finding.device else ""
        return device + self.finding.message


def judge_set(facts: dict[str, NodeFacts]) -> Unfit | None:
    """The first reason against this set (node → what it found out), or None if it is fit."""
    blamed = {node: found.unfit[0] for node, found in facts.items() if found.unfit}
    unfair: Finding | None = None
    for odd in compare({node: found.traits for node, found in facts.items()}):
        if odd.finding.verdict != "unhealthy":
            continue
        if odd.blamed:
            for node in odd.nodes:
                blamed.setdefault(node, odd.finding)
        else:
            unfair = unfair or odd.finding
    if blamed:
        node, finding = next(iter(blamed.items()))
        return Unfit(blamed, finding, f"node {node}, check {finding.check}")
    if unfair:
        return Unfit({}, unfair, f"check {unfair.check}")
    return None


def warnings(facts: dict[str, NodeFacts]) -> tuple[str, ...]:
    """What does not refuse a node but should be known, as sentences."""
    told = [
        f"{node}: {finding.device + ': ' if finding.device else ''}{finding.message}"
        for node, found in facts.items()
        for finding in found.findings
        if finding.verdict in ("degraded", "unknown")
    ]
    told += [
        f"{', '.join(odd.nodes)}: {odd.finding.message}"
        for odd in compare({node: found.traits for node, found in facts.items()})
        if odd.finding.verdict == "degraded"
    ]
    return tuple(told)
