"""Whose fault was it that a generation ended, and may the replica come again? Pure.

Three kinds: the user's (a wrong flag, too little memory: the same would happen again, so stop and
say), a node's (swap it), and neither (try again, within a budget and ever more seldom).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.record import Failure, Incident, ReplicaRecord
from launcher.spec import Limits

BUDGET_WINDOW_S = 3600.0
# Waits before the first, second, … restart within the window; ours, short for a first mishap.
BACK_OFF_S = (0.0, 5.0, 15.0, 60.0, 300.0)
LOSSES_MAX = 2  # lost so often within the window, a node is quarantined until it is looked at

# What an engine says when the same start would end the same way. Only believed before its first
# token: afterwards the flags have proved themselves.
_USERS_FAULT = re.compile(
    r"unrecognized arguments|invalid choice|ValidationError|validation error"
    r"|No available memory for the cache blocks|larger than the maximum number of tokens"
    r"|less than desired GPU memory utilization|CUDA out of memory|OutOfMemoryError"
    r"|is not supported|are not supported|not divisible|does not exist|No such file"
    r"|is not a valid model identifier|RepositoryNotFoundError|GatedRepoError"
    r"|trust_remote_code|No module named|ModuleNotFoundError",
    re.I,
)
# No sign of a fault in the engine or its flags, so not charged to the budget.
_NOT_COUNTED = ("node_lost", "allocation_over")


@dataclass(frozen=True)
class Verdict:
    """again: whether the replica shall come again. why: in words, where it shall not."""

    again: bool
    counts: bool
    not_before: float
    why: str = ""


def judge(limits: Limits, replica: ReplicaRecord, failure: Failure, now: float) -> Verdict:
    """What follows from this failure, given what happened before."""
    proven = replica.serving_at is not None
    counts = is_counted(failure)
    recent = [one for one in replica.incidents if now - one.at < BUDGET_WINDOW_S]
    wait_s = BACK_OFF_S[min(len(recent), len(BACK_OFF_S) - 1)]
    again = Verdict(again=True, counts=counts, not_before=now + wait_s)
    if limits.restarts == 0:
        return _stop("limits.restarts is 0")
    if not counts:
        return again
    if not proven and (failure.code == "deadline" and not replica.served):
        return _stop("it never served")
    if not proven and failure.code == "engine" and _USERS_FAULT.search(failure.message):
        return _stop("the same start would end the same way")
    if not proven and (nodes := _failed_alike(recent, failure)):
        where = f" ({' and '.join(nodes)})" if len(nodes) > 1 else ""
        return _stop(f"it ended twice in the same way{where}: the model or a flag is at fault")
    charged = sum(one.counts for one in recent)
    if charged >= limits.restarts:
        return _stop(f"{charged} restarts within an hour were tried")
    return again


def back_off_s(replica: ReplicaRecord, now: float) -> float:
    """How long the next generation still waits; a clock that was set back does not prolong it."""
    wait_s = replica.not_before - now
    return wait_s if 0 < wait_s <= BACK_OFF_S[-1] else 0.0


def is_counted(failure: Failure) -> bool:
    """Whether it is charged to the restart budget."""
    return failure.code not in _NOT_COUNTED


def node_of(failure: Failure) -> str:
    """The node where it began; empty where no node is named."""
    return failure.where.removeprefix("node ") if failure.where.startswith("node ") else ""


def is_repeated_loss(losses: Sequence[float], now: float) -> bool:
    """Whether a node that is lost now was lost often enough of late to be kept out."""
    return sum(now - at < BUDGET_WINDOW_S for at in losses) + 1 >= LOSSES_MAX


def _failed_alike(recent: Sequence[Incident], failure: Failure) -> list[str]:
    """Where the last generation ended without a token and with the same words as this one."""
    last = recent[-1] if recent else None
    if last is None or last.proven or not last.counts:
        return []
    if _bare(last.message) != _bare(failure.message):
        return []
    return list(dict.fromkeys(node for node in (last.node, node_of(failure)) if node)) or [""]


def _bare(message: str) -> str:
    """Without what differs between two deaths of the same cause: numbers and addresses."""
    return re.sub(r"[0-9][0-9a-fx.:]*", "#", message)


def _stop(why: str) -> Verdict:
    return Verdict(again=False, counts=True, not_before=0.0, why=why)
