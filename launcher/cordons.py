"""The ledger of cordons on disk: one file for each backend, below the state folder. I/O."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from inventory.ledger import Ledger
from launcher.files import make_private, read_document, write_document
from launcher.paths import state_root


def read(scope: str) -> Ledger:
    """The cordons of this backend. Raises StateError for a file that is none."""
    return read_document(_file(scope), Ledger) or Ledger()


def change(scope: str, edit: Callable[[Ledger], Ledger]) -> Ledger:
    """Replace the ledger by what `edit` makes of it, while nobody else does."""
    with _locked(scope):
        before = read(scope)
        after = edit(before)
        if after != before:
            write_document(_file(scope), after)
        return after


def lift(scope: str, node: str) -> None:
    """Let this node take work again."""
    change(scope, lambda ledger: ledger.without(node))


def _file(scope: str) -> Path:
    return state_root() / f".cordons-{scope}.json"


@contextlib.contextmanager
def _locked(scope: str) -> Iterator[None]:
    make_private(state_root())
    handle = os.open(
        state_root() / f".cordons-{scope}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
