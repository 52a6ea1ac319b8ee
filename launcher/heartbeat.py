"""The heartbeat's wire format and the rule by which a lease is lost. Pure.

One UDP datagram each way: magic, kind, nonce, scope, revision, and a MAC by the fleet's token.
An answer counts only for the question whose nonce it repeats, so a replay says nothing. Nothing
else travels: orders go through assignment.json.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass, field
from enum import Enum

PERIOD_S = 1.0
HURRIED_PERIOD_S = 0.25  # while a replica is on its way: what its nodes have to tell is waited for
JOINING_PERIOD_S = 0.2  # a peer that has not read its assignment yet is asked again soon
ANSWER_WITHIN_S = 1.2
MISSES_MAX = 3  # lost 3 × 1.2 s after the last answer's question: 4.6 s at most (bound: 5 s)
CONTROLLER = ""  # the scope of the controller's questions
REACH = "reach"  # the scope of questions that only ask: do you hear me at this address?
_MAGIC = b"LH1"
_BODY = struct.Struct("<3sc8s8sQ")
_MAC_BYTES = 16


class Kind(Enum):
    ASK = b"?"
    HELD = b"h"  # alive in this scope
    SERVING = b"s"  # alive, and a token was generated
    GONE = b"g"  # not, or no longer, a member of this scope


@dataclass(frozen=True)
class Message:
    kind: Kind
    nonce: bytes
    scope: bytes
    revision: int


def scope_bytes(scope: str) -> bytes:
    return hashlib.sha256(scope.encode()).digest()[:8]


def seal(token: bytes, message: Message) -> bytes:
    body = _BODY.pack(_MAGIC, message.kind.value, message.nonce, message.scope, message.revision)
    return body + _mac(token, body)


def unseal(token: bytes, datagram: bytes) -> Message | None:
    """The message, or None for anything that was not sealed with this token."""
    if len(datagram) != _BODY.size + _MAC_BYTES:
        return None
    body, mac = datagram[: _BODY.size], datagram[_BODY.size :]
    if not hmac.compare_digest(mac, _mac(token, body)):
        return None
    magic, kind, nonce, scope, revision = _BODY.unpack(body)
    if magic != _MAGIC:
        return None
    try:
        return Message(Kind(kind), nonce, scope, revision)
    except ValueError:
        return None


def _mac(token: bytes, body: bytes) -> bytes:
    return hmac.new(token, body, hashlib.sha256).digest()[:_MAC_BYTES]


@dataclass
class Lease:
    """What one asker knows of one peer. Times are the asker's monotonic clock.

    Misses are counted by question, not by clock: an asker that was itself stopped for a while
    asked nothing meanwhile and blames nobody.
    """

    scope: str
    held_once: bool = False
    serving: bool = False
    gone: bool = False
    misses: int = 0
    answered_at: float | None = None
    peer_revision: int = 0
    asked_at: float | None = None
    _asked: dict[bytes, float] = field(default_factory=dict)

    def is_due(self, now: float) -> bool:
        """Whether to ask again: each second, and sooner until the peer is a member for the first
        time, so that there is hardly a moment in which we serve together and nobody watches."""
        joining = not self.held_once and not self._asked
        period_s = JOINING_PERIOD_S if joining else PERIOD_S
        return self.asked_at is None or now - self.asked_at >= period_s

    def asked(self, nonce: bytes, now: float) -> None:
        self.asked_at = now
        self._asked[nonce] = now

    def answered(self, message: Message, now: float) -> bool:
        """Take an answer; False when it answers no question of ours."""
        if self._asked.pop(message.nonce, None) is None:
            return False
        self.misses = 0
        self._asked.clear()
        self.answered_at = now
        self.peer_revision = message.revision
        if message.kind is Kind.GONE:
            # Before the first HELD the peer has only not read its assignment yet.
            self.gone = self.held_once
        else:
            self.held_once = True
            self.serving = message.kind is Kind.SERVING
        return True

    def count_misses(self, now: float) -> None:
        late = [nonce for nonce, at in self._asked.items() if now - at > ANSWER_WITHIN_S]
        for nonce in late:
            del self._asked[nonce]
            self.misses += 1

    @property
    def is_lost(self) -> bool:
        # A peer was given to us because its agent had reported, so that silence is a loss from
        # the first question on, whether it has become a member already or not.
        return self.gone or self.misses >= MISSES_MAX
