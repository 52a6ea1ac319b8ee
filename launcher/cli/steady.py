"""Small requests through the gateway all the time, while something is done to the fleet. I/O."""

import asyncio
import contextlib
import json
import ssl
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

AT_ONCE = 4
PAUSE_S = 0.05
ENDS_WITHIN_S = 15.0
FIRST_ANSWER_WITHIN_S = 30.0
TOKENS = 8
EXAMPLES_MAX = 3


@dataclass
class Requests:
    """What became of them. unfinished: still under way when it was enough."""

    sent: int = 0
    answered: int = 0
    failed: int = 0
    broken_streams: int = 0
    unfinished: int = 0
    longest_s: float = 0.0
    examples: list[str] = field(default_factory=list)  # of failures, in words

    def as_document(self) -> dict[str, Any]:
        return asdict(self)


class _FailedError(Exception):
    """It was refused, or ended before a token."""


class _BrokenError(Exception):
    """A stream that had begun did not come to its end."""


class Steady:
    """Asks all the time between enter and exit, every other request as a stream."""

    def __init__(self, endpoint: str, key: str, model: str, certificate: str = "") -> None:
        self._url = f"{endpoint}/completions"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._model = model
        self._certificate = certificate
        self._over = threading.Event()
        self._answered = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), name="steady", daemon=True
        )
        self.requests = Requests()

    def __enter__(self) -> "Steady":
        self._thread.start()
        return self

    def wait_for_an_answer(self) -> bool:
        """Whether one of them was answered in time: else their figures would say nothing."""
        return self._answered.wait(FIRST_ANSWER_WITHIN_S)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if kind is None:
            self._thread.join(ENDS_WITHIN_S + 5.0)

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(limit=AT_ONCE, ssl=self._tls(), force_close=True)
        async with aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=aiohttp.ClientTimeout(total=None)
        ) as session:
            tasks = [asyncio.create_task(self._ask_on(session, n)) for n in range(AT_ONCE)]
            while not self._over.is_set():
                await asyncio.sleep(PAUSE_S)
            _, late = await asyncio.wait(tasks, timeout=ENDS_WITHIN_S)
            self.requests.unfinished = len(late)
            for task in late:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*late, return_exceptions=True)

    def _tls(self) -> ssl.SSLContext | bool:
        """The fleet's own certificate is trusted, too: it may be signed by itself."""
        if not self._url.startswith("https:"):
            return True
        context = ssl.create_default_context()
        if self._certificate and Path(self._certificate).is_file():
            with contextlib.suppress(OSError):
                context.load_verify_locations(self._certificate)
        return context

    async def _ask_on(self, session: aiohttp.ClientSession, number: int) -> None:
        count = number
        while not self._over.is_set():
            count += 1
            began = time.monotonic()
            self.requests.sent += 1
            try:
                await self._ask(session, stream=count % 2 == 0)
                self.requests.answered += 1
                self._answered.set()
            except _BrokenError as error:
                self.requests.broken_streams += 1
                self._remember(str(error))
            except (_FailedError, aiohttp.ClientError, OSError, ValueError) as error:
                self.requests.failed += 1
                self._remember(str(error) or type(error).__name__)
            took_s = time.monotonic() - began
            self.requests.longest_s = round(max(self.requests.longest_s, took_s), 3)
            await asyncio.sleep(PAUSE_S)

    def _remember(self, words: str) -> None:
        if len(self.requests.examples) < EXAMPLES_MAX:
            self.requests.examples.append(words[:200])

    async def _ask(self, session: aiohttp.ClientSession, *, stream: bool) -> None:
        body = {
            "model": self._model,
            "prompt": "The quick brown fox",
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": stream,
        }
        async with session.post(self._url, json=body) as answer:
            if answer.status != 200:
                said = (await answer.text())[:160]
                raise _FailedError(f"answered {answer.status}: {said}")
            if answer.content_type != "text/event-stream":
                await answer.json()
                return
            await _read_stream(answer)


async def _read_stream(answer: aiohttp.ClientResponse) -> None:
    """To its end. Raises _FailedError before a token, _BrokenError after one."""
    tokens, why = 0, "it ended before its end"
    try:
        async for row in answer.content:
            if not row.startswith(b"data:"):
                continue
            data = row.removeprefix(b"data:").strip()
            if data == b"[DONE]" and not why.startswith("error"):
                return
            event = json.loads(data) if data.startswith(b"{") else {}
            if "error" in event:
                why = f"error event: {str(event['error'])[:160]}"
            tokens += bool(event.get("choices"))
    except (aiohttp.ClientError, OSError, ValueError) as error:
        why = str(error) or type(error).__name__
    raise _BrokenError(why) if tokens else _FailedError(why)
