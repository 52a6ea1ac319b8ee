"""Requests in flight and waiting, shared by the processes of the tier. I/O (one mapped file).

Each process writes a row of its own and reads all: so each picks the member with the fewest
requests of the whole gateway, and the bounds on waiting hold for all of it. A process that died
is taken out of the sums when the supervisor clears its row.
"""

import mmap
import os
from pathlib import Path

from launcher.gateway.documents import KEYS_MAX, MEMBERS_MAX

ROWS = 32
_WAITING = 0
_KEYS = 1
_MEMBERS = _KEYS + KEYS_MAX
_COLUMNS = _MEMBERS + MEMBERS_MAX
SIZE_BYTES = ROWS * _COLUMNS * 8


class Counters:
    """The table; `row` is the one that this process may write."""

    def __init__(self, path: Path, row: int) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(handle).st_size < SIZE_BYTES:
                os.ftruncate(handle, SIZE_BYTES)
            self._map = mmap.mmap(handle, SIZE_BYTES)
        finally:
            os.close(handle)
        self._cells = memoryview(self._map).cast("q")
        self._base = row * _COLUMNS
        self.clear(row)

    def clear(self, row: int) -> None:
        """Forget what the process of this row was doing: it has ended."""
        begin = row * _COLUMNS
        self._cells[begin : begin + _COLUMNS] = memoryview(bytes(_COLUMNS * 8)).cast("q")

    def in_flight(self, slot: int) -> int:
        return self._sum(_MEMBERS + slot)

    def waiting(self) -> int:
        return self._sum(_WAITING)

    def own_waiting(self) -> int:
        return self._cells[self._base + _WAITING]

    def waiting_of(self, key_slot: int) -> int:
        return self._sum(_KEYS + key_slot)

    def add_in_flight(self, slot: int, change: int) -> None:
        self._cells[self._base + _MEMBERS + slot] += change

    def add_waiting(self, key_slot: int | None, change: int) -> None:
        self._cells[self._base + _WAITING] += change
        if key_slot is not None:
            self._cells[self._base + _KEYS + key_slot] += change

    def _sum(self, column: int) -> int:
        return max(0, sum(self._cells[column::_COLUMNS]))
