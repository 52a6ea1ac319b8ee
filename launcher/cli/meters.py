"""Engines asked for their metrics, each in a thread of its own: nobody waits for one. I/O."""

import http.client
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from launcher.figures import Reading, read_engine

DEADLINE_S = 1.0
STALE_S = 3.0
ANSWER_MAX_BYTES = 8 * 1024 * 1024


@dataclass
class _Engine:
    url: str
    before: Reading | None = None
    now: Reading | None = None
    asking: threading.Thread | None = None


class Meters:
    """The last two looks at each engine. One that does not answer is unknown after a moment."""

    def __init__(self) -> None:
        self._engines: dict[str, _Engine] = {}

    def ask(self, engines: Mapping[str, str]) -> None:
        """Ask each of these (name → its address) again, and return at once."""
        self._engines = {
            name: known
            if (known := self._engines.get(name)) and known.url == url
            else _Engine(url)
            for name, url in engines.items()
        }
        for engine in self._engines.values():
            if engine.asking is None or not engine.asking.is_alive():
                engine.asking = threading.Thread(target=_ask, args=(engine,), daemon=True)
                engine.asking.start()

    def looks(self) -> dict[str, tuple[Reading | None, Reading]]:
        """What is known now, by name; who has not answered lately is left out."""
        oldest = time.monotonic() - STALE_S
        return {
            name: (engine.before, engine.now)
            for name, engine in self._engines.items()
            if engine.now is not None and engine.now.at >= oldest
        }


def _ask(engine: _Engine) -> None:
    try:
        text = fetch(engine.url)
    except (OSError, http.client.HTTPException, ValueError):
        return
    engine.before, engine.now = engine.now, read_engine(text, time.monotonic())


def fetch(url: str) -> str:
    """The text of an engine's /metrics. Raises OSError or HTTPException where it gives none."""
    limit = time.monotonic() + DEADLINE_S
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port or 80, timeout=DEADLINE_S
    )
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise http.client.HTTPException(f"answered {answer.status}")
        text = bytearray()
        while part := answer.read1(65_536):
            text += part
            if time.monotonic() > limit or len(text) > ANSWER_MAX_BYTES:
                raise TimeoutError
        return text.decode("utf-8", "replace")
    finally:
        connection.close()
