"""Which processes of an engine stand still: stopped, or in the kernel beyond any signal. I/O.

One of them is enough to hold up every rank. Whoever reads why a replica stalled wants its name.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path

HANGS_AFTER_S = 10.0
_LATER = {"D": "hangs in the kernel (state D)", "t": "is held by a debugger"}


class Suspects:
    """What was found at the last look, in words: who is stopped now, who hangs for a while."""

    def __init__(self) -> None:
        self.found: tuple[str, ...] = ()
        self.hanging: frozenset[int] = frozenset()  # in state D now
        self._since: dict[tuple[int, str], float] = {}

    def look(self, now: float, pids: Iterable[int]) -> None:
        """One file for each process, and none that a hanging process can block."""
        seen = [state for pid in sorted(pids) if (state := name_and_state(pid))]
        self.take(now, seen)

    def take(self, now: float, seen: list[tuple[int, str, str]]) -> None:
        """Judge processes, each given by its pid, name and state."""
        self.hanging = frozenset(pid for pid, _, state in seen if state == "D")
        slow = {(pid, state) for pid, _, state in seen if state in _LATER}
        self._since = {key: self._since.get(key, now) for key in slow}
        found = []
        for pid, name, state in seen:
            if state == "T":
                found.append(f"process {pid} ({name}) is stopped (SIGSTOP?)")
            elif state in _LATER and now - self._since[pid, state] >= HANGS_AFTER_S:
                found.append(f"process {pid} ({name}) {_LATER[state]}")
        self.found = tuple(found)


def name_and_state(pid: int, thread: int | None = None) -> tuple[int, str, str] | None:
    """Pid, name and state letter of a process (or of one of its threads); None when it is gone."""
    folder = f"/proc/{pid}" if thread is None else f"/proc/{pid}/task/{thread}"
    with contextlib.suppress(OSError, IndexError):
        text = Path(folder, "stat").read_text(encoding="utf-8", errors="replace")
        before, _, after = text.rpartition(")")  # a name may hold blanks and brackets
        return thread or pid, before.partition("(")[2], after.split()[0]
    return None
