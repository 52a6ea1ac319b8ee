"""Is the engine ready? A token is the proof. Runs in a thread beside the agent's loop. I/O."""

import http.client
import json
import threading
import time
from dataclasses import dataclass, field

POLL_S = 0.1
TOKEN_TIMEOUT_S = 60.0


@dataclass
class TokenProbe:
    """Asks the API server until it has generated one token, or until told to stop."""

    host: str
    port: int
    model: str
    api_key: str
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
                if self._healthy():
                    self.waiting_for = "a first token"
                    if self._token():
                        self.first_token_at = time.time()
                        self.waiting_for = ""
                        return
            except (OSError, http.client.HTTPException, ValueError):
                pass  # refused or cut off: it is not ready; the deadline is the agent's
            self._stopped.wait(POLL_S)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        finally:
            connection.close()

    def _token(self) -> bool:
        body = json.dumps({"model": self.model, "prompt": "Hello", "max_tokens": 1})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TOKEN_TIMEOUT_S)
        try:
            connection.request("POST", "/v1/completions", body, headers)
            answer = connection.getresponse()
            text = answer.read(1024 * 1024)
            if answer.status != 200:
                self.waiting_for = f"a first token (HTTP {answer.status}: {text[:200]!r})"
                return False
            return int(json.loads(text)["usage"]["completion_tokens"]) >= 1
        except (KeyError, TypeError) as error:
            raise ValueError("not a completion") from error
        finally:
            connection.close()
