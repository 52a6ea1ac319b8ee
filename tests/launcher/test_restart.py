"""`launcher restart`: one replica comes again while the others serve."""

import json
import time
from dataclasses import replace

import pytest

from benchmarks.engines import end_s
from launcher.errors import UsageError
from launcher.paths import FleetPaths
from launcher.steps import Interrupt
from launcher.wish import read_wish, wish_restart, write_wish
from tests.launcher import worlds
from tests.launcher.fleets import eventually
from tests.launcher.test_gateway_of_a_fleet import Fleet, steady_load
from tests.launcher.test_plan import done, only, plan


@pytest.fixture
def fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir):
    made = Fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir)
    yield made
    made.cli("down", "--fleet", fleet_name)


def restart(fleet, *words):
    result = fleet.cli("restart", *words, "--fleet", fleet.name, "--json")
    return result.returncode, json.loads(result.stdout), result.stderr


def test_a_restart_in_order_costs_no_request(fleet):
    fleet.spec["env"] = {"FAKE_ENGINE_DELAY_S": "0.2"}
    assert fleet.up() == 0
    before = {process.pid for process in fleet.engines()}
    with steady_load(fleet) as answered:
        assert eventually(lambda: len(answered) > 4)
        code, document, said = restart(fleet, "r1")
        assert code == 0, said
        r1, r2 = document["replicas"]
        assert (r1["phase"], r1["generation"], r2["generation"]) == ("serving", 2, 1)
        assert "r1 serves in generation 2" in said
        had = len(answered)
        assert eventually(lambda: len(answered) > had + 4)
    after = {process.pid for process in fleet.engines()}
    assert len(before & after) == len(before) // 2
    members = {m.name: m.goal for m in fleet.gateway.orders().members}
    assert members == {"r1.g2": "serving", "r2.g1": "serving"}


def test_the_benchmark_reads_from_the_journal_how_long_the_old_generation_took_to_end(fleet):
    assert fleet.up() == 0
    began = time.monotonic()
    assert restart(fleet, "r2")[0] == 0
    took_s = time.monotonic() - began
    told = fleet.cli("events", "--fleet", fleet.name, "--json").stdout.splitlines()
    events = [json.loads(event) for event in told]
    assert 0 < end_s(events) < took_s
    ranked = [event for event in events if event.get("generation") == 2]
    order = next(event for event in events if event["event"] == "interrupt")
    assert order["at"] + end_s(events) <= ranked[0]["at"]


def test_a_replica_that_was_given_up_comes_again_when_a_person_asks(fleet):
    assert fleet.up() == 0  # its limits.restarts is 0
    victim = next(p for p in fleet.engines() if "127.0.0.2" in p.cmdline())
    victim.kill()

    def phases() -> list[str]:
        return [one["phase"] for one in fleet.status()["replicas"]]

    assert eventually(lambda: phases() == ["failed", "serving"])
    code, document, said = restart(fleet, "r1")
    assert code == 0, said
    assert document["replicas"][0]["generation"] == 2
    assert document["phase"] == "serving"


def test_what_cannot_be_restarted_is_refused_with_the_names_there_are(fleet):
    assert fleet.up() == 0
    code, document, _ = restart(fleet, "r3")
    assert code == 2
    assert "r1, r2" in document["error"]["hint"]
    for process in fleet.engines():
        process.kill()
    assert eventually(lambda: fleet.status()["finished"], 30)
    code, document, _ = restart(fleet, "r1")
    assert code == 2
    assert "launcher up" in document["error"]["hint"]
    assert fleet.status()["phase"] == "failed"


def test_a_down_of_the_same_instant_is_not_undone(tmp_path):
    paths = FleetPaths(tmp_path / "fleet")
    wish = write_wish(paths, 1, "up")
    assert wish_restart(paths, wish, "r1").restarts == {"r1": 1}
    assert wish_restart(paths, wish, "r1").restarts == {"r1": 2}
    write_wish(paths, 1, "down")
    with pytest.raises(UsageError, match="going down"):
        wish_restart(paths, wish, "r1")
    assert read_wish(paths).desired == "down"


def seen(phase, times):
    """Both nodes report this phase; r1 was asked to restart so often."""
    views = (worlds.view(node, worlds.report(node, phase)) for node in ("h1", "h2"))
    return replace(worlds.snapshot(*views), restarts={"r1": times})


def test_ranks_given_after_it_was_asked_for_are_the_restart():
    """Else a replica that was on its way would be interrupted as soon as it starts."""
    context = worlds.make_context()
    record = worlds.checked(context)
    record = done(record, plan(context, record, seen("warm", 3)))
    r1 = record.replicas["r1"]
    assert (r1.generation, r1.restarts_asked, r1.stopping_at) == (1, 3, None)


def test_whoever_asks_does_not_wait_for_the_next_try():
    context = worlds.make_context()
    waits = worlds.checked(context, not_before=worlds.NOW + 50, restarts_asked=2)
    made = plan(context, waits, seen("warm", 2))
    assert made.waiting_for == ("r1: the next try in 50 s",)
    asked = done(waits, plan(context, waits, seen("warm", 3))).replicas["r1"]
    assert (asked.generation, asked.restarts_asked) == (1, 3)


def test_a_restart_that_was_taken_up_is_not_taken_up_again():
    context = worlds.make_context()
    record = worlds.ranked(context)
    made = plan(context, record, seen("joining", 1))
    assert only(made, Interrupt).incident.code == "asked"
    assert done(record, made).replicas["r1"].restarts_asked == 1
    record = worlds.ranked(context, restarts_asked=1)
    assert plan(context, record, seen("joining", 1)).steps == ()


def test_a_follower_that_is_restarted_in_order_is_not_waited_for():
    """Its leader ends the requests; vLLM's follower would take five seconds over nothing."""
    context = worlds.make_context()
    record = worlds.ranked(context)
    record = done(record, plan(context, record, seen("joining", 1)))
    ended = plan(context, record, seen("joining", 1))
    told = {step.seat.node: step.assignment for step in ended.steps}
    assert {order.goal for order in told.values()} == {"idle"}
    assert (told["h1"].stop_grace_s, told["h2"].stop_grace_s) == (5, 1)
