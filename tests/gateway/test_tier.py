"""The rescue tier by itself: what a client sees while engines die, hang, fail and return."""

import threading
import time

import httpx
import pytest

from launcher.gateway.documents import Key, Member
from tests.gateway.conftest import Answer, InBackground, chat
from tests.launcher.fleets import eventually


def test_a_request_is_answered_by_a_member_and_names_it(tier, engines):
    one = tier()
    one.give(*one.members(engines()))
    with one.client() as client:
        answer = chat(client, max_tokens=4)
        assert answer.status == 200
        assert answer.headers["x-launcher-replica"] == "r1"
        assert answer.document["choices"][0]["message"]["content"].startswith("the quick")
        streamed = chat(client, stream=True, max_tokens=4)
        assert (streamed.tokens, streamed.is_done) == (4, True)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("fault", ["kill", "declared dead while frozen"])
def test_a_request_without_a_token_goes_to_a_survivor(tier, engines, stream, fault):
    one = tier()
    victim, survivor = engines(ttft_s=60), engines(ttft_s=0.1)
    members = one.members(victim, survivor)
    one.give(members[0])
    with one.client() as client:
        asked = [InBackground(lambda: chat(client, stream=stream, max_tokens=3)) for _ in range(5)]
        assert eventually(lambda: victim.counts()["running"] == 5)
        one.give(*members)
        if fault == "kill":
            victim.kill()
        else:
            victim.freeze()
            one.give(members[0].model_copy(update={"goal": "dead"}), members[1])
        answers = [one_asked.result() for one_asked in asked]
    assert [answer.status for answer in answers] == [200] * 5
    assert {answer.headers["x-launcher-replica"] for answer in answers} == {"r2"}
    assert all(answer.is_done for answer in answers) or not stream
    assert one.state().rescued == 5


def test_a_begun_stream_ends_with_an_error_event_and_is_never_silently_short(tier, engines):
    one = tier()
    victim = engines(gap_s=0.2)
    one.give(*one.members(victim))
    with one.client() as client:
        asked = InBackground(lambda: chat(client, stream=True, max_tokens=50))
        assert eventually(lambda: victim.counts()["tokens"] >= 3)
        victim.kill()
        answer = asked.result()
    assert answer.tokens > 1
    assert answer.error["type"] == "replica_lost"
    assert answer.is_done


@pytest.mark.parametrize(
    ("kind", "stream"),
    [("error", True), ("error", False), ("error_event", True), ("short", False)],
)
def test_an_engine_that_fails_costs_no_request(tier, engines, kind, stream):
    one = tier()
    bad, good = engines(kind=kind), engines()
    one.give(*one.members(bad, good))
    with one.client() as client:
        answers = [chat(client, stream=stream, max_tokens=3) for _ in range(12)]
    assert all(answer.status == 200 for answer in answers)
    assert all(answer.error is None and answer.is_done for answer in answers if stream)
    assert good.counts()["finished"] == 12


@pytest.mark.parametrize("kind", ["close", "reset", "dies"])
def test_a_stream_that_stops_in_the_middle_says_so(tier, engines, kind):
    one = tier()
    one.give(*one.members(engines(kind=kind, gap_s=0.05)))
    with one.client() as client:
        answer = chat(client, stream=True, max_tokens=9)
    assert answer.tokens == 3
    assert answer.error["code"] == 502


def test_a_member_that_fails_again_and_again_is_left_alone_for_a_while(tier, engines):
    """It would look like the least busy one."""
    one = tier()
    bad, good = engines(kind="error"), engines(ttft_s=0.05)
    one.give(*one.members(bad, good))
    with one.client() as client:
        asked = [InBackground(lambda: chat(client)) for _ in range(3)]
        for _ in range(40):
            assert chat(client).status == 200
        for one_asked in asked:
            one_asked.result()
        assert one.state().members["r1"].sent <= 8
        assert not one.state().members["r1"].sure
        bad.fault(kind="none")
        assert eventually(lambda: chat(client).headers["x-launcher-replica"] == "r1", 10)


def test_all_replicas_failing_gives_the_engines_own_answer(tier, engines):
    one = tier()
    one.give(*one.members(*(engines(kind="error") for _ in range(5))))
    with one.client() as client:
        answer = chat(client)
    assert answer.status == 500
    assert "EngineDeadError" in answer.lines[0]
    assert sum(tally.sent for tally in one.state().members.values()) == 3


def test_what_the_client_did_wrong_is_not_tried_again(tier, engines):
    one = tier()
    first, second = engines(), engines()
    one.give(*one.members(first, second))
    with one.client() as client:
        assert client.post("/v1/chat/completions", content=b"{").status_code == 400
        assert client.get("/v1/other").status_code == 404
    assert sum(tally.retried for tally in one.state().members.values()) == 0


def test_a_request_is_held_while_a_replica_comes_up(tier, engines):
    one = tier(hold_s=20)
    one.give(expects=True)
    with one.client() as client:
        asked = InBackground(lambda: chat(client, max_tokens=2))
        assert eventually(lambda: one.state().holding == 1)
        one.give(*one.members(engines()))
        assert asked.result().status == 200


