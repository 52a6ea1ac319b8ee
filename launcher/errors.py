"""The expected errors of the control plane, one class per thing a user can do about it.

FleetError (inventory.errors)
├── UsageError         the command line asks for something impossible          exit 2
├── SpecError          the spec or a file that it names is wrong                exit 2
├── PreflightError     a node cannot take the work (disk, port, memory, engine) exit 3
├── DeadlineError      something observed did not come in time                  exit 4
├── CapacityError      too few nodes exist or can be reached                    exit 5
├── EngineError        the engine or a member of a replica died                 exit 1
├── BackendError       Slurm, SSH or this machine refused                       exit 1
│   ├── SlurmError         a Slurm command failed; `unreachable` tells unknown from no
│   └── RemoteError        an SSH host: unreachable, refused, timed out, failed
└── StateError         the state folder cannot be used                          exit 1
"""

from typing import Literal

from inventory.errors import FleetError


class UsageError(FleetError):
    code, exit_code = "usage", 2


class SpecError(FleetError):
    code, exit_code = "spec", 2


class PreflightError(FleetError):
    code, exit_code = "preflight", 3


class DeadlineError(FleetError):
    code, exit_code = "deadline", 4


class CapacityError(FleetError):
    code, exit_code = "capacity", 5


class EngineError(FleetError):
    code, exit_code = "engine", 1


class StateError(FleetError):
    code, exit_code = "state", 1


class BackendError(FleetError):
    code, exit_code = "backend", 1


class SlurmError(BackendError):
    """A Slurm command failed. `unreachable`: slurmctld did not answer, so nothing is known."""

    code = "slurm"

    def __init__(
        self, message: str, *, where: str = "", hint: str = "", unreachable: bool = False
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.unreachable = unreachable


__all__ = [
    "BackendError",
    "CapacityError",
    "DeadlineError",
    "EngineError",
    "FleetError",
    "PreflightError",
    "RemoteError",
    "SlurmError",
    "SpecError",
    "StateError",
    "UsageError",
]

RemoteKind = Literal["unreachable", "host_key", "auth", "timeout", "failed"]


class RemoteError(BackendError):
    """One SSH host could not do what was asked."""

    code, exit_code = "ssh", 5

    def __init__(self, kind: RemoteKind, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, where=where, hint=hint)
        self.kind = kind
