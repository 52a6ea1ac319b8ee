"""Fake engines as processes of their own, which can be stopped, killed and told to misbehave."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "fakes/openai_engine.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Engine:
    """One engine. Leaving the block, or `kill`, ends it at once."""

    def __init__(self, port: int | None = None, **behaviour: object) -> None:
        self.port = port or free_port()
        self.behaviour = behaviour
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(self.port), json.dumps(self.behaviour)],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"listening\n"

    def fault(self, **changes: object) -> None:
        data = json.dumps(changes).encode()
        urllib.request.urlopen(f"{self.url}/fault", data=data, timeout=5).read()

    def counts(self) -> dict:
        return json.load(urllib.request.urlopen(f"{self.url}/counts", timeout=5))

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
