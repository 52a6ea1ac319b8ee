"""ASGI middleware inside the engine's API server: no door beside the key. Standard library only.

vLLM's own key covers some paths (/v1, /v2, /inference); others make tokens without it. This covers
all but what tells how the server is. It travels inside the serve script and runs in the engine's
environment; nothing of ours is imported there.
"""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

OPEN_PATHS = ("/health", "/metrics")
REFUSAL = b'{"error": {"message": "this engine answers its gateway only", "code": 401}}'


class Guard:
    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.expected = b"Bearer " + os.environ.get("VLLM_API_KEY", "").encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan" or (kind == "http" and self.is_allowed(scope)):
            await self.app(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})

    def is_allowed(self, scope: Any) -> bool:
        """Whether the path is open or the key is right; without a key nothing is."""
        if scope["path"] in OPEN_PATHS:
            return True
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        expects_key = len(self.expected) > len(b"Bearer ")
        return expects_key and len(found) == 1 and hmac.compare_digest(found[0], self.expected)
