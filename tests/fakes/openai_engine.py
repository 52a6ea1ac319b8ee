"""An engine that speaks OpenAI's HTTP, fast, and fails on order: `python openai_engine.py PORT`.

For tests and benchmarks of the gateway, where it is the wire that counts. Like vLLM it sends 200
and the headers of a stream at once, long before the first token. Standard library only (uvloop if
it is there), so that it runs wherever a host of the testbed does.

POST /fault {"kind": …, "ttft_s": …, "gap_s": …, "key": …} sets how it behaves from now on:
  none · hang (chat never answers, /health does) · error (500) · error_event · short (a body
  shorter than its length) · close (the stream ends cleanly in the middle) · reset (… by force)
  · dies (an error event in the middle, as vLLM's API server says that its engine is gone)
GET /counts tells what it has seen: started, finished, aborted, running, tokens of streams.
"""

import asyncio
import json
import socket
import sys

PROMPT_IDS = [101, 102, 103, 104, 105]
TEXT = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "runs",
    "away",
]


class Behaviour:
    def __init__(self) -> None:
        self.kind = "none"
        self.ttft_s = 0.0
        self.gap_s = 0.0
        self.key = ""
        self.model = "m"
        self.counts = dict.fromkeys(
            ("started", "finished", "aborted", "running", "health", "tokens"), 0
        )
        self.seen: list[dict[str, object]] = []


class Connection(asyncio.Protocol):
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.buffer = b""
        self.work: asyncio.Task[None] | None = None

    def connection_made(self, transport) -> None:
        self.transport = transport

    def connection_lost(self, error) -> None:
        if self.work and not self.work.done():
            self.work.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer and (self.work is None or self.work.done()):
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            headers = dict(line.lower().split(b": ", 1) for line in lines[1:] if b": " in line)
            length = int(headers.get(b"content-length", 0))
            if len(rest) < length:
                return
            body, self.buffer = rest[:length], rest[length:]
            method, path, _ = lines[0].split(b" ", 2)
            authorization = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line).get(
                b"Authorization", b""
            )
            self.answer(method.decode(), path.decode(), authorization.decode(), headers, body)

    def answer(self, method, path, authorization, headers, body) -> None:
        b = self.behaviour
        if path == "/health":
            b.counts["health"] += 1
            return self.send(200, b"")
        if path == "/counts":
            return self.send(200, json.dumps({**b.counts, "seen": b.seen[-20:]}).encode())
        if path == "/fault":
            for name, value in json.loads(body).items():
                setattr(b, name, value)
            return self.send(200, b"{}")
        if b.key and authorization != f"Bearer {b.key}":
            return self.send(401, b'{"error": "Unauthorized"}')
        if path == "/v1/models":
            return self.send(200, b'{"object": "list", "data": [{"id": "%s"}]}' % b.model.encode())
        if not path.startswith(("/v1/chat/completions", "/v1/completions")):
            return self.send(404, b'{"error": {"message": "Not Found", "code": 404}}')
        try:
            asked = json.loads(body)
        except ValueError:
            return self.send(400, b'{"error": {"message": "not JSON", "code": 400}}')
        names = {name.decode(): value.decode("latin-1") for name, value in headers.items()}
        seen = {"headers": names, "model": asked.get("model"), "bytes": len(body)}
        b.seen = [*b.seen[-19:], seen]
        self.work = asyncio.ensure_future(self.generate(asked, "chat" in path))
        return None

    async def generate(self, asked, is_chat) -> None:
        b = self.behaviour
        b.counts["started"] += 1
        b.counts["running"] += 1
        try:
            if asked.get("stream"):
                await self.stream(asked, is_chat)
            else:
                await self.whole(asked)
            b.counts["finished"] += 1
        except asyncio.CancelledError:
            b.counts["aborted"] += 1
            raise
        finally:
            b.counts["running"] -= 1
            asyncio.get_running_loop().call_soon(self.data_received, b"")

    async def think(self) -> None:
        if self.behaviour.kind == "hang":
            await asyncio.sleep(3600)
        if self.behaviour.ttft_s:
            await asyncio.sleep(self.behaviour.ttft_s)

    async def whole(self, asked) -> None:
        b = self.behaviour
        await self.think()
        count = int(asked.get("max_tokens") or 8)
        if b.gap_s:
            await asyncio.sleep(b.gap_s * count)
        if b.kind == "error":
            return self.send(500, b'{"error": {"message": "EngineDeadError", "code": 500}}')
        text = " ".join(TEXT[i % len(TEXT)] for i in range(count))
        document = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": asked.get("model", ""),
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "text": text,
                    "finish_reason": "length",
                }
            ],
            "usage": {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count},
        }
        body = json.dumps(document).encode()
        if b.kind in ("short", "close", "reset"):
            self.transport.write(_head(200, len(body) + 50) + body)
            return self.transport.close()
        return self.send(200, body)

    async def stream(self, asked, is_chat) -> None:
        b = self.behaviour
        if b.kind == "error":
            await self.think()
            self.send(500, b'{"error": {"message": "EngineDeadError", "code": 500}}')
            return
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        await self.think()
        if b.kind == "error_event":
            self.event({"error": {"message": "EngineCore died", "code": 500}})
            self.chunk(b"data: [DONE]\n\n")
            self.transport.write(b"0\r\n\r\n")
            return
        prompt = asked.get("prompt")
        first = len(prompt) - len(PROMPT_IDS) if isinstance(prompt, list) else 0
        count = int(asked.get("max_tokens") or 8) + first
        for index in range(first, count):
            if index > first and b.gap_s:
                await asyncio.sleep(b.gap_s)
            if index >= 3 and b.kind in ("close", "short"):
                self.transport.write(b"0\r\n\r\n")
                self.transport.close()
                return
            if index >= 3 and b.kind == "dies":
                self.event({"error": {"message": "EngineCore died", "code": 500}})
                self.chunk(b"data: [DONE]\n\n")
                self.transport.write(b"0\r\n\r\n")
                return
            if index >= 3 and b.kind == "reset":
                sock = self.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.transport.close()
                return
            word = TEXT[index % len(TEXT)] + " "
            choice = {"index": 0, "finish_reason": "length" if index == count - 1 else None}
            choice |= {"delta": {"content": word}} if is_chat else {"text": word}
            kind = "chat.completion.chunk" if is_chat else "text_completion"
            head = {"id": f"x-{id(asked)}", "object": kind, "created": 1, "model": "m"}
            if asked.get("return_token_ids"):
                choice["token_ids"] = [index]
                if index == first:
                    head["prompt_token_ids"] = prompt if first else PROMPT_IDS
            self.event({**head, "choices": [choice]})
            b.counts["tokens"] += 1
        if (asked.get("stream_options") or {}).get("include_usage"):
            made = count - first
            usage = {"prompt_tokens": 5 + first, "completion_tokens": made}
            self.event({**head, "choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.transport.write(b"0\r\n\r\n")

    def event(self, document) -> None:
        self.chunk(b"data: " + json.dumps(document).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%s\r\n" % (len(data), data))

    def send(self, status: int, body: bytes) -> None:
        self.transport.write(_head(status, len(body)) + body)


def _head(status: int, length: int) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (
        status,
        length,
    )


async def main() -> None:
    behaviour = Behaviour()
    if len(sys.argv) > 2:
        for name, value in json.loads(sys.argv[2]).items():
            setattr(behaviour, name, value)
    host, _, port = sys.argv[1].rpartition(":")
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(behaviour), host or "127.0.0.1", int(port), backlog=4096
    )
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.run(main())
    except ImportError:
        asyncio.run(main())
