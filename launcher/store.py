"""What the controller keeps on disk: the record, the journal, the cordons, what was rendered. I/O.

One door, so that the loop can be run against another store (the simulation's).
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from inventory.ledger import Ledger
from launcher import cordons
from launcher.files import make_private, write_document, write_text
from launcher.journal import Journal
from launcher.paths import RunPaths
from launcher.record import RunRecord


class Store(Protocol):
    """Raises StateError where the disk does not take what it must keep."""

    def save(self, record: RunRecord) -> None:
        """Keep the intent; nothing is done before this has returned."""

    def note(self, event: str, **details: Any) -> None:
        """Add a line to the journal."""

    def ledger(self) -> Ledger:
        """The cordons as they are now; others change them, too."""

    def change_ledger(self, edit: Callable[[Ledger], Ledger]) -> None:
        """Replace the ledger by what `edit` makes of it, while nobody else does."""

    def keep_rendered(self, allocation: str, scripts: Mapping[str, str]) -> None:
        """What runs in an allocation, for people to read."""


class DiskStore:
    """The store of one run, below the fleet's folder."""

    def __init__(self, paths: RunPaths, backend: str) -> None:
        self._paths = paths
        self._backend = backend
        self._journal = Journal(paths.journal)

    def save(self, record: RunRecord) -> None:
        write_document(self._paths.record, record)

    def note(self, event: str, **details: Any) -> None:
        self._journal.write(event, **details)

    def ledger(self) -> Ledger:
        return cordons.read(self._backend)

    def change_ledger(self, edit: Callable[[Ledger], Ledger]) -> None:
        cordons.change(self._backend, edit)

    def keep_rendered(self, allocation: str, scripts: Mapping[str, str]) -> None:
        folder = make_private(self._paths.rendered / allocation)
        for name, text in scripts.items():
            write_text(folder / name, text, mode=0o700)
