"""The client side of benchmarks/gateway.py: raw HTTP with as little of its own as possible."""

import asyncio
import json
import time
from dataclasses import dataclass, field

KEY = "sk-benchmark-0123456789"


def request(path_host: str, body: dict) -> bytes:
    data = json.dumps(body).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {path_host}\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data


def chat(*, stream: bool, tokens: int) -> dict:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "hello there"}],
        "max_tokens": tokens,
        "stream": stream,
    }


@dataclass
class Outcome:
    """One request as its client saw it."""

    ended: str  # ok, lost (nothing of the answer came), begun (it broke off), stuck
    took_s: float
    first_s: float | None = None
    why: str = ""


class Client:
    """One connection, kept alive; `address` is host:port or the path of a Unix socket."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._reader: asyncio.StreamReader | None = None

    async def _connect(self) -> None:
        if self._address.startswith("/"):
            opened = await asyncio.open_unix_connection(self._address, limit=2**22)
        else:
            host, _, port = self._address.rpartition(":")
            opened = await asyncio.open_connection(host, int(port), limit=2**22)
        self._reader, self._writer = opened

    async def ask(self, data: bytes, *, stream: bool, tokens: int = 0) -> Outcome:
        """Send one request and read its whole answer. A stream of fewer tokens was cut short."""
        chunks = 0
        began = time.monotonic()
        first: float | None = None
        got = b""
        try:
            if self._reader is None:
                await self._connect()
            assert self._reader is not None
            self._writer.write(data)
            head = await self._reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            lower = head.lower()
            if b"transfer-encoding: chunked" in lower:
                while True:
                    line = await self._reader.readuntil(b"\r\n")
                    size = int(line.split(b";")[0], 16)
                    piece = await self._reader.readexactly(size + 2)
                    if size == 0:
                        break
                    if first is None and b"data:" in piece and b'"error"' not in piece:
                        first = time.monotonic() - began
                    chunks += piece.count(b'"delta"')
                    got = (got + piece[:-2])[-4096:] if stream else got + piece[:-2]
            else:
                length = int(lower.split(b"content-length: ")[1].split(b"\r\n")[0])
                got = await self._reader.readexactly(length)
                first = time.monotonic() - began
            if b"connection: close" in lower:
                self.close()
        except (OSError, EOFError, ValueError, IndexError, asyncio.LimitOverrunError) as error:
            self.close()
            ended = "begun" if first is not None else "lost"
            return Outcome(ended, time.monotonic() - began, first, type(error).__name__)
        except asyncio.CancelledError:
            self.close()
            raise
        took_s = time.monotonic() - began
        whole = not stream or (b"[DONE]" in got and b'"error"' not in got)
        if status == 200 and whole and (chunks >= tokens if stream else b'"choices"' in got):
            return Outcome("ok", took_s, first)
        why = f"{status}" if status != 200 else "broke off" if not whole else "cut short"
        begun = stream and status == 200 and first is not None
        return Outcome("begun" if begun else "lost", took_s, first, why)

    def close(self) -> None:
        if self._reader is not None:
            self._writer.close()
            self._reader = None


@dataclass
class Closed:
    """Requests one after the other on a number of connections."""

    latencies_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    failed: int = 0


async def closed_loop(
    address: str, *, connections: int, seconds: float, stream: bool, tokens: int
) -> Closed:
    found = Closed()
    limit = time.monotonic() + seconds
    data = request("x", chat(stream=stream, tokens=tokens))

    async def one() -> None:
        client = Client(address)
        while time.monotonic() < limit:
            outcome = await client.ask(data, stream=stream)
            if outcome.ended != "ok":
                found.failed += 1
                continue
            found.latencies_s.append(outcome.took_s)
            if outcome.first_s is not None:
                found.first_s.append(outcome.first_s)
        client.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return found


async def open_loop(
    address: str, *, per_second: float, seconds: float, tokens: int, patience_s: float
) -> list[Outcome]:
    """Requests at a steady rate, every other one streaming, each on a connection of its own.

    What has no end `patience_s` after the last one was sent is stuck.
    """
    tasks: list[asyncio.Task[Outcome]] = []
    began = time.monotonic()
    count = int(per_second * seconds)
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
        stream = number % 2 == 0
        data = request("x", chat(stream=stream, tokens=tokens))
        client = Client(address)
        tasks.append(asyncio.create_task(client.ask(data, stream=stream, tokens=tokens)))
        tasks[-1].add_done_callback(lambda _, c=client: c.close())
    started = {task: began + n / per_second for n, task in enumerate(tasks)}
    done, waiting = await asyncio.wait(tasks, timeout=patience_s)
    outcomes = [task.result() for task in done]
    for task in waiting:
        outcomes.append(Outcome("stuck", time.monotonic() - started[task]))
        task.cancel()
    return outcomes