def test_a_request_of_the_only_replica_waits_for_the_verdict_and_its_successor(tier, engines):
    one = tier()
    victim, successor = engines(ttft_s=60), engines()
    one.give(*one.members(victim))
    with one.client() as client:
        asked = InBackground(lambda: chat(client, max_tokens=2))
        assert eventually(lambda: victim.counts()["running"] == 1)
        victim.kill()
        assert eventually(lambda: one.state().holding == 1)
        # The tier's own look finds it gone, too; the verdict is still to come, so it is held.
        assert eventually(lambda: not one.state().members["r1"].reachable)
        assert one.state().holding == 1
        one.give(expects=True)
        new = one.members(successor)[0].model_copy(update={"name": "r1.g2", "slot": 7})
        one.give(new)
        answer = asked.result()
    assert (answer.status, answer.headers["x-launcher-replica"]) == (200, "r1.g2")


def test_a_flapping_replica_gets_its_request_when_it_is_back(tier, engines):
    one = tier(hold_s=20)
    flapping = engines()
    one.give(*one.members(flapping))
    flapping.kill()
    with one.client() as client:
        asked = InBackground(lambda: chat(client, max_tokens=2))
        assert eventually(lambda: one.state().holding == 1)
        flapping.start()
        assert asked.result().status == 200


def test_nobody_coming_is_said_at_once_and_a_long_wait_ends(tier):
    one = tier(hold_s=1)
    with one.client() as client:
        began = time.monotonic()
        answer = chat(client)
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert time.monotonic() - began < 0.9
        one.give(expects=True)
        answer = chat(client)
        assert answer.status == 503
        assert "after 1 s" in answer.lines[0]


def test_a_waiting_stream_is_kept_alive_and_still_rescued(tier, engines):
    one = tier()
    victim, survivor = engines(ttft_s=60), engines()
    members = one.members(victim, survivor)
    one.give(members[0])
    lines: list[str] = []

    def ask():
        asked = {"model": "m", "messages": [], "stream": True, "max_tokens": 3}
        with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            for line in response.iter_lines():
                lines.append(line)
            return response.status_code

    with one.client() as client:
        asked = InBackground(ask)
        assert eventually(lambda: lines[:1] == [": the request is waiting"])
        one.give(*members)
        victim.kill()
        assert asked.result() == 200
    answer = Answer(200, {}, lines, None)
    assert (answer.tokens, answer.error, answer.is_done) == (3, None, True)


def test_an_abort_reaches_the_engine_within_a_second(tier, engines):
    one = tier()
    engine = engines(ttft_s=30)
    one.give(*one.members(engine))
    for stream in (True, False):
        before = engine.counts()["aborted"]
        with one.client(timeout=0.5) as client, pytest.raises(httpx.ReadTimeout):
            chat(client, stream=stream)
        assert eventually(lambda b=before: engine.counts()["aborted"] == b + 1, 1.0)
    with one.client() as client:
        engine.fault(ttft_s=0, gap_s=0.1)
        with client.stream(
            "POST", "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 500}
        ) as response:
            next(response.iter_lines())
        assert eventually(lambda: engine.counts()["aborted"] == 3, 1.0)
    assert eventually(lambda: one.state().in_flight == 0)


def test_the_least_busy_member_is_asked_and_weights_count(tier, engines):
    one = tier()
    small, large = engines(ttft_s=1.5), engines(ttft_s=1.5)
    a, b = one.members(small, large)
    one.give(a, b.model_copy(update={"weight": 3.0}))
    with one.client() as client:
        asked = [InBackground(lambda: chat(client)) for _ in range(8)]
        assert eventually(lambda: small.counts()["running"] + large.counts()["running"] == 8)
        assert (small.counts()["running"], large.counts()["running"]) == (2, 6)
        for one_asked in asked:
            one_asked.result()


def test_a_draining_member_ends_its_requests_and_gets_no_new_one(tier, engines):
    one = tier()
    old, new = engines(ttft_s=1), engines()
    members = one.members(old, new)
    one.give(members[0])
    with one.client() as client:
        asked = InBackground(lambda: chat(client))
        assert eventually(lambda: old.counts()["running"] == 1)
        one.give(members[0].model_copy(update={"goal": "draining"}), members[1])
        assert chat(client).headers["x-launcher-replica"] == "r2"
        assert asked.result().headers["x-launcher-replica"] == "r1"


def test_a_fallback_serves_when_no_replica_is_left_and_says_so(tier, engines):
    one = tier()
    small, replica = engines(model="small"), engines()
    fallback = Member(name="fallback", slot=9, url=small.url, fallback=True, model="small")
    member = one.members(replica)[0]
    one.give(member, fallback)
    with one.client() as client:
        assert "x-launcher-fallback" not in chat(client).headers
        one.give(fallback)
        answer = chat(client, stream=True, max_tokens=2)
        assert answer.headers["x-launcher-fallback"] == "small"
        assert small.counts()["seen"][-1]["model"] == "small"
        assert one.state().fell_back == 1


