"""The one door to the network for heartbeats: sealed datagrams out, unsealed ones in. I/O."""

import select
import socket
from collections.abc import Iterator

from launcher import heartbeat
from launcher.heartbeat import Message

DATAGRAM_MAX_BYTES = 256


class Line:
    """A UDP socket that speaks only to holders of the fleet's token."""

    def __init__(self, token: bytes, address: str) -> None:
        self._token = token
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 0))
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    def wait(self, timeout_s: float) -> None:
        select.select([self._socket], [], [], max(0.0, timeout_s))

    def received(self) -> Iterator[tuple[Message, tuple[str, int]]]:
        """Everything that has arrived; what was not sealed with our token is dropped."""
        while True:
            try:
                datagram, sender = self._socket.recvfrom(DATAGRAM_MAX_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                continue  # an ICMP refusal of an earlier datagram; its miss is counted anyway
            message = heartbeat.unseal(self._token, datagram)
            if message is not None:
                yield message, sender

    def send(self, message: Message, target: tuple[str, int]) -> None:
        try:
            self._socket.sendto(heartbeat.seal(self._token, message), target)
        except OSError:
            return  # no route or a full queue: the same as a datagram lost on its way

    def close(self) -> None:
        self._socket.close()
