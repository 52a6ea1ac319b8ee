"""One request through the rescue tier: held, sent, held back, sent again, passed on. I/O.

Nothing of an engine's answer reaches the client before its first token (or, without streaming,
before its end). Until then the engine may die, hang or fail, and another one is asked.
"""

import asyncio
import contextlib
import logging
import time

from aiohttp import web

from launcher.gateway.attempt import Attempts
from launcher.gateway.call import Call
from launcher.gateway.continuation import Continuation
from launcher.gateway.counters import Counters
from launcher.gateway.documents import Key, Settings
from launcher.gateway.events import error_body, error_event
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
from launcher.gateway.tally import Tally

TRIES_MAX = 3  # a request that kills engines must not kill them all
BODY_TIMEOUT_S = 120.0
BODIES_MAX_BYTES = 2 * 1024**3  # in one process; the next request is told to come back
# After the controller has taken a replica that died under a request for dead, it has this long to
# say that another one comes.
VERDICT_S = 10.0
KEY_HEADER = "X-Launcher-Key"

log = logging.getLogger("launcher.gateway")


class Relay:
    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        counters: Counters,
        tally: Tally,
        attempts: Attempts,
    ) -> None:
        self.settings = settings
        self.body_bytes = 0
        self.in_flight = 0
        self._asking = 0
        self._asked_at = time.monotonic()
        self._pool = pool
        self._counters = counters
        self._tally = tally
        self._attempts = attempts

    @property
    def waiting(self) -> int:
        """Requests of this process that have nothing of their answer yet."""
        return self._counters.own_waiting()

    @property
    def quiet_s(self) -> float:
        """For how long nothing was asked of a model here; a list of models is nothing asked."""
        return 0.0 if self._asking else time.monotonic() - self._asked_at

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, whatever happens; a traceback here would be a dropped request."""
        self.in_flight += 1
        asks = request.method == "POST"
        self._asking += asks
        call: Call | None = None
        try:
            key = await self._key_of(request)
            self._tally.by_key[key.name if key else ""] += 1
            self._admit(request, key)
            call = Call(request, key, self._counters)
            await self._read(call)
            if self.settings.continue_streams:
                call.continuation = Continuation.of(request.path, call.document())
            return await self._rescue(call)
        except Refusal as refusal:
            return await self._refuse(request, call, refusal)
        except Exception:
            log.exception("a request met a bug of ours")
            return await self._refuse(
                request, call, Refusal(500, "bug", "the gateway failed at this request")
            )
        finally:
            self.in_flight -= 1
            if asks:
                self._asking -= 1
                self._asked_at = time.monotonic()
            if call is not None:
                self.body_bytes -= call.counted_bytes
                call.end()

    async def _key_of(self, request: web.BaseRequest) -> Key | None:
        """The key that the front found; one that was revoked meanwhile is none."""
        name = request.headers.get(KEY_HEADER)
        if name is None or not self._pool.has_keys:
            return None
        if name not in self._pool.keys:
            await self._pool.look()
        if name not in self._pool.keys:
            raise Refusal(401, "key", "the API key is missing or not valid")
        return self._pool.keys[name]

    def _admit(self, request: web.BaseRequest, key: Key | None) -> None:
        if not self._pool.orders.open:
            raise closing()
        if self._counters.waiting() >= self.settings.waiting_max:
            raise too_many("of all clients", self.settings.waiting_max)
        if key is not None and key.waiting_max is not None:
            if self._counters.waiting_of(key.slot) >= key.waiting_max:
                raise too_many("with this key", key.waiting_max)
        if (request.content_length or 0) > self.settings.body_max_bytes:
            raise too_large(self.settings.body_max_bytes)

    async def _read(self, call: Call) -> None:
        """The whole body: it may have to be sent more than once."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while chunk := await call.request.content.readany():
                    body += chunk
                    call.counted_bytes += len(chunk)
                    self.body_bytes += len(chunk)
                    if len(body) > self.settings.body_max_bytes:
                        raise too_large(self.settings.body_max_bytes)
                    if self.body_bytes > BODIES_MAX_BYTES:
                        raise Refusal(429, "memory", "too many large requests are under way", 5)
        except TimeoutError:
            raise too_slow(BODY_TIMEOUT_S) from None
        call.take_body(bytes(body))

    async def _rescue(self, call: Call) -> web.StreamResponse:
        """Try one member after the other until the client has its answer."""
        while True:
            standing = await self._wait_for_member(call)
            try:
                response = await self._attempts.make(call, standing)
            except Lost as lost:
                self._after_loss(call, standing, lost)
                if self._is_hopeless(call, lost):
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
        if lost.status is None:
            call.lost_at = time.monotonic()
        self._tally.of(member.name).retried += 1
        what = "stream in the middle" if call.has_tokens else "request without a token"
        log.info("%s lost a %s: %s", member.name, what, lost.why)

    def _is_hopeless(self, call: Call, lost: Lost) -> bool:
        """Whether nobody is left. Who died is waited for; who answered has said what it thinks."""
        if len(call.tried) >= TRIES_MAX:
            return True
        if lost.status is None:
            return False  # it died: the controller may have another one soon
        return self._pool.pick(call.tried, with_fallback=not call.has_tokens) is None

    async def _wait_for_member(self, call: Call) -> Standing:
        """The best member now, or the first that comes while the request may be held."""
        standing = self._pool.pick(call.tried, with_fallback=not call.has_tokens)
        if standing is not None:
            return standing
        self._tally.holding += 1
        try:
            while self._pool.orders.open:
                left_s = self.settings.hold_s - call.waited_s
                if left_s <= 0 or not self._is_hopeful(call):
                    raise nobody(call.waited_s)
                await self._pool.wait_for_change(min(left_s, 1.0))
                standing = self._pool.pick(call.tried, with_fallback=not call.has_tokens)
                if standing is not None:
                    return standing
            raise closing()
        finally:
            self._tally.holding -= 1

    def _is_hopeful(self, call: Call) -> bool:
        """Whether somebody may come. While the controller is silent (its disk is full) nobody has
        said of those that died here that they are given up."""
        return (
            self._pool.may_come(call.tried)
            or call.lost_since_s < VERDICT_S
            or self._pool.awaits_a_verdict(call.tried)
        )

    async def _last_words(self, call: Call, lost: Lost) -> web.StreamResponse:
        """After the last try: what the engine said, or that it was tried."""
        if lost.status is None or lost.status in (401, 403) or call.has_tokens:
            raise gave_up(len(call.tried), lost)
        headers = {"Content-Type": lost.content_type}
        return await self._attempts.give(call, lost.status, headers, lost.body)

    async def _refuse(
        self, request: web.BaseRequest, call: Call | None, refusal: Refusal
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
