"""The gateway before real vLLM on two hosts of the testbed, by the official client."""

import asyncio
import json
import os
import shutil
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from openai import APIError, AsyncOpenAI, OpenAI

from tests.conftest import ROOT, Cli
from tests.launcher.fleets import FleetUnderTest, engine_processes, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(420)]

NAME = "g-real"
TOOLS = {"enable-auto-tool-choice": True, "tool-call-parser": "hermes"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"hot": {"type": "boolean"}},
            "required": ["hot"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def fleet(cluster, bootstrapped):
    """Two replicas of one host each, so few requests at a time that others wait for a token."""
    folder = ROOT / ".testbed/tmp/gateway"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cli = Cli({**os.environ, "LAUNCHER_STATE_DIR": str(folder / "state")}, folder)
    example = yaml.safe_load((ROOT / "examples/ssh.yaml").read_text())
    spec = {
        **example,
        "model": str(ROOT / "models/tiny"),
        "runtime": {"venv": str(ROOT / ".venv/engine")},
        "nodes": 1,
        "replicas": 2,
        "executor": "mp",
        "parallelism": {},
        "gateway": {"continue_streams": True},
        "engine": {"args": {**example["engine"]["args"], "max-num-seqs": 2, **TOOLS}},
        "env": {**example["env"], "CPU_ENGINE_START_METHOD": "fork"},
        "backend": {"ssh": {"inventory": str(ROOT / ".testbed/inventory.yaml")}},
    }
    del spec["name"]
    made = FleetUnderTest(folder, cli, NAME, spec)
    code, document = made.up(timeout=400)
    assert code == 0, document["error"]
    made.document = document
    yield made
    assert made.down() == 0


def client(fleet, kind=OpenAI):
    key = Path(fleet.document["api_key_file"]).read_text().strip()
    return kind(base_url=fleet.document["endpoint"], api_key=key, max_retries=0, timeout=120)


def asked(text: str, **more) -> dict:
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 12,
        "extra_body": {"ignore_eos": True},
        **more,
    }


def test_the_official_client_works_in_all_its_ways(fleet):
    one = client(fleet)
    assert NAME in {model.id for model in one.models.list()}
    answer = one.chat.completions.create(**asked("Hello"))
    assert answer.usage.completion_tokens == 12
    stream = one.chat.completions.create(
        **asked("Hello", stream=True, stream_options={"include_usage": True})
    )
    parts = list(stream)
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == answer.choices[0].message.content
    assert parts[-1].usage.completion_tokens == 12
    plain = one.completions.create(model=NAME, prompt="Hello", max_tokens=3)
    assert plain.usage.completion_tokens == 3

    async def at_once():
        async with client(fleet, AsyncOpenAI) as many:
            return await asyncio.gather(
                *(many.chat.completions.create(**asked(f"Hello {n}")) for n in range(6))
            )

    assert all(a.usage.completion_tokens == 12 for a in asyncio.run(at_once()))


def test_a_tool_call_passes(fleet):
    """The model's weights are random, and would write blanks into its JSON for ever."""
    one = client(fleet)
    blanks = set()
    for blank in (" ", "\n", "\t", "\r", "  "):
        told = one.completions.create(
            model=NAME, prompt=blank, max_tokens=1, extra_body={"return_token_ids": True}
        )
        blanks |= set(told.choices[0].prompt_token_ids)
    answer = one.chat.completions.create(
        **asked("Is it hot?", tools=[TOOL], extra_body={}, max_tokens=160),
        tool_choice={"type": "function", "function": {"name": "weather"}},
        logit_bias={str(token): -100 for token in blanks},
    )
    assert answer.choices[0].message.tool_calls, answer
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, set(json.loads(call.function.arguments))) == ("weather", {"hot"})


def test_what_the_client_does_wrong_is_told_by_the_engine(fleet):
    with pytest.raises(APIError) as caught:
        client(fleet).chat.completions.create(**asked("x", temperature=-3))
    assert caught.value.status_code == 400
    with pytest.raises(APIError) as caught:
        client(fleet).chat.completions.create(**asked("x") | {"model": "no-such"})
    assert caught.value.status_code == 404


def test_an_aborted_request_stops_on_the_engine_within_a_second(fleet):
    stream = client(fleet).chat.completions.create(**asked("x", stream=True, max_tokens=400))
    next(iter(stream))
    assert running(fleet) == 1
    stream.close()
    assert eventually(lambda: running(fleet) == 0, 1.0)


def test_nobody_passes_by_the_gateway(fleet):
    """The engines have a key of their own; what they answer without it makes no tokens."""
    key = Path(fleet.document["api_key_file"]).read_text().strip()
    url = fleet.document["replicas"][0]["endpoint"]
    for headers in ({}, {"Authorization": f"Bearer {key}"}):
        for path in ("/v1/models", "/v1/chat/completions"):
            assert status(url.removesuffix("/v1") + path, headers) == 401
        for path in ("/invocations", "/inference/v1/generate", "/tokenize", "/pooling"):
            assert status(url.removesuffix("/v1") + path, headers, b"{}") in (401, 404), path


def test_kill_9_of_an_engine_costs_no_request_and_begun_streams_go_on_with_the_same_text(fleet):
    one = client(fleet)
    texts = [f"Tell me {number}" for number in range(16)]
    expected = {text: one.chat.completions.create(**asked(text)) for text in texts}
    found: dict[str, str] = {}
    failed: list[str] = []

    def ask(number: int, text: str) -> None:
        try:
            if number % 2:
                answer = one.chat.completions.create(**asked(text))
                found[text] = answer.choices[0].message.content
            else:
                stream = one.chat.completions.create(**asked(text, stream=True))
                parts = [p.choices[0].delta.content or "" for p in stream if p.choices]
                found[text] = "".join(parts)
        except Exception as error:  # noqa: BLE001 - whatever the client sees is counted
            failed.append(f"{text}: {error!r}")

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(texts)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: running(fleet) >= 3, 5)
    victim = fleet.document["replicas"][0]["nodes"][0]["node"]
    for pid in [pid for pid, node in engine_processes(NAME).items() if node == victim]:
        os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    assert failed == []
    assert found == {text: answer.choices[0].message.content for text, answer in expected.items()}
    assert eventually(lambda: fleet.status()[1]["phase"] == "degraded")
    assert one.chat.completions.create(**asked("after")).usage.completion_tokens == 12
    assert eventually(lambda: fleet.status()[0] == 0, 150), "the replica comes again by itself"
    assert sorted(one["generation"] for one in fleet.status()[1]["replicas"]) == [1, 2]


def running(fleet) -> int:
    """Requests that the engines say they run or hold."""
    total = 0
    for replica in fleet.document["replicas"]:
        url = replica["endpoint"].removesuffix("/v1") + "/metrics"
        try:
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{")):
                total += int(float(line.rsplit(" ", 1)[1]))
    return total


def status(url: str, headers: dict[str, str], data: bytes | None = None) -> int:
    request = urllib.request.Request(url, headers=headers, data=data)
    try:
        return int(urllib.request.urlopen(request, timeout=5).status)
    except urllib.error.HTTPError as error:
        return int(error.code)
