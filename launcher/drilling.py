"""The faults of `launcher drill`: what each does, how long it lasts, what came of it. Pure."""

from dataclasses import dataclass

from launcher.record import Incident
from launcher.status import ReplicaStatus, Status

HANG_S = 300.0  # a frozen engine that nobody ended goes on after this
DISK_S = 60.0
DISK_LEFT_BYTES = 64 * 1024 * 1024
# No agent is known to be lost before its report is a minute old where heartbeats do not reach it.
DETECTED_WITHIN_S = {"rank": 60.0, "node": 120.0, "hang": HANG_S + 30, "disk": DISK_S + 10}

KINDS = {
    "rank": "kill the engine's process",
    "node": "kill the agent and everything that it runs, as by loss of power",
    "hang": "stop the engine's processes (SIGSTOP)",
    "disk": "fill the file system of the engine's scratch folder but for 64 MiB",
}


@dataclass(frozen=True)
class Course:
    """How a drill goes: by the controller's clock, from its order on."""

    replica: str
    generation: int  # that it was meant for
    began_at: float
    detected_at: float | None = None
    served_at: float | None = None

    @property
    def detect_s(self) -> float | None:
        return None if self.detected_at is None else max(0.0, self.detected_at - self.began_at)

    @property
    def serve_s(self) -> float | None:
        return None if self.served_at is None else max(0.0, self.served_at - self.began_at)


def followed(course: Course, status: Status, incidents: tuple[Incident, ...]) -> Course:
    """The course after one more look: noticed by the status or by the incident of the record,
    whichever is earlier; over once the whole fleet serves, the replica in a later generation."""
    its = replica_of(status, course.replica)
    if its is None or status.updated_at < course.began_at:
        return course
    later = its.generation > course.generation
    detected_at = course.detected_at
    if detected_at is None and (later or its.phase != "serving" or status.phase != "serving"):
        known = [one.at for one in incidents if one.at >= course.began_at]
        detected_at = min([status.updated_at, *known[:1]])
    served_at = course.served_at
    if served_at is None and later and its.phase == "serving" and status.phase == "serving":
        served_at = max(its.since or status.updated_at, detected_at or 0.0)
    return Course(course.replica, course.generation, course.began_at, detected_at, served_at)


def replica_of(status: Status, name: str) -> ReplicaStatus | None:
    return next((one for one in status.replicas if one.name == name), None)
