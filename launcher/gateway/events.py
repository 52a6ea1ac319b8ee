"""Server-sent events, as far as holding back and rescuing need them. Pure.

Only whole events are passed on, so that an event of ours can follow wherever an engine stops.
"""

import json

# An event without an end in sight is passed on as it comes; no engine writes one this long.
EVENT_MAX_BYTES = 1024 * 1024
DONE = b"data: [DONE]\n\n"
COMMENT = b": the request is waiting\n\n"


class Events:
    """Cuts an engine's bytes into whole events, and remembers what matters about them."""

    def __init__(self) -> None:
        self._rest = b""
        self.is_done = False

    def whole(self, chunk: bytes) -> bytes:
        """The bytes of all events that are complete now."""
        if self._rest:
            chunk = self._rest + chunk
            self._rest = b""
        if not chunk.endswith((b"\n\n", b"\r\n\r\n")) and len(chunk) < EVENT_MAX_BYTES:
            end = max(_after(chunk, b"\n\n"), _after(chunk, b"\r\n\r\n"))
            chunk, self._rest = chunk[:end], chunk[end:]
        if b"[DONE]" in chunk[-64:]:
            self.is_done = True
        return chunk


def _after(chunk: bytes, mark: bytes) -> int:
    found = chunk.rfind(mark)
    return found + len(mark) if found >= 0 else 0


def failure_in(events: bytes) -> str | None:
    """What the engine says went wrong, where one of its events is an error of its own (5xx)."""
    for line in events.splitlines():
        if not line.startswith(b"data:") or b'"error"' not in line[:64]:
            continue
        try:
            error = json.loads(line[5:]).get("error")
        except (ValueError, AttributeError):
            continue
        if not isinstance(error, dict):
            continue
        code = error.get("code")
        if not (isinstance(code, int) and 400 <= code < 500):
            return str(error.get("message", "an error event"))[:300]
    return None


def error_body(message: str, kind: str, code: int) -> dict[str, object]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_event(message: str, kind: str, code: int) -> bytes:
    """The last words of a stream that cannot go on."""
    return b"data: " + json.dumps(error_body(message, kind, code)).encode() + b"\n\n" + DONE