def test_the_engine_gets_its_own_key_and_never_the_clients(tier, engines, tmp_path):
    one = tier()
    engine = engines(key="engine-key")
    (tmp_path / "engine.key").write_text("engine-key\n")
    one.give(*one.members(engine, key_file=str(tmp_path / "engine.key")))
    with one.client(headers={"Authorization": "Bearer client-key"}) as client:
        assert chat(client).status == 200
    headers = engine.counts()["seen"][-1]["headers"]
    assert headers["authorization"] == "bearer engine-key"
    assert not [name for name in headers if name.startswith("x-launcher")]


def test_a_changed_key_of_an_engine_is_read_again(tier, engines, tmp_path):
    one = tier()
    engine, other = engines(key="new-key"), engines()
    (tmp_path / "engine.key").write_text("old-key\n")
    one.give(*one.members(engine, other, key_file=str(tmp_path / "engine.key")))
    with one.client() as client:
        assert all(chat(client).headers["x-launcher-replica"] == "r2" for _ in range(4))
        (tmp_path / "engine.key").write_text("new-key\n")
        assert eventually(lambda: chat(client).headers["x-launcher-replica"] == "r1", 10)


def test_a_key_that_was_revoked_is_refused_whoever_says_that_it_is_valid(tier, engines):
    one = tier()
    one.give(*one.members(engines()))
    one.give_keys(Key(name="ci", sha256="0" * 64, slot=3, made_at=0))
    with one.client() as client:
        assert client.get("/v1/models", headers={"X-Launcher-Key": "ci"}).status_code == 200
        one.give_keys()
        assert client.get("/v1/models", headers={"X-Launcher-Key": "ci"}).status_code == 401


def test_more_waiting_requests_than_allowed_are_refused_clearly(tier, engines):
    one = tier(waiting_max=4)
    engine = engines(ttft_s=2)
    one.give(*one.members(engine))
    one.give_keys(Key(name="ci", sha256="0" * 64, slot=3, waiting_max=2, made_at=0))
    with one.client() as client:
        mine = {"X-Launcher-Key": "ci"}
        asked = [
            InBackground(lambda: client.post("/v1/completions", json={}, headers=mine))
            for _ in range(2)
        ]
        assert eventually(lambda: engine.counts()["running"] == 2)
        refused = client.post("/v1/completions", json={}, headers=mine)
        assert refused.status_code == 429
        assert "with this key" in refused.json()["error"]["message"]
        asked += [InBackground(lambda: chat(client)) for _ in range(2)]
        assert eventually(lambda: engine.counts()["running"] == 4)
        assert chat(client).status == 429
        for one_asked in asked:
            one_asked.result()
        assert chat(client).status == 200
    assert one.state().refused == {"waiting": 2}


def test_a_body_beyond_the_limit_is_refused_also_without_a_length(tier, engines):
    one = tier(body_max_bytes=1_000_000)
    one.give(*one.members(engines()))

    def endless():
        for _ in range(400):
            yield b"x" * 10_000

    with one.client() as client:
        big = {"messages": [{"role": "user", "content": "x" * 900_000}]}
        assert client.post("/v1/chat/completions", json=big).status_code == 200
        assert client.post("/v1/chat/completions", content=b"x" * 1_100_000).status_code == 413
        try:
            assert client.post("/v1/chat/completions", content=endless()).status_code == 413
        except httpx.WriteError:
            pass  # refused while we were still sending
        assert chat(client).status == 200


def test_orders_that_make_no_sense_leave_the_last_good_ones(tier, engines):
    one = tier()
    one.give(*one.members(engines()))
    (one.folder / "orders.json").write_text('{"members": 7')
    assert eventually(lambda: "the last good one counts" in one.log())
    with one.client() as client:
        assert chat(client).status == 200


def test_a_successor_takes_the_socket_while_streams_go_on(tier, engines):
    one = tier()
    engine = engines(gap_s=0.1)
    one.give(*one.members(engine))
    with one.client() as client:
        asked = InBackground(lambda: chat(client, stream=True, max_tokens=25))
        assert eventually(lambda: engine.counts()["running"] == 1)
        old = one.process
        new = type(one)(one.folder, one.run_folder)
        new.give(*one.members(engine))
        old.terminate()
        with new.client() as second:
            assert chat(second, max_tokens=1).status == 200
        assert asked.result().tokens == 25
        assert old.wait(5) == 0
        new.end()


def test_many_clients_at_once_all_get_their_answers(tier, engines):
    one = tier()
    one.give(*one.members(engines(ttft_s=0.02), engines(ttft_s=0.02)))
    failed: list[object] = []

    def ask():
        with one.client() as client:
            for index in range(20):
                answer = chat(client, stream=index % 2 == 0, max_tokens=3)
                if answer.status != 200 or answer.error if index % 2 == 0 else False:
                    failed.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert eventually(lambda: one.state().in_flight == 0)
    assert one.state().waiting == 0
