"""The controller's side of the heartbeat: asks every agent each second, or sooner. I/O.

The question carries the newest assignment revision, so that the agent reads its file at once; the
answer carries the newest report revision, so that the controller does.
"""

import secrets
import threading
import time
from dataclasses import dataclass

from launcher import heartbeat
from launcher.heartbeat import Kind, Lease, Message
from launcher.line import Line


@dataclass(frozen=True)
class Target:
    """One agent: every address that it reported, its port, and our newest order to it."""

    addresses: tuple[str, ...]
    port: int
    assignment_revision: int


@dataclass(frozen=True)
class Contact:
    """What the pulse knows of one agent."""

    answered_at: float | None
    report_revision: int
    addresses: tuple[str, ...]


class Pulse(threading.Thread):
    def __init__(self, token: bytes) -> None:
        super().__init__(name="pulse", daemon=True)
        self._line = Line(token, "0.0.0.0")
        self._lock = threading.Lock()
        self._targets: dict[str, Target] = {}
        self._leases: dict[tuple[str, str], Lease] = {}
        self._stopping = threading.Event()
        self.woken = threading.Event()
        self.period_s = heartbeat.PERIOD_S

    def aim(self, targets: dict[str, Target]) -> None:
        """Ask exactly these agents from now on; a changed order is told at once."""
        with self._lock:
            urgent = [
                node
                for node, target in targets.items()
                if node in self._targets
                and target.assignment_revision > self._targets[node].assignment_revision
            ]
            for key in list(self._leases):
                node, address = key
                if node not in targets or address not in targets[node].addresses:
                    del self._leases[key]
            self._targets = dict(targets)
        if urgent:
            self._ask(urgent)

    def contact(self, node: str) -> Contact:
        with self._lock:
            heard = [
                (address, lease)
                for (name, address), lease in self._leases.items()
                if name == node and lease.answered_at is not None
            ]
        answered = [lease.answered_at for _, lease in heard if lease.answered_at is not None]
        return Contact(
            answered_at=max(answered, default=None),
            report_revision=max((lease.peer_revision for _, lease in heard), default=0),
            addresses=tuple(address for address, _ in heard),
        )

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        next_ask = time.monotonic()
        while not self._stopping.is_set():
            self._line.wait(min(0.2, next_ask - time.monotonic()))
            now = time.monotonic()
            for message, _ in self._line.received():
                self._take(message, now)
            if now >= next_ask:
                with self._lock:
                    nodes = list(self._targets)
                self._ask(nodes)
                next_ask = now + self.period_s
        self._line.close()

    def _take(self, message: Message, now: float) -> None:
        with self._lock:
            for lease in self._leases.values():
                before = lease.peer_revision
                if lease.answered(message, now):
                    if lease.peer_revision != before:
                        self.woken.set()
                    return

    def _ask(self, nodes: list[str]) -> None:
        now = time.monotonic()
        scope = heartbeat.scope_bytes(heartbeat.CONTROLLER)
        questions = []
        with self._lock:
            for node in nodes:
                target = self._targets.get(node)
                for address in target.addresses if target else ():
                    lease = self._leases.setdefault((node, address), Lease(heartbeat.CONTROLLER))
                    lease.count_misses(now)
                    nonce = secrets.token_bytes(8)
                    lease.asked(nonce, now)
                    assert target is not None
                    question = Message(Kind.ASK, nonce, scope, target.assignment_revision)
                    questions.append((question, (address, target.port)))
        for question, where in questions:
            self._line.send(question, where)
