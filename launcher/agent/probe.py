"""Is the engine ready? A token is the proof. Runs in a thread beside the agent's loop. I/O."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

POLL_S = 0.1
HEALTH_TIMEOUT_S = 5.0
TOKEN_TIMEOUT_S = 60.0
ANSWER_MAX_BYTES = 1024 * 1024
LINE_MAX_BYTES = 16 * 1024
Failed = (OSError, http.client.HTTPException, ValueError)  # no answer, or none that we understand


@dataclass(frozen=True)
class Completion:
    """What became of a request for one token."""

    status: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Api:
    """The API server of an engine. Every call raises one of `Failed` where it gets no answer."""

    host: str
    port: int
    model: str
    api_key: str

    def healthy(self, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
        with self._asked("GET", "/health", timeout_s) as answer:
            return answer.status == 200

    def token(self, timeout_s: float = TOKEN_TIMEOUT_S, engine: str = "") -> Completion:
        """Ask for one token, of this data-parallel engine where one is named."""
        body = json.dumps({"model": self.model, "prompt": "Hello", "max_tokens": 1})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"}
        if engine:
            headers["X-data-parallel-rank"] = engine
        with self._asked("POST", "/v1/completions", timeout_s, body, headers) as answer:
            text = answer.read(ANSWER_MAX_BYTES)
            if answer.status != 200:
                return Completion(answer.status, 0, repr(text[:200]))
            try:
                tokens = int(json.loads(text)["usage"]["completion_tokens"])
            except (KeyError, TypeError) as error:
                raise ValueError("not a completion") from error
            return Completion(answer.status, tokens, "")

    def metrics(self, timeout_s: float, prefix: str) -> list[str]:
        """The samples whose names begin so, 1 MiB of them at most; empty where it has none."""
        kept: list[str] = []
        size = 0
        with self._asked("GET", "/metrics", timeout_s) as answer:
            if answer.status != 200:
                return []
            while size < ANSWER_MAX_BYTES and (line := answer.readline(LINE_MAX_BYTES)):
                if line.startswith(prefix.encode()):
                    size += len(line)
                    kept.append(line.decode("utf-8", "replace"))
        return kept

    @contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        timeout_s: float,
        body: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, headers or {})
            yield connection.getresponse()
        finally:
            connection.close()


@dataclass
class TokenProbe:
    """Asks the API server until it has generated one token, or until told to stop."""

    api: Api
    waiting_for: str = "the API server to listen"
    first_token_at: float | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="token-probe", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if self.api.healthy():
                    self.waiting_for = "a first token"
                    if self._has_token():
                        self.first_token_at = time.time()
                        self.waiting_for = ""
                        return
            except Failed:
                pass  # refused or cut off: it is not ready; the deadline is the agent's
            self._stopped.wait(POLL_S)

    def _has_token(self) -> bool:
        completion = self.api.token()
        if completion.status != 200:
            self.waiting_for = f"a first token (HTTP {completion.status}: {completion.text})"
        return completion.tokens >= 1
