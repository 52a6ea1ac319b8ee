"""The agent's heart: a thread that answers heartbeats and holds leases on peers. I/O.

It touches no file, so that a hanging file system stops neither the answers nor the fence.
"""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from launcher import heartbeat
from launcher.documents import Peer
from launcher.heartbeat import Kind, Lease, Message
from launcher.line import Line

LOOK_S = 0.1  # at most this late for a question that is due


@dataclass(frozen=True)
class Loss:
    """A peer whose lease was lost, and whether it said itself that it is gone."""

    peer: str
    said_so: bool
    at: float


class Heart(threading.Thread):
    """Answers questions about our own scope, and asks peers about theirs when they are due."""

    def __init__(self, token: bytes, address: str, on_loss: Callable[[Loss], None]) -> None:
        super().__init__(name="heart", daemon=True)
        self._on_loss = on_loss
        self._line = Line(token, address)
        self.port = self._line.port
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.woken = threading.Event()
        self._scope: str | None = None
        self._serving = False
        self._peers: dict[str, tuple[tuple[str, int], Lease]] = {}
        self._leader: str | None = None
        self._reach_asked: dict[bytes, tuple[str, str]] = {}
        self._reach_targets: tuple[Peer, ...] = ()
        self.reach: dict[str, set[str]] = {}
        self.report_revision = 0
        self.assignment_hint = 0
        self.controller_heard_at = time.monotonic()

    def hold(self, scope: str, peers: tuple[Peer, ...], leader: str | None) -> None:
        """Answer for this scope from now on, and hold leases on these peers."""
        with self._lock:
            self._scope, self._serving, self._leader = scope, False, leader
            self._peers = {
                peer.node: ((peer.addresses[0], peer.port), Lease(scope)) for peer in peers
            }

    def release(self) -> None:
        """Answer GONE from now on: our engine is dead or being stopped."""
        with self._lock:
            self._scope, self._serving, self._peers, self._leader = None, False, {}, None

    def watch_nobody(self) -> None:
        """Give up our leases on peers, and go on answering theirs."""
        with self._lock:
            self._peers = {}

    def set_serving(self) -> None:
        """A token went through all ranks, so every peer was there, heard by us yet or not."""
        with self._lock:
            self._serving = self._scope is not None
            for _, lease in self._peers.values():
                lease.held_once = True

    def leader_serves(self) -> bool:
        """Whether the leader has answered that a token was generated."""
        with self._lock:
            held = self._peers.get(self._leader or "")
            return bool(held and held[1].serving)

    def ask_reach(self, peers: tuple[Peer, ...]) -> None:
        """Find out at which of their addresses these peers hear us."""
        with self._lock:
            self._reach_targets = peers
            self.reach = {peer.node: set() for peer in peers}
        self._ask_reach()

    def reach_found(self) -> dict[str, tuple[str, ...]]:
        with self._lock:
            return {node: tuple(sorted(found)) for node, found in self.reach.items()}

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        reach_asked_at = time.monotonic()
        while not self._stopping.is_set():
            self._line.wait(LOOK_S)
            for message, sender in self._line.received():
                if message.kind is Kind.ASK:
                    self._answer(message, sender)
                else:
                    self._take_answer(message)
            now = time.monotonic()
            self._ask_peers(now)
            if now - reach_asked_at >= heartbeat.PERIOD_S:
                self._ask_reach()
                reach_asked_at = now
            self._judge(now)
        self._line.close()

    def _answer(self, question: Message, sender: tuple[str, int]) -> None:
        with self._lock:
            if question.scope == heartbeat.scope_bytes(heartbeat.CONTROLLER):
                self.controller_heard_at = time.monotonic()
                if question.revision > self.assignment_hint:
                    self.assignment_hint = question.revision
                    self.woken.set()
                kind = Kind.HELD
            elif question.scope == heartbeat.scope_bytes(heartbeat.REACH):
                kind = Kind.HELD
            elif self._scope and question.scope == heartbeat.scope_bytes(self._scope):
                kind = Kind.SERVING if self._serving else Kind.HELD
            else:
                kind = Kind.GONE
            revision = self.report_revision
        self._line.send(Message(kind, question.nonce, question.scope, revision), sender)

    def _take_answer(self, message: Message) -> None:
        now = time.monotonic()
        with self._lock:
            reached = self._reach_asked.pop(message.nonce, None)
            if reached is not None:
                node, address = reached
                self.reach.setdefault(node, set()).add(address)
                self.woken.set()
                return
            for _, lease in self._peers.values():
                if lease.answered(message, now):
                    return

    def _ask_peers(self, now: float) -> None:
        with self._lock:
            questions = []
            for target, lease in self._peers.values():
                if lease.is_due(now):
                    nonce = secrets.token_bytes(8)
                    lease.asked(nonce, now)
                    questions.append((nonce, heartbeat.scope_bytes(lease.scope), target))
        self._send(questions)

    def _ask_reach(self) -> None:
        scope = heartbeat.scope_bytes(heartbeat.REACH)
        with self._lock:
            if len(self._reach_asked) > 10_000:
                self._reach_asked.clear()
            questions = []
            for peer in self._reach_targets:
                for address in set(peer.addresses) - self.reach.get(peer.node, set()):
                    nonce = secrets.token_bytes(8)
                    self._reach_asked[nonce] = (peer.node, address)
                    questions.append((nonce, scope, (address, peer.port)))
        self._send(questions)

    def _send(self, questions: list[tuple[bytes, bytes, tuple[str, int]]]) -> None:
        for nonce, scope, target in questions:
            self._line.send(Message(Kind.ASK, nonce, scope, 0), target)

    def _judge(self, now: float) -> None:
        with self._lock:
            lost: Loss | None = None
            for node, (_, lease) in self._peers.items():
                lease.count_misses(now)
                if lease.is_lost:
                    lost = Loss(node, lease.gone, time.time())
                    break
            if lost is not None:
                self._scope, self._serving, self._peers = None, False, {}
        if lost is not None:
            self._on_loss(lost)
            self.woken.set()
