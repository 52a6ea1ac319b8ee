"""One request through the rescue tier: held, sent, held back, sent again, passed on. I/O.

Nothing of an engine's answer reaches the client before its first token (or, without streaming,
before its end). Until then the engine may die, hang or fail, and another one is asked.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import hdrs, web
from yarl import URL

from launcher.gateway.call import Call
from launcher.gateway.counters import Counters
from launcher.gateway.documents import Settings
from launcher.gateway.events import Events, error_body, error_event, failure_in
from launcher.gateway.front import REFUSED_HEADER
from launcher.gateway.pool import Pool, Standing
from launcher.gateway.refusal import (
    Lost,
    Refusal,
    closing,
    gave_up,
    nobody,
    too_large,
    too_many,
    too_slow,
)
from launcher.gateway.tally import Tally, observe

TRIES_MAX = 3  # a request that kills engines must not kill them all
CONNECT_TIMEOUT_S = 2.0
BODY_TIMEOUT_S = 120.0
BODIES_MAX_BYTES = 2 * 1024**3  # in one process; the next request is told to come back
ANSWER_MAX_BYTES = 256 * 1024 * 1024
ENDS_WITH_DONE = ("/v1/chat/completions", "/v1/completions")
KEY_HEADER = "X-Launcher-Key"
MEMBER_HEADER = "X-Launcher-Replica"
FALLBACK_HEADER = "X-Launcher-Fallback"

_HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade"),
        *("transfer-encoding", "content-length", "host", "authorization", "expect"),
        *("accept-encoding", "proxy-authorization"),
    }
)
log = logging.getLogger("launcher.gateway")


class Relay:
    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        counters: Counters,
        tally: Tally,
        session: aiohttp.ClientSession,
    ) -> None:
        self.settings = settings
        self.body_bytes = 0
        self.in_flight = 0
        self._pool = pool
        self._counters = counters
        self._tally = tally
        self._session = session

    @property
    def waiting(self) -> int:
        """Requests of this process that have nothing of their answer yet."""
        return self._counters.own_waiting()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer one request, whatever happens; a traceback here would be a dropped request."""
        self.in_flight += 1
        call: Call | None = None
        try:
            key = self._pool.keys.get(request.headers.get(KEY_HEADER, ""))
            self._tally.by_key[key.name if key else ""] += 1
            self._admit(request, key.slot if key else None, key.waiting_max if key else None)
            body = await self._read(request)
            call = Call(request, body, key, self._counters)
            self.body_bytes += len(body)
            return await self._rescue(call)
        except Refusal as refusal:
            return await self._refuse(request, call, refusal)
        finally:
            self.in_flight -= 1
            if call is not None:
                self.body_bytes -= len(call.body)
                call.end()

    def _admit(self, request: web.Request, key_slot: int | None, key_max: int | None) -> None:
        if not self._pool.orders.open:
            raise closing()
        if self._counters.waiting() >= self.settings.waiting_max:
            raise too_many("of all clients", self.settings.waiting_max)
        if key_slot is not None and key_max is not None:
            if self._counters.waiting_of(key_slot) >= key_max:
                raise too_many("with this key", key_max)
        if (request.content_length or 0) > self.settings.body_max_bytes:
            raise too_large(self.settings.body_max_bytes)
        if self.body_bytes + (request.content_length or 0) > BODIES_MAX_BYTES:
            raise Refusal(429, "memory", "too many large requests are under way", 5)

    async def _read(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await request.read()
        except TimeoutError:
            raise too_slow(BODY_TIMEOUT_S) from None
        except web.HTTPRequestEntityTooLarge:
            raise too_large(self.settings.body_max_bytes) from None

    async def _rescue(self, call: Call) -> web.StreamResponse:
        """Try one member after the other until the client has its answer."""
        while True:
            standing = await self._wait_for_member(call)
            try:
                response = await self._try(call, standing)
            except Lost as lost:
                self._after_loss(call, standing, lost)
                if self._is_hopeless(call):
                    self._tally.of(standing.member.name).errors += 1
                    return await self._last_words(call, lost)
                continue
            if call.tried:
                self._tally.rescued += 1
            return response

    def _after_loss(self, call: Call, standing: Standing, lost: Lost) -> None:
        """Remember who failed. One that never got the request may be asked when it is back."""
        member = standing.member
        if not lost.connected and not member.fallback:
            self._pool.unreachable(standing)
            return
        call.tried |= {member.name}
        self._tally.of(member.name).retried += 1
        log.info("%s lost a request without a token: %s", member.name, lost.why)

    def _is_hopeless(self, call: Call) -> bool:
        if len(call.tried) >= TRIES_MAX:
            return True
        return self._pool.pick(call.tried) is None and not self._pool.may_come(call.tried)

    async def _wait_for_member(self, call: Call) -> Standing:
        """The best member now, or the first that comes while the request may be held."""
        standing = self._pool.pick(call.tried)
        if standing is not None:
            return standing
        self._tally.holding += 1
        try:
            while self._pool.orders.open:
                left_s = self.settings.hold_s - call.waited_s
                if left_s <= 0 or not self._pool.may_come(call.tried):
                    raise nobody(call.waited_s)
                await self._pool.wait_for_change(min(left_s, 1.0))
                standing = self._pool.pick(call.tried)
                if standing is not None:
                    return standing
            raise closing()
        finally:
            self._tally.holding -= 1

    async def _try(self, call: Call, standing: Standing) -> web.StreamResponse:
        """Ask one member. Raises Lost while the client has got no token."""
        member, tally = standing.member, self._tally.of(standing.member.name)
        why: list[str] = []
        self._counters.add_in_flight(member.slot, 1)
        tally.in_flight += 1
        tally.sent += 1
        observe(tally.queue, call.waited_s)
        if member.fallback:
            self._tally.fell_back += 1
        try:
            async with asyncio.timeout(None) as limit:

                def abandon(reason: str) -> None:
                    why.append(reason)
                    limit.reschedule(asyncio.get_running_loop().time())

                standing.under_way.add(abandon)
                try:
                    response = await self._ask(call, standing)
                finally:
                    standing.under_way.discard(abandon)
            tally.answered += 1
            return response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Lost(f"cannot be connected to: {error}", connected=False) from error
        except TimeoutError:
            reason = why[0] if why else "it took too long"
        except (aiohttp.ClientError, ConnectionError) as error:
            if call.request.transport is None or call.request.transport.is_closing():
                tally.aborted += 1
                raise asyncio.CancelledError from error
            reason = f"broke off: {type(error).__name__}: {error}"[:200]
        except asyncio.CancelledError:
            tally.aborted += 1
            raise
        finally:
            tally.in_flight -= 1
            self._counters.add_in_flight(member.slot, -1)
        if not call.has_tokens:
            raise Lost(reason)
        tally.broken += 1
        return await self._break_off(call, f"{member.name} {reason}")

    async def _ask(self, call: Call, standing: Standing) -> web.StreamResponse:
        member = standing.member
        # Not the request's own text: an absolute URL in its place must not change the host.
        url = URL(member.url + call.request.rel_url.raw_path_qs, encoded=True)
        began = time.monotonic()
        async with self._session.request(
            call.request.method,
            url,
            data=_body_for(call, member.model) or None,
            headers=_headers_for(call.request, standing.key),
            allow_redirects=False,
        ) as answer:
            if answer.status >= 500 or answer.status in (401, 403):
                body = await _whole(answer)
                told = body[:200].decode("utf-8", "replace")
                why = f"answered {answer.status}: {told}"
                raise Lost(why, True, answer.status, body, answer.content_type)
            headers = _headers_back(answer, member.name, member.model if member.fallback else "")
            first_token = self._tally.of(member.name).first_token
            if answer.content_type == "text/event-stream":
                chunks = _whole_events(answer, call.request.path)
                head = await _held_back(chunks)
                observe(first_token, time.monotonic() - began)
                response = await call.begin(answer.status, headers)
                await response.write(head)
                async for chunk in chunks:
                    await response.write(chunk)
                await response.write_eof()
                return response
            body = await _whole(answer)
            observe(first_token, time.monotonic() - began)
            return await self._give(call, answer.status, headers, body)

    async def _give(
        self, call: Call, status: int, headers: dict[str, str], body: bytes
    ) -> web.StreamResponse:
        """An answer that is whole; as an event where comments have begun a stream."""
        begun = call.response is not None
        if not begun:
            headers[hdrs.CONTENT_LENGTH] = str(len(body))
        response = await call.begin(status, headers)
        if begun:
            body = b"data: " + b" ".join(body.splitlines()) + b"\n\ndata: [DONE]\n\n"
        await response.write(body)
        await response.write_eof()
        return response

    async def _last_words(self, call: Call, lost: Lost) -> web.StreamResponse:
        """After the last try: what the engine said, or that it was tried."""
        if lost.status is None or lost.status in (401, 403):
            raise gave_up(len(call.tried), lost)
        headers = {"Content-Type": lost.content_type}
        return await self._give(call, lost.status, headers, lost.body)

    async def _break_off(self, call: Call, why: str) -> web.StreamResponse:
        """The client has tokens of a replica that is gone: an error event, never a silent end."""
        log.warning("a stream broke off after its tokens had begun: %s", why)
        assert call.response is not None
        with contextlib.suppress(ConnectionError):
            await call.response.write(
                error_event(f"the replica was lost: {why}", "replica_lost", 502)
            )
            await call.response.write_eof()
        return call.response

    async def _refuse(
        self, request: web.Request, call: Call | None, refusal: Refusal
    ) -> web.StreamResponse:
        self._tally.refused[refusal.cause] += 1
        log.warning(
            "refused %s %.200s: %d %s", request.method, request.path, refusal.status, refusal.cause
        )
        if call is not None:
            await call.quiet()
            if call.response is not None:
                with contextlib.suppress(ConnectionError):
                    last = error_event(refusal.message, refusal.cause, refusal.status)
                    await call.response.write(last)
                    await call.response.write_eof()
                return call.response
        headers = {REFUSED_HEADER: refusal.cause}
        if refusal.retry_after_s is not None:
            headers["Retry-After"] = str(refusal.retry_after_s)
        return web.json_response(
            error_body(refusal.message, refusal.cause, refusal.status),
            status=refusal.status,
            headers=headers,
        )


async def _whole_events(answer: aiohttp.ClientResponse, path: str) -> AsyncIterator[bytes]:
    """The stream in whole events. Raises where it ends without its end."""
    cut = Events()
    async for chunk in answer.content.iter_any():
        if whole := cut.whole(chunk):
            yield whole
    if not cut.is_done and path in ENDS_WITH_DONE:
        raise aiohttp.ClientPayloadError("the stream ended without [DONE]")


async def _held_back(chunks: AsyncIterator[bytes]) -> bytes:
    """Everything up to the first event with data. Raises Lost where that is the engine's error."""
    head = b""
    async for chunk in chunks:
        head += chunk
        if head.startswith(b"data:") or b"\ndata:" in head:
            if failure := failure_in(head):
                raise Lost(f"failed: {failure}")
            return head
    return head


async def _whole(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > ANSWER_MAX_BYTES:
            raise Refusal(502, "answer_size", "the engine's answer is too large to be passed on")
    return bytes(body)


def _body_for(call: Call, model: str) -> bytes:
    """The body as it came, but for the model's name where the member knows another."""
    if not model:
        return call.body
    document = call.document()
    if document is None:
        return call.body
    return json.dumps({**document, "model": model}).encode()


def _headers_for(request: web.Request, key: str) -> dict[str, str]:
    headers = {
        name: value
        for name, value in request.headers.items()
        if name.lower() not in _HOP_BY_HOP and not name.lower().startswith("x-launcher-")
    }
    if key:
        headers[hdrs.AUTHORIZATION] = f"Bearer {key}"
    headers[hdrs.ACCEPT_ENCODING] = "identity"
    return headers


def _headers_back(answer: aiohttp.ClientResponse, member: str, fallback: str) -> dict[str, str]:
    headers = {
        name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP
    }
    headers[MEMBER_HEADER] = member
    if fallback:
        headers[FALLBACK_HEADER] = fallback
    return headers
