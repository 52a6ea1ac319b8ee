"""One try of one request at one member: sent, held back until the first token, passed on. I/O."""

import asyncio
import contextlib
import json
import logging
import time

from aiohttp import hdrs, web
from yarl import URL

from launcher.gateway.call import Call
from launcher.gateway.counters import Counters
from launcher.gateway.documents import Member
from launcher.gateway.events import Events, error_event, failure_in
from launcher.gateway.pool import Standing
from launcher.gateway.refusal import Lost, Refusal
from launcher.gateway.tally import Tally, observe
from launcher.gateway.upstream import BrokenError, NotConnectedError, Upstream

ANSWER_MAX_BYTES = 256 * 1024 * 1024
# A client that does not read makes its engine wait: no more than this lies here for it.
CLIENT_BEHIND_BYTES = 256 * 1024
CLIENT_LOOK_S = 0.05
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

    def __init__(self, counters: Counters, tally: Tally) -> None:
        self._counters = counters
        self._tally = tally

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
            standing.note(failed=False)
            return response
        except Lost:
            standing.note(failed=True)
            raise
        except NotConnectedError as error:
            raise Lost(f"cannot be connected to: {error}", connected=False) from error
        except TimeoutError:
            reason = why[0] if why else "it took too long"
        except BrokenError as error:
            reason = str(error)[:200]
            standing.note(failed=True)
        except ConnectionError as error:  # the client's: an engine's would be a BrokenError
            tally.aborted += 1
            raise asyncio.CancelledError from error
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
        upstream = await Upstream.connect(url)
        try:
            headers = _headers_for(call.request, standing.key)
            upstream.ask(call.request.method, url, headers, body)
            await upstream.begin()
            is_stream = upstream.content_type == "text/event-stream"
            if upstream.status >= 500 or upstream.status in (401, 403):
                said = await _whole(upstream)
                standing.forget_key()
                why = f"answered {upstream.status}: {said[:200].decode('utf-8', 'replace')}"
                raise Lost(why, True, upstream.status, said, upstream.content_type)
            if call.has_tokens and not is_stream:
                why = f"does not continue the stream, answers {upstream.status}"
                raise Lost(why, True, upstream.status, await _whole(upstream))
            back = _headers_back(upstream, member)
            first = await (_held_back if is_stream else _whole)(upstream)
            standing.answered_at = time.monotonic()
            observe(self._tally.of(member.name).first_token, standing.answered_at - began)
            if is_stream:
                return await _stream(call, upstream, back, first)
            return await self.give(call, upstream.status, back, first)
        finally:
            upstream.close()

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


async def _stream(
    call: Call, upstream: Upstream, headers: dict[str, str], head: bytes
) -> web.StreamResponse:
    """Pass a stream on, event by event, from its first token to its end."""
    cut = Events()
    told = call.continuation.pass_on if call.continuation else bytes
    response = await call.begin(upstream.status, headers)
    await response.write(told(cut.whole(head)))
    client = call.request.transport
    is_behind = False

    def resume_when_read() -> None:
        """Let the engine go on once its client has read what there was."""
        nonlocal is_behind
        if client is None or client.is_closing():
            return
        is_behind = client.get_write_buffer_size() >= CLIENT_BEHIND_BYTES // 4
        if is_behind:
            asyncio.get_running_loop().call_later(CLIENT_LOOK_S, resume_when_read)
        else:
            upstream.pause(False)

    def pass_on(chunk: bytes) -> None:
        events = cut.whole(chunk)
        if not events or client is None or client.is_closing():
            return
        if b'"error"' in events and (failure := failure_in(events)):
            upstream.break_off(f"failed: {failure}")
            return
        events = told(events)
        client.write(b"%x\r\n%b\r\n" % (len(events), events))  # as `response` frames its own
        if not is_behind and client.get_write_buffer_size() > CLIENT_BEHIND_BYTES:
            upstream.pause(True)
            resume_when_read()

    await upstream.pipe(pass_on)
    if not cut.is_done and call.request.path in ENDS_WITH_DONE:
        raise BrokenError("ended the stream without [DONE]")
    await response.write_eof()
    return response


async def _held_back(upstream: Upstream) -> bytes:
    """Everything up to the first event with data. Raises Lost where that is the engine's error,
    and BrokenError where there is none."""
    head = b""
    while chunk := await upstream.read():
        head += chunk
        begins = 0 if head.startswith(b"data:") else head.find(b"\ndata:")
        if begins >= 0 and (b"\n\n" in head[begins:] or b"\r\n\r\n" in head[begins:]):
            if failure := failure_in(head):
                raise Lost(f"failed: {failure}")
            return head
    raise BrokenError("ended the stream before it began")


async def _whole(upstream: Upstream) -> bytes:
    body = bytearray()
    while chunk := await upstream.read():
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


def _headers_for(request: web.BaseRequest, key: str) -> list[tuple[str, str]]:
    headers = [
        (name, value)
        for name, value in request.headers.items()
        if name.lower() not in _HOP_BY_HOP and not name.lower().startswith("x-launcher-")
    ]
    if key:
        headers.append((hdrs.AUTHORIZATION, f"Bearer {key}"))
    headers.append((hdrs.ACCEPT_ENCODING, "identity"))
    return headers


def _headers_back(upstream: Upstream, member: Member) -> dict[str, str]:
    headers = {name: value for name, value in upstream.headers if name.lower() not in _HOP_BY_HOP}
    headers[MEMBER_HEADER] = member.name
    if member.fallback:
        headers[FALLBACK_HEADER] = member.model
    return headers
