"""Slurm's own drain, for operators: set under our prefix, and only ours lifted. I/O."""

from launcher.errors import SlurmError
from launcher.slurm_tools import runner

PREFIX = "launcher: "
REASON_MAX = 200


def drain(node: str, reason: str) -> str:
    """Drain this node in Slurm; what was done, in words. Raises SlurmError without the right.

    A node that somebody else has drained keeps their reason: it is theirs to lift.
    """
    present = _reason(node)
    if present and not present.startswith(PREFIX):
        return f"{node} is drained in Slurm already ({present})"
    text = PREFIX + " ".join(reason.split())[:REASON_MAX]
    runner.run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={text}"])
    return f"{node} drained in Slurm"


def resume(node: str) -> str:
    """Take our own drain back; empty where there is none of ours."""
    if not _reason(node).startswith(PREFIX):
        return ""
    try:
        runner.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])
    except SlurmError as error:
        return f"{node} stays drained in Slurm: {error.message}"
    return f"{node} resumed in Slurm"


def _reason(node: str) -> str:
    """Why Slurm gives this node no new jobs; empty for one that is not drained."""
    row = runner.run(["sinfo", "-h", "-N", "-n", node, "-o", "%T|%E"]).splitlines()
    state, _, reason = (row[0] if row else "|").partition("|")
    return reason.strip() if state.startswith(("drain", "drng")) else ""
