"""The one tree of expected errors.

    FleetError
    ├── InventoryError      the inventory file or a node name is wrong          exit 2
    └── (launcher.errors)   SpecError, UsageError, BackendError, DeadlineError … see there

Every expected error says what was wrong, where, and what to do. A traceback that reaches a user
is a bug.
"""

from typing import ClassVar


class FleetError(Exception):
    """Root of every error that we expect.

    message: what was wrong, one sentence. where: file, key or node. hint: what to do next.
    """

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" {self.hint}" if self.hint else ""
        return f"{place}{self.message}{advice}"


class InventoryError(FleetError):
    """The inventory or a node list cannot be used as it is written."""

    code = "inventory"
    exit_code = 2
