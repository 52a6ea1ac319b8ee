"""What the controller's own Slurm jobs mean, and who of them goes on. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.slurm_tools.jobs import Job

Handover = Literal["submit", "wait", "leave"]


@dataclass(frozen=True)
class Stage:
    """Where a controller's job is on its way.

    words: what is waited for until it drives. last: how the last one ended, where none is left.
    """

    kind: Literal["none", "pending", "running", "unknown"]
    words: str = ""
    last: str = ""


NONE = Stage("none")


def living(found: Iterable[Job]) -> list[Job]:
    """Those that drive or will. For one that is ending a successor may be sought."""
    return [job for job in found if job.state in ("pending", "running")]


def stage_of(found: Sequence[Job]) -> Stage:
    """What keeps the controller from being there, when it is not."""
    here = living(found)
    for job in here:
        if job.state == "running":
            return Stage("running", f"the controller in job {job.identity} ({job.batch_host})")
    for job in here:
        told = f"{job.slurm_state}: {job.reason.strip('() ') or 'no reason given'}"
        return Stage("pending", f"controller job {job.identity} to start ({told})")
    ended = found[-1:]
    return Stage("none", last="".join(f"job {one.identity}: {one.slurm_state}" for one in ended))


def unknown(why: str) -> Stage:
    return Stage("unknown", f"Slurm to say whether the controller's job is there ({why})")


def hand_over(found: Iterable[Job], own: str, heir: str) -> Handover:
    """What a job does that was warned of its end: it leaves once its successor is at its place.

    heir: the job that has said that it waits for the wheel; running alone is not being there.
    """
    others = [job for job in living(found) if job.identity != own]
    if not others:
        return "submit"
    ready = any(job.state == "running" and job.identity == heir for job in others)
    return "leave" if ready else "wait"


def is_superfluous(found: Iterable[Job], own: str) -> bool:
    """Whether one that waits for the wheel waits in vain: its successor runs already. That is so
    when a job whose successor had been submitted comes back from a node failure."""
    return any(
        job.state == "running" and int(job.identity) > int(own)
        for job in living(found)
        if job.identity != own
    )
