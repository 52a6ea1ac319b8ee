"""From several looks at a node to one opinion: what comes and goes is not believed at once. Pure.

Clocks dip and counters tick for a moment on a busy healthy node; such a finding counts when two of
the last three looks have it, and is over when two have not. What ends an engine, and what is an
event or a state of its own, counts at once.
"""

from health.report import Finding, NodeFacts

LOOKS = 3
NEEDED = 2
# Findings that measure a moment.
_PASSING = frozenset(
    {
        "gpu.clocks",
        "gpu.thermal",
        "gpu.pcie_replay",
        "gpu.nvlink_errors",
        "ib.errors",
        "ib.physical",
        "host.memory",
        "host.swap",
        "host.stuck",
        "mount",
    }
)


def settle(looks: tuple[NodeFacts, ...]) -> NodeFacts:
    """The newest look (the last), with passing findings that enough of the looks share."""
    newest, recent = looks[-1], looks[-LOOKS:]
    seen: dict[tuple[str, str], int] = {}
    latest: dict[tuple[str, str], Finding] = {}
    for look in recent:
        for key, finding in {(f.check, f.device): f for f in look.findings}.items():
            seen[key] = seen.get(key, 0) + 1
            latest[key] = finding
    kept = [f for f in newest.findings if not _is_passing(f) or seen[f.check, f.device] >= NEEDED]
    present = {(f.check, f.device) for f in newest.findings}
    kept += [
        finding
        for key, finding in latest.items()
        if key not in present and _is_passing(finding) and seen[key] >= NEEDED
    ]
    if not kept:
        kept = [Finding(check="node", verdict="healthy", message="")]
    return newest.model_copy(update={"findings": tuple(kept)})


def _is_passing(finding: Finding) -> bool:
    return finding.check in _PASSING and finding.verdict == "degraded"
