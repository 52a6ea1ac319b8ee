"""Is this set of nodes fit for a replica, and if not, which of them is to blame? Pure.

Each node's own findings come first, then what differs between them. A node is blamed only by its
own fault or by a majority of the others; where nobody can be blamed the set is refused as it is.
"""

from dataclasses import dataclass

from health.clock import clock_finding
from health.parity import compare
from health.report import Finding, NodeFacts
from health.thresholds import Thresholds


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


def judge_set(facts: dict[str, NodeFacts], began_at: dict[str, float], now: float) -> Unfit | None:
    """The first reason against this set (node → what it found out), or None if it is fit.

    Each node looked at itself between its began_at and now, by our clock.
    """
    blamed = {node: found.unfit[0] for node, found in facts.items() if found.unfit}
    for node, finding in _wrong_clocks(facts, began_at, now).items():
        blamed.setdefault(node, finding)
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


def _wrong_clocks(
    facts: dict[str, NodeFacts], began_at: dict[str, float], now: float
) -> dict[str, Finding]:
    """Nodes whose clock is wrong; where all of them disagree with us, ours is."""
    limit_s = Thresholds().clock_offset_s_max
    wrong = {
        node: finding
        for node, found in facts.items()
        if found.taken_at
        and (finding := clock_finding(found.taken_at, began_at[node], now, limit_s)) is not None
    }
    return wrong if len(wrong) < len(facts) else {}


def doubts(facts: NodeFacts) -> list[str]:
    """What does not keep a node from serving but should be known, as sentences."""
    return [
        f"{finding.device + ': ' if finding.device else ''}{finding.message}"
        for finding in facts.findings
        if finding.verdict != "healthy"
    ]
