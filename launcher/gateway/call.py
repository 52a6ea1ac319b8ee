"""One request as it waits: who asks, what for, how long, and what the client has of the answer."""

import asyncio
import contextlib
import json
import time

from aiohttp import hdrs, web

from launcher.gateway import events
from launcher.gateway.continuation import Continuation
from launcher.gateway.counters import Counters
from launcher.gateway.documents import Key

# A stream that has no token yet is kept alive from then on, so that nobody between here and the
# client takes silence for death. From the first comment on the status is 200.
COMMENT_AFTER_S = 10.0


class Call:
    """A request from its arrival to its last byte. Counted as waiting until something is sent."""

    def __init__(self, request: web.BaseRequest, key: Key | None, counters: Counters) -> None:
        self.request = request
        self.body = b""
        self.counted_bytes = 0  # of the body, as far as it has come
        self.key = key
        self.began = time.monotonic()
        self.tried: frozenset[str] = frozenset()
        self.response: web.StreamResponse | None = None
        self.has_tokens = False
        self.lost_at = float("-inf")  # when a replica died under it
        self.continuation: Continuation | None = None
        self._counters = counters
        self._is_waiting = False
        self._comments: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._set_waiting(True)

    def take_body(self, body: bytes) -> None:
        """The request is whole; from now on its client waits for us."""
        self.body = body
        self._timer = asyncio.get_running_loop().call_later(COMMENT_AFTER_S, self._start_comments)

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def lost_since_s(self) -> float:
        return time.monotonic() - self.lost_at

    def document(self) -> dict[str, object] | None:
        """The body as JSON, where it is an object. Read only when something depends on it."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    async def begin(self, status: int, headers: dict[str, str]) -> web.StreamResponse:
        """The response to the client, begun once; comments end before the first token."""
        await self.quiet()
        self.has_tokens = True
        if self.response is None:
            self.response = web.StreamResponse(status=status, headers=headers)
            if hdrs.CONTENT_LENGTH not in self.response.headers:
                self.response.enable_chunked_encoding()
            await self.response.prepare(self.request)
        return self.response

    async def quiet(self) -> None:
        """Nothing is waited for any more."""
        self._set_waiting(False)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._comments is not None:
            async with self._writing:  # never in the middle of a comment
                self._comments.cancel()
            self._comments = None

    def end(self) -> None:
        """However it ended, also in the middle."""
        self._set_waiting(False)
        if self._timer is not None:
            self._timer.cancel()
        if self._comments is not None:
            self._comments.cancel()

    def _set_waiting(self, waiting: bool) -> None:
        if waiting != self._is_waiting:
            self._is_waiting = waiting
            slot = self.key.slot if self.key else None
            self._counters.add_waiting(slot, 1 if waiting else -1)

    def _start_comments(self) -> None:
        self._comments = asyncio.ensure_future(self._comment())

    async def _comment(self) -> None:
        document = self.document()
        if document is None or document.get("stream") is not True:
            return
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
            }
        )
        response.enable_chunked_encoding()
        with contextlib.suppress(ConnectionError):  # who reads them has left
            async with self._writing:
                await response.prepare(self.request)
                self.response = response
            while True:
                async with self._writing:
                    await response.write(events.COMMENT)
                await asyncio.sleep(COMMENT_AFTER_S)
