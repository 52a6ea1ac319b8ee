"""A command on a terminal of its own, for what is asked and shown there only."""

import os
import pty
import signal
import subprocess
from contextlib import suppress

from tests.conftest import LAUNCHER


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, fleet, *words):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [str(LAUNCHER), *words],
            env={**fleet.cli.environment, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=fleet.folder,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)

    def show(self, *words: str) -> None:
        """Read until all of these were on the screen."""
        seen = b""
        while not all(word.encode() in seen for word in words):
            seen += os.read(self.master, 65536)

    def type(self, words: str) -> None:
        os.write(self.master, words.encode())

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        with suppress(OSError):  # the other side has closed it
            while os.read(self.master, 65536):
                pass
        os.close(self.master)
        return self.process.wait(10)
