"""A begun stream goes on at another replica, where the request allows it."""

import json

import pytest

from launcher.gateway.continuation import Continuation
from tests.gateway.conftest import InBackground, chat
from tests.launcher.fleets import eventually

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_killed_replicas_stream_goes_on_with_the_same_text(tier, engines, kind):
    one = tier(continue_streams=True)
    victim, survivor = engines(gap_s=0.1), engines(gap_s=0.01)
    members = one.members(victim, survivor)
    one.give(members[0])
    path = CHAT if kind == "chat" else "/v1/completions"
    asked = (
        {"messages": [{"role": "user", "content": "hi"}]} if kind == "chat" else {"prompt": "x"}
    )
    body = {**asked, "model": "m", "stream": True, "max_tokens": 20, "temperature": 0}
    body["stream_options"] = {"include_usage": True}

    def ask():
        with client.stream("POST", path, json=body) as response:
            return [line[6:] for line in response.iter_lines() if line.startswith("data: ")]

    with one.client() as client:
        running = InBackground(ask)
        assert eventually(lambda: victim.counts()["tokens"] >= 3)
        one.give(*members)
        victim.kill()
        lines = running.result()
        one.give(members[1])
        undisturbed = ask()
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert text_of(chunks) == text_of([json.loads(line) for line in undisturbed[:-1]])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["object"] for chunk in chunks}) == 1
    assert not any("token_ids" in line for line in lines)
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 20)
    tally = one.state().members
    assert sum(t.broken for t in tally.values()) == 0


def test_an_engine_that_says_itself_that_it_died_is_no_end_of_the_stream(tier, engines):
    one = tier(continue_streams=True)
    dying, good = engines(kind="dies", gap_s=0.01), engines()
    members = one.members(dying, good)
    one.give(members[0], members[1].model_copy(update={"weight": 0.01}))
    with one.client() as client:
        answer = chat(client, stream=True, max_tokens=8)
    assert (answer.tokens, answer.error, answer.is_done) == (8, None, True)
    assert one.state().members["r1"].continued == 1


def test_a_chat_without_a_limit_goes_on_without_one():
    one = Continuation.of(CHAT, {"messages": [], "stream": True})
    assert one is not None
    chunk = {"prompt_token_ids": [5], "choices": [{"delta": {"content": "a"}, "token_ids": [1]}]}
    one.pass_on(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    path, body = one.resume("")
    assert path == "/v1/completions"
    asked = json.loads(body)
    assert (asked["prompt"], asked["max_tokens"]) == ([5, 1], None)  # None: the context's end


def text_of(chunks):
    parts = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            parts.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
    return "".join(parts)


def test_it_is_off_unless_asked_for(tier, engines):
    one = tier()
    victim, survivor = engines(gap_s=0.1), engines(gap_s=0.1)
    one.give(*one.members(victim, survivor))
    with one.client() as client:
        running = [
            InBackground(lambda: chat(client, stream=True, max_tokens=20)) for _ in range(4)
        ]
        assert eventually(lambda: victim.counts()["running"] == 2)
        assert eventually(lambda: victim.counts()["tokens"] >= 4)
        victim.kill()
        answers = [one_running.result() for one_running in running]
    assert sum(answer.error is not None for answer in answers) == 2


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"n": 2},
        {"stop": ["x"]},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"logprobs": True},
        {"logprobs": 0},
        {"seed": 7},
        {"stream": False},
        {"stream_options": {"continuous_usage_stats": True}},
        {"some_new_key": 1},
    ],
)
def test_what_depends_on_more_than_the_tokens_is_not_continued(more):
    assert Continuation.of(CHAT, {"messages": [], "stream": True}) is not None
    assert Continuation.of(CHAT, {"messages": [], "stream": True, **more}) is None


def test_a_stream_that_cannot_be_followed_is_not_continued():
    for chunk in (
        {"choices": [{"delta": {"content": "a"}}]},  # no ids: another engine
        {"choices": [{"delta": {"reasoning": "a"}, "token_ids": [1]}]},  # a parser made it
        {"choices": [{"delta": {"content": "a"}, "token_ids": [1], "finish_reason": "stop"}]},
    ):
        one = Continuation.of(CHAT, {"messages": [], "stream": True})
        assert one is not None
        one.pass_on(b'data: {"id": "a", "prompt_token_ids": [5], "choices": []}\n\n')
        assert one.can_resume
        one.pass_on(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        assert not one.can_resume


def test_all_tokens_made_leaves_nothing_to_continue():
    one = Continuation.of(CHAT, {"messages": [], "stream": True, "max_tokens": 2})
    assert one is not None
    chunk = {
        "prompt_token_ids": [5],
        "choices": [{"delta": {"content": "a"}, "token_ids": [1, 2]}],
    }
    one.pass_on(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    assert not one.can_resume
