"""What an engine's API server lets through, besides its own rules."""

import asyncio

import pytest

from launcher.agent.guard import Guard


def answer(path: str, *values: bytes, kind: str = "http") -> int:
    """The status that a client gets; 200 is the engine's."""
    sent = []

    async def engine(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", value) for value in values]
    scope = {"type": kind, "path": path, "headers": headers}
    asyncio.run(Guard(engine)(scope, None, send))
    return sent[0].get("status", 0)


@pytest.mark.parametrize("path", ["/v1/models", "/invocations", "/inference/v1/generate", "/"])
def test_every_path_needs_the_key(monkeypatch, path):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert answer(path, b"Bearer secret") == 200
    for wrong in ((), (b"Bearer secre",), (b"secret",), (b"Bearer ",), (b"Bearer secret",) * 2):
        assert answer(path, *wrong) == 401


def test_health_and_metrics_are_open_and_websockets_are_not(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert answer("/health") == answer("/metrics") == 200
    assert answer("/metrics/../v1/models") == 401
    assert answer("/v1/realtime", b"Bearer secret", kind="websocket") == 0


def test_an_engine_without_a_key_answers_nobody(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert answer("/v1/models", b"Bearer ") == 401
