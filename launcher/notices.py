"""What is told to people who do not look: decided from two statuses of a fleet. Pure."""

from launcher.documents import Document
from launcher.status import ReplicaStatus, Status


class Notice(Document):
    """One thing that happened to a fleet, as a command or a webhook gets it."""

    fleet: str
    at: float
    event: str  # degraded, failed, serving (again), quarantined, ending (by itself)
    phase: str
    message: str
    where: str = ""
    replica: str = ""


def dated(before: Status | None, now: Status) -> Status:
    """The status with the time since when it does not serve as it should.

    A fleet that comes up is not unwell, though some of its replicas serve before the others.
    """
    return now.model_copy(update={"unwell_since": _unwell_since(before, now)})


def notices(before: Status | None, now: Status) -> list[Notice]:
    """What is to be told. Both were dated; `before` is None at the beginning of a run."""
    if now.closed and not (before and before.closed):
        return [_ends_by_itself(now)]
    if now.desired == "down":
        return []
    found = _quarantined(before, now)
    was = before.phase if before else ""
    if now.phase == "serving":
        if before is not None and before.unwell_since is not None:
            found.append(_serves_again(before, now))
    elif now.phase == "failed" and was != "failed":
        found.append(_unwell(now))
    elif now.phase == "degraded" and now.unwell_since is not None:
        if before is None or was != "degraded" or before.unwell_since is None:
            found.append(_unwell(now))
    return found


def _unwell_since(before: Status | None, now: Status) -> float | None:
    if now.desired == "down" or now.phase == "serving":
        return None
    if before is not None and before.unwell_since is not None:
        return before.unwell_since
    served = before is not None and before.phase == "serving"
    is_unwell = served or now.phase == "failed" or (now.phase == "degraded" and now.error)
    return now.updated_at if is_unwell else None


def _quarantined(before: Status | None, now: Status) -> list[Notice]:
    known = {(one.node, one.at) for one in before.cordoned} if before else None
    return [
        Notice(
            fleet=now.fleet,
            at=now.updated_at,
            event="quarantined",
            phase=now.phase,
            message=f"{one.node} takes no new work: {one.reason}",
            where=f"node {one.node}",
        )
        for one in now.cordoned
        if one.kind == "quarantine" and known is not None and (one.node, one.at) not in known
    ]


def _serves_again(before: Status, now: Status) -> Notice:
    took_s = now.updated_at - (before.unwell_since or now.updated_at)
    came = _not_serving(before)
    return Notice(
        fleet=now.fleet,
        at=now.updated_at,
        event="serving",
        phase=now.phase,
        message=f"{_count(now)} again, after {took_s:.1f} s",
        where=came.name if came else "gateway",
        replica=came.name if came else "",
    )


def _ends_by_itself(now: Status) -> Notice:
    return Notice(
        fleet=now.fleet,
        at=now.updated_at,
        event="ending",
        phase=now.phase,
        message=f"the fleet ends: {now.closed}",
    )


def _unwell(now: Status) -> Notice:
    gone = _not_serving(now)
    return Notice(
        fleet=now.fleet,
        at=now.updated_at,
        event=now.phase,
        phase=now.phase,
        message=f"{_count(now)}: {why}" if (why := _why(now, gone)) else _count(now),
        where=now.error.where if now.error else gone.name if gone else "gateway",
        replica=gone.name if gone else "",
    )


def _why(now: Status, gone: ReplicaStatus | None) -> str:
    if now.error:
        return now.error.message
    if gone is not None and gone.story:
        return gone.story[-1]
    return next(iter(now.waiting_for), "")


def _not_serving(status: Status) -> ReplicaStatus | None:
    return next((one for one in status.replicas if one.phase != "serving"), None)


def _count(status: Status) -> str:
    serving = sum(one.phase == "serving" for one in status.replicas)
    return f"{serving}/{len(status.replicas)} replicas serve"
