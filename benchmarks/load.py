"""Clients of a fleet that ask again as soon as they are answered."""

import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

TOKENS = 16


class Load:
    """As long as the block lasts; then `took_s` has the seconds of each answer."""

    def __init__(self, told: dict[str, Any], clients: int) -> None:
        self._url = f"{told['endpoint']}/completions"
        self._key = Path(told["api_key_file"]).read_text().strip()
        self._model = told["fleet"]
        self._enough = threading.Event()
        self.took_s: list[float] = []
        self.failed = 0
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        order = {"model": self._model, "prompt": "Hello", "max_tokens": TOKENS}
        request = urllib.request.Request(
            self._url,
            json.dumps({**order, "ignore_eos": True}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        while not self._enough.is_set():
            began = time.monotonic()
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    answer.read()
                self.took_s.append(time.monotonic() - began)
            except OSError:
                self.failed += 1
