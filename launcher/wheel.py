"""The wheel of a fleet in the hands of the one process that drives it, until it lets go. I/O."""

import contextlib
import os
import signal
import socket
import threading
import time

from launcher.errors import StateError
from launcher.files import read_document, write_document
from launcher.paths import FleetPaths
from launcher.slurm_tools.jobs import own_place
from launcher.wish import Driver


class LostWheelError(StateError):
    """Another controller drives: this one was silent for too long, and must not go on."""


class Wheel:
    """Outlives a controller that had to begin again (a full disk, Slurm away), and its signals."""

    def __init__(self, paths: FleetPaths, run: int) -> None:
        self.told_to_end = threading.Event()
        self.woken = threading.Event()
        self.place = own_place()
        self._file = paths.controller
        self._driver = Driver(
            host=socket.gethostname(),
            pid=os.getpid(),
            run=run,
            beat=0,
            started_at=time.time(),
            job=self.place.job if self.place else "",
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def hold(self) -> None:
        """Show that we live. Raises LostWheelError where another host took us for dead meanwhile,
        for locks do not cross hosts on every file system."""
        if self._driver.beat:
            now = read_document(self._file, Driver)
            if now is not None and (now.host, now.pid) != (self._driver.host, self._driver.pid):
                raise LostWheelError(f"is held by pid {now.pid} on {now.host}", where="the wheel")
        self._driver = self._driver.model_copy(update={"beat": self._driver.beat + 1})
        write_document(self._file, self._driver)

    def leave(self) -> None:
        """Say that we do not come again: a successor need not watch our beat."""
        with contextlib.suppress(StateError):
            self.hold()
            write_document(self._file, self._driver.model_copy(update={"ended": True}))

    def _on_signal(self, number: int, frame: object) -> None:
        self.told_to_end.set()
        self.woken.set()
