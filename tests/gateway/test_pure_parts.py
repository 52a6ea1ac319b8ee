"""Choosing, cutting and counting, as functions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.gateway import keyring
from launcher.gateway.choose import Seen, choose, may_come
from launcher.gateway.counters import ROWS, Counters
from launcher.gateway.documents import BUCKETS_S, Histogram, Keys, Member, Settings
from launcher.gateway.events import Events, error_event, failure_in
from launcher.gateway.front import FrontPlaces, render
from launcher.gateway.tally import observe


def member(name: str, **changes) -> Member:
    return Member(name=name, slot=int(name[1:]), url="http://x", **changes)


def test_who_fails_its_health_is_asked_last_and_who_cannot_be_reached_never():
    members = (member("m1"), member("m2"), member("m3"))
    seen = {"m1": Seen(0, sure=False), "m2": Seen(90), "m3": Seen(0, reachable=False)}
    assert choose(members, seen, frozenset(), 0.5).name == "m2"
    assert choose(members, seen, frozenset({"m2"}), 0.5).name == "m1"
    assert choose(members, seen, frozenset({"m1", "m2"}), 0.5) is None
    assert may_come(members, frozenset({"m1", "m2"}), expects=False)
    assert not may_come(members, frozenset({"m1", "m2", "m3"}), expects=False)


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.booleans(), st.booleans(), st.booleans()), max_size=6
    ),
    st.sets(st.integers(0, 5)),
    st.floats(0, 0.999),
)
def test_a_choice_is_always_allowed_and_never_worse_than_another(rows, tried_numbers, draw):
    members, seen = [], {}
    for number, (in_flight, reachable, sure, fallback) in enumerate(rows):
        members.append(member(f"m{number}", fallback=fallback))
        seen[f"m{number}"] = Seen(in_flight, reachable, sure)
    tried = frozenset(f"m{number}" for number in tried_numbers)
    chosen = choose(tuple(members), seen, tried, draw)
    able = [m for m in members if seen[m.name].reachable and m.name not in tried]
    assert (chosen is None) == (not able)
    if chosen is not None:
        assert chosen in able
        same = [m for m in able if m.fallback == chosen.fallback]
        equals = [m for m in same if seen[m.name].sure == seen[chosen.name].sure]
        assert all(seen[chosen.name].in_flight <= seen[m.name].in_flight for m in equals)
        if chosen.fallback:
            assert all(m.fallback for m in able)


@given(st.lists(st.text(alphabet="ab: \r", max_size=20), max_size=8), st.data())
def test_however_a_stream_is_cut_only_whole_events_pass_and_none_is_lost(texts, data):
    end = data.draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    events = [b"data: " + text.strip().encode() + end for text in texts]
    stream = b"".join(events)
    cut, passed, at = Events(), b"", 0
    while at < len(stream):
        size = data.draw(st.integers(1, 40))
        whole = cut.whole(stream[at : at + size])
        at += size
        assert whole == b"" or whole.endswith(end)
        passed += whole
    assert passed == stream


def test_an_engines_own_error_event_is_told_from_a_clients_fault():
    assert failure_in(b'data: {"error": {"message": "dead", "code": 500}}\n\n') == "dead"
    assert failure_in(b'data: {"error": {"message": "bad", "code": 400}}\n\n') is None
    assert failure_in(b'data: {"choices": [{"text": "error"}]}\n\n') is None
    assert failure_in(b'data: {"error"') is None
    first, done, _ = error_event("x", "replica_lost", 502).split(b"\n\n")
    assert json.loads(first[6:])["error"]["code"] == 502
    assert done == b"data: [DONE]"


def test_counters_are_summed_over_processes_and_forget_those_that_died(tmp_path):
    one, two = Counters(tmp_path / "c", 0), Counters(tmp_path / "c", 1)
    one.add_in_flight(5, 2)
    two.add_in_flight(5, 1)
    two.add_waiting(3, 1)
    assert (one.in_flight(5), one.waiting(), one.waiting_of(3), one.own_waiting()) == (3, 1, 1, 0)
    supervisor = Counters(tmp_path / "c", ROWS - 1)
    supervisor.clear(1)
    assert (one.in_flight(5), one.waiting()) == (2, 0)


def test_a_histogram_has_a_place_for_every_time():
    histogram = Histogram()
    for seconds in (0.0, BUCKETS_S[0], BUCKETS_S[-1], 9999.0):
        observe(histogram, seconds)
    assert (histogram.counts[0], histogram.counts[-2], histogram.counts[-1]) == (2, 1, 1)


def test_the_fleets_own_key_follows_its_file():
    ring = keyring.with_default(Keys(), "sk-one", 1)
    assert keyring.with_default(ring, "sk-one", 2) == ring
    changed = keyring.with_default(keyring.added(ring, "alice", "sk-a", 2), "sk-two", 3)
    assert {key.name: key.sha256 for key in changed.keys} == {
        "alice": keyring.digest("sk-a"),
        "default": keyring.digest("sk-two"),
    }
    assert "sk-" not in keyring.as_map(changed)


@pytest.mark.parametrize("name", ["it's", "a b", "$(id)", 'x"y', "new\nline"])
def test_odd_paths_stay_one_word_in_the_fronts_configuration(name, tmp_path):
    folder = tmp_path / name.replace("\n", "_")
    settings = Settings(fleet="t", host="127.0.0.1", port=8080)
    places = FrontPlaces(f"{folder}/front.sock", f"{folder}/keys.map", (f"{folder}/t.sock",))
    text = render(settings, places, 1)
    (line,) = [row for row in text.splitlines() if row.startswith("  server ")]
    assert line.endswith("check inter 1s fastinter 500ms fall 2 rise 1")
    assert "unix@'" in line
