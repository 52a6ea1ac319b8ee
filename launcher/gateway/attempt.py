"""One try of one request at one member: sent, held back until the first token, passed on. I/O."""

import asyncio
import contextlib
import json
import logging
import time

import aiohttp
from aiohttp import hdrs, web
from yarl import URL

from launcher.gateway.call import Call
from launcher.gateway.counters import Counters
from launcher.gateway.documents import Member
from launcher.gateway.events import Events, error_event, failure_in
from launcher.gateway.pool import Standing
from launcher.gateway.refusal import Lost, Refusal
from launcher.gateway.tally import Tally, observe

ANSWER_MAX_BYTES = 256 * 1024 * 1024
ENDS_WITH_DONE = ("/v1/chat/completions", "/v1/completions")
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


class Attempts:
    """How a member is asked. Counts what becomes of each try."""

    def __init__(self, counters: Counters, tally: Tally, session: aiohttp.ClientSession) -> None:
        self._counters = counters
        self._tally = tally
        self._session = session

    async def make(self, call: Call, standing: Standing) -> web.StreamResponse:
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
        if call.continuation and call.continuation.can_resume:
            tally.continued += 1
            raise Lost(reason)
        tally.broken += 1
        return await self._break_off(call, f"{member.name} {reason}")

    async def _ask(self, call: Call, standing: Standing) -> web.StreamResponse:
        member = standing.member
        # Not the request's own text: an absolute URL in its place must not change the host.
        path, body = call.request.rel_url.raw_path_qs, _body_for(call, member)
        if call.has_tokens and call.continuation:
            path, body = call.continuation.resume(member.model)
        url = URL(member.url + path, encoded=True)
        began = time.monotonic()
        async with self._session.request(
            call.request.method,
            url,
            data=body or None,
            headers=_headers_for(call.request, standing.key),
            allow_redirects=False,
        ) as answer:
            if answer.status >= 500 or answer.status in (401, 403):
                said = await _whole(answer)
                why = f"answered {answer.status}: {said[:200].decode('utf-8', 'replace')}"
                raise Lost(why, True, answer.status, said, answer.content_type)
            if call.has_tokens and answer.content_type != "text/event-stream":
                said = await _whole(answer)
                raise Lost(f"does not continue: {answer.status}", True, answer.status, said)
            headers = _headers_back(answer, member.name, member.model if member.fallback else "")
            first_token = self._tally.of(member.name).first_token
            if answer.content_type == "text/event-stream":
                cut = Events()
                head = await _held_back(answer.content, cut)
                standing.answered_at = time.monotonic()
                observe(first_token, standing.answered_at - began)
                response = await call.begin(answer.status, headers)
                told = call.continuation.pass_on if call.continuation else bytes
                await response.write(told(head))
                while chunk := await answer.content.readany():
                    if events := cut.whole(chunk):
                        await response.write(told(events))
                if not cut.is_done and call.request.path in ENDS_WITH_DONE:
                    raise aiohttp.ClientPayloadError("the stream ended without [DONE]")
                await response.write_eof()
                return response
            whole = await _whole(answer)
            standing.answered_at = time.monotonic()
            observe(first_token, standing.answered_at - began)
            return await self.give(call, answer.status, headers, whole)

    async def give(
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


async def _held_back(content: aiohttp.StreamReader, cut: Events) -> bytes:
    """Everything up to the first event with data. Raises Lost where that is the engine's error,
    and ClientPayloadError where there is none."""
    head = b""
    while chunk := await content.readany():
        head += cut.whole(chunk)
        if head.startswith(b"data:") or b"\ndata:" in head:
            if failure := failure_in(head):
                raise Lost(f"failed: {failure}")
            return head
    raise aiohttp.ClientPayloadError("the stream ended before it began")


async def _whole(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > ANSWER_MAX_BYTES:
            raise Refusal(502, "answer_size", "the engine's answer is too large to be passed on")
    return bytes(body)


def _body_for(call: Call, member: Member) -> bytes:
    """The body as it came, but for the model's name where the member knows another."""
    if call.continuation and not member.fallback:
        return call.continuation.first_body(member.model)
    if not member.model:
        return call.body
    document = call.document()
    if document is None:
        return call.body
    return json.dumps({**document, "model": member.model}).encode()


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
