"""One request to one engine, on a connection of its own. I/O.

Bytes go from the engine's connection to the client's in the callback that brings them: no queue
and no task in between, which halves what a chunk costs. Parsing is llhttp's (httptools). Each
request has a connection of its own: none is closed by the engine just when a request wants it.
"""

import asyncio
import errno
import functools
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import cast

import httptools
from yarl import URL

from launcher.gateway.refusal import Refusal

CONNECT_TIMEOUT_S = 2.0
HEADERS_MAX = 256
# What this process or its host lacks: no word about the engine.
OUR_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)


@functools.cache
def _tls() -> ssl.SSLContext:
    """Made once: it reads all certificates of the system."""
    return ssl.create_default_context()


class NotConnectedError(Exception):
    """Nobody takes connections there; the request was not sent."""


class BrokenError(Exception):
    """The answer ended before its end."""


class Upstream(asyncio.Protocol):
    """The client's side of one exchange: `ask`, then `begin`, then `read` or `pipe`."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._begun: asyncio.Future[None] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()
        self._chunks: deque[bytes] = deque()
        self._sink: Callable[[bytes], None] | None = None
        self._more = asyncio.Event()
        self._is_framed = False
        self.status = 0
        self.headers: list[tuple[str, str]] = []

    @classmethod
    async def connect(cls, url: URL) -> "Upstream":
        """Raises NotConnectedError, within seconds."""
        secure = _tls() if url.scheme == "https" else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, made = await asyncio.get_running_loop().create_connection(
                    cls, url.host or "", url.port or 80, ssl=secure
                )
        except TimeoutError:
            raise NotConnectedError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from None
        except OSError as error:
            if error.errno in OUR_LIMITS:
                raise Refusal(503, "descriptors", "the gateway is at its limit", 2) from error
            raise NotConnectedError(str(error)) from error
        return made

    def ask(self, method: str, url: URL, headers: list[tuple[str, str]], body: bytes) -> None:
        """Send the request. The headers are HAProxy's and ours: none holds a line break."""
        assert self._transport is not None
        host = url.host if url.is_default_port() else f"{url.host}:{url.port}"
        lines = [f"{method} {url.raw_path_qs} HTTP/1.1", f"Host: {host}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers]
        if body or method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")
        self._transport.write(head + body)

    async def begin(self) -> None:
        """Wait for status and headers. Raises BrokenError."""
        await self._begun

    @property
    def content_type(self) -> str:
        value = next((v for name, v in self.headers if name.lower() == "content-type"), "")
        return value.partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """The next part of the body; empty at its end. Raises BrokenError."""
        while not self._chunks and not self._over.done():
            self._more.clear()
            await self._more.wait()
        if self._chunks:
            return self._chunks.popleft()
        self._over.result()
        return b""

    async def pipe(self, sink: Callable[[bytes], None]) -> None:
        """Give every part to `sink` the moment it comes, to the end. Raises BrokenError."""
        while self._chunks:
            sink(self._chunks.popleft())
        self._sink = sink
        await asyncio.shield(self._over)

    def pause(self, paused: bool) -> None:
        """Let the engine wait, for the client is slower."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading() if paused else self._transport.resume_reading()

    def break_off(self, why: str) -> None:
        """What came is no answer, though the connection holds: a BrokenError from now on."""
        self._fail(why)

    def close(self) -> None:
        """End the exchange at once; an engine that is still at it stops."""
        if self._transport is not None:
            self._transport.abort()
        for future in (self._begun, self._over):
            if future.done() and not future.cancelled():
                future.exception()  # it was seen, or nobody is interested any more
            else:
                future.cancel()

    # What the loop and the parser call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no common class
        found = transport.get_extra_info("socket")
        if found is not None and found.family != socket.AF_UNIX:
            for level, option, value in _KEEPALIVE:
                found.setsockopt(level, option, value)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"what it sends is not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        if self._begun.done() and not self._is_framed and error is None:
            self._finish()  # a body without a length ends with its connection
        self._fail(f"closed the connection{f': {error}' if error else ''}")

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= HEADERS_MAX:
            raise ValueError("too many headers")
        self.headers.append((name.decode("latin-1"), value.decode("latin-1")))
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._is_framed = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if not self._begun.done():
            self._begun.set_result(None)

    def on_body(self, data: bytes) -> None:
        if self._sink is not None:
            self._sink(data)
        else:
            self._chunks.append(data)
            self._more.set()

    def on_message_complete(self) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self._over.done():
            self._over.set_result(None)
        self._more.set()

    def _fail(self, why: str) -> None:
        for future in (self._begun, self._over):
            if not future.done():
                future.set_exception(BrokenError(why))
        self._more.set()
        if self._transport is not None:
            self._transport.abort()
