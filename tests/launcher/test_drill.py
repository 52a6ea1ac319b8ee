"""`launcher drill`: real faults on purpose, ordered once, survived under load."""

import json
import shutil
import signal
import subprocess
import threading
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launcher.agent import drills
from launcher.agent.core import Agent
from launcher.apply import remember
from launcher.check import lint
from launcher.cli.drill import choose
from launcher.cli.steady import Steady
from launcher.documents import Assignment, Drill
from launcher.drilling import DISK_LEFT_BYTES, Course, followed
from launcher.errors import UsageError
from launcher.planning import make_plan
from launcher.record import Incident
from launcher.status import NodeStatus, ReplicaStatus
from launcher.steps import Assign, Interrupt, Plan
from tests.gateway.engines import Engine
from tests.launcher import worlds
from tests.launcher.fleets import eventually
from tests.launcher.terminal import Terminal
from tests.launcher.test_gateway_of_a_fleet import Fleet
from tests.launcher.test_notify import status
from tests.launcher.test_plan import done, plan
from tests.launcher.worlds import NOW

# The planner


def drill(node="h2", generation=1, ident="d1", kind="rank") -> Drill:
    return Drill(id=ident, replica="r1", generation=generation, node=node, kind=kind)


def serving(*wished: Drill, phase="serving"):
    """What is seen of r1, which serves on h1 and h2."""
    views = [
        worlds.view(node, worlds.report(node, phase, member=worlds.member(rank, token=rank == 0)))
        for rank, node in enumerate(("h1", "h2"))
    ]
    return replace(worlds.snapshot(*views), drills=wished)


def record_of(context):
    return worlds.ranked(context, serving_at=NOW, served=True)


def test_a_drill_repeats_the_order_with_the_fault_in_it_once():
    context = worlds.make_context()
    record = record_of(context)
    (step,) = plan(context, record, serving(drill())).steps
    order = record.allocations["r1.a1"].assignments["h2"]
    assert step.assignment == order.model_copy(update={"revision": 3, "drill": "rank"})
    assert (step.seat.node, step.drill) == ("h2", "d1")
    after = remember(record, step, NOW)
    assert after.drills == ("d1",)
    assert plan(context, after, serving(drill())).steps == ()
    second = plan(context, after, serving(drill(), drill(ident="d2", kind="hang"))).steps
    assert [(one.drill, one.assignment.revision) for one in second] == [("d2", 4)]


def test_two_drills_of_one_node_come_one_after_the_other():
    context = worlds.make_context()
    record, seen = record_of(context), serving(drill(), drill(ident="d2"), drill("h1", 1, "d3"))
    made = plan(context, record, seen)
    assert [one.drill for one in made.steps] == ["d1", "d3"]
    assert [one.drill for one in plan(context, done(record, made), seen).steps] == ["d2"]


@pytest.mark.parametrize("wished", [drill(generation=2), drill("h3")])
def test_a_drill_of_another_generation_or_of_no_rank_hits_nobody(wished):
    context = worlds.make_context()
    assert plan(context, record_of(context), serving(wished)).steps == ()


@pytest.mark.parametrize(
    "changes", [{"ranked_at": None}, {"stopping_at": NOW}, {"over": True}, {"intent": "down"}]
)
def test_what_is_not_ranked_is_planned_as_if_there_were_no_drill(changes):
    context = worlds.make_context()
    record = worlds.ranked(context, **changes) if changes.get("ranked_at", 1) else None
    record = record or worlds.checked(context)
    seen = serving(drill(generation=record.replicas["r1"].generation))
    with_it, without = (make_plan(context, record, one) for one in (seen, serving()))
    assert with_it == without


def test_a_replica_that_dies_in_the_same_instant_is_not_drilled():
    context = worlds.make_context()
    dead = worlds.report("h2", "failed", evidence=worlds.died("h2"), member=worlds.member(1))
    views = [worlds.view("h1", worlds.report("h1", "serving")), worlds.view("h2", dead)]
    seen = replace(worlds.snapshot(*views), drills=(drill(),))
    assert {type(step) for step in make_plan(context, record_of(context), seen).steps} == {
        Interrupt
    }


def test_a_drill_that_would_change_the_order_is_refused():
    context = worlds.make_context()
    record = record_of(context)
    (step,) = plan(context, record, serving(drill())).steps
    other = step.assignment.model_copy(update={"stop_grace_s": 1})
    changed = Plan((Assign(step.about, step.seat, other, drill="d1"),))
    assert lint(context, record, changed, serving()) == ["the drill d1 would change what h2 is"]


# The agent


MEMBER = worlds.lone_member()


def ordered(revision, kind="") -> Assignment:
    return Assignment(revision=revision, goal="rank", member=MEMBER, drill=kind)


@pytest.fixture
def agent(monkeypatch):
    """An agent with an engine, without anything that runs."""
    made = object.__new__(Agent)
    made.assignment, made.evidence, made.mark, made._fenced_revision = None, None, "m", 0
    made._ordered_to_end = False
    made.heart = SimpleNamespace(controller_heard_at=0.0)
    made.engine = SimpleNamespace(is_stopping=False, member=MEMBER)
    made.injected = []
    monkeypatch.setattr(drills, "inject", lambda kind, *_: made.injected.append(kind))
    return made


def test_an_agent_inflicts_a_fault_once_and_stays_what_it_is(agent):
    agent._take(ordered(2))
    agent._take(ordered(3, "rank"))
    agent._reconcile()
    assert (agent.injected, agent.assignment.revision) == (["rank"], 3)


def test_an_agent_that_begins_with_the_order_is_what_came_after_the_fault(agent):
    agent._take(ordered(3, "node"))
    assert agent.injected == []


def test_an_engine_that_has_failed_already_does_not_start_again(agent):
    agent._take(ordered(2))
    agent.evidence, agent.engine, agent._fenced_revision = worlds.died("n1"), None, 2
    agent._take(ordered(3, "rank"))
    agent._reconcile()
    assert (agent.injected, agent.engine) == ([], None)
    assert agent.evidence is not None


def test_frozen_processes_go_on_by_themselves():
    child = subprocess.Popen(["sleep", "60"])
    try:
        process = psutil.Process(child.pid)
        drills.freeze([process], 1.0)
        assert eventually(lambda: process.status() == psutil.STATUS_STOPPED, 0.9)
        assert eventually(lambda: process.status() == psutil.STATUS_SLEEPING)
    finally:
        child.kill()
        child.wait()


def test_a_disk_is_filled_but_for_a_rest_and_nothing_of_it_has_a_name(tmp_path, monkeypatch):
    free = namedtuple("Usage", "total used free")(0, 0, DISK_LEFT_BYTES + 1024 * 1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    monkeypatch.setattr(drills, "_file_system", lambda folder: "ext4")
    over, taken = threading.Event(), []

    def held() -> list[int]:
        """What this process holds below the folder, in bytes that the disk gave."""
        found = []
        for link in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                if str(link.readlink()).startswith(str(tmp_path)):
                    found.append(link.stat().st_blocks * 512)
        return found

    thread = threading.Thread(target=lambda: taken.append(drills.fill(tmp_path, over)))
    thread.start()
    assert eventually(lambda: held() == [1024 * 1024])
    assert list(tmp_path.iterdir()) == []
    over.set()
    thread.join(10)
    assert taken == [1024 * 1024]
    assert held() == []


def test_memory_and_a_full_disk_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(drills, "_file_system", lambda folder: "tmpfs")
    assert drills.fill(tmp_path, threading.Event()) == 0
    monkeypatch.setattr(drills, "_file_system", lambda folder: "ext4")
    full = namedtuple("Usage", "total used free")(0, 0, DISK_LEFT_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert drills.fill(tmp_path, threading.Event()) == 0


# The command


def test_a_drill_is_noticed_by_the_status_or_the_incident_and_over_when_the_fleet_serves():
    def seen(phase, replica_phase, generation, at, since=None):
        its = ReplicaStatus(
            name="r1",
            generation=generation,
            phase=replica_phase,
            endpoint=None,
            nodes=[],
            since=since,
        )
        return status(phase, "serving", at=at, replicas=[its])

    died = (Incident(at=101.5, code="engine", message="x"),)
    old = Incident(at=50.0, code="engine", message="y")
    begun = Course("r1", 1, began_at=100.0)
    assert followed(begun, seen("serving", "serving", 1, 99.0), died) == begun
    assert followed(begun, seen("serving", "serving", 1, 101.0), (old,)) == begun
    course = followed(begun, seen("degraded", "draining", 1, 102.0), (old, *died))
    assert (course.detect_s, course.serve_s) == (1.5, None)
    course = followed(course, seen("degraded", "serving", 2, 109.0, 108.5), died)
    assert course.serve_s is None, "the gateway does not send it requests yet"
    course = followed(course, seen("serving", "serving", 2, 110.0, 108.5), died)
    assert (course.detect_s, course.serve_s) == (1.5, 8.5)
    missed = followed(begun, seen("serving", "serving", 2, 103.0, 102.5), died)
    assert (missed.detect_s, missed.serve_s) == (1.5, 2.5)


def test_whom_a_drill_hits_is_named_or_the_last_rank_of_the_first_replica():
    def one(name, *nodes):
        return ReplicaStatus(
            name=name,
            generation=1,
            phase="serving",
            endpoint=None,
            nodes=[NodeStatus(node=node, rank=0, phase="serving") for node in nodes],
        )

    fleet = status("serving", replicas=[one("r1", "a1", "a2"), one("r2", "a3", "a4")])

    def chosen(*words):
        target, node = choose(fleet, *words)
        return target.name, node

    assert chosen(None, None) == ("r1", "a2")
    assert chosen("r2", None) == ("r2", "a4")
    assert chosen(None, "a3") == ("r2", "a3")
    assert chosen("r1", "a1") == ("r1", "a1")
    with pytest.raises(UsageError, match="no replica r3") as caught:
        choose(fleet, "r3", None)
    assert "r1, r2" in caught.value.hint
    with pytest.raises(UsageError, match="no rank is on a3") as caught:
        choose(fleet, "r1", "a3")
    assert "a[1-2]" in caught.value.hint


@pytest.mark.parametrize(
    ("fault", "counts"),
    [
        ("none", {"answered"}),
        ("error", {"failed"}),
        ("dies", {"answered", "broken_streams"}),
        ("reset", {"failed", "broken_streams"}),
        ("error_event", {"answered", "failed"}),
    ],
)
def test_requests_are_told_apart_by_what_became_of_them(fault, counts):
    engine = Engine()
    try:
        engine.fault(kind=fault)
        with Steady(f"{engine.url}/v1", "", "m") as steady:
            assert eventually(lambda: steady.requests.sent > 12)
        found = steady.requests.as_document()
        kinds = ("answered", "failed", "broken_streams", "unfinished")
        assert {name for name in kinds if found[name]} == counts
        assert sum(found[name] for name in kinds) == found["sent"]
        assert bool(found["examples"]) == (fault != "none")
    finally:
        engine.kill()


@pytest.fixture
def fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir):
    made = Fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir)
    made.spec.update(nodes=2, parallelism={"pipeline": 2}, replicas=1, spares=1)
    made.spec["limits"]["restarts"] = 5
    yield made
    assert made.cli("down", "--fleet", fleet_name).returncode == 0
    assert not made.engines()


def drilled(fleet, *words):
    result = fleet.cli("drill", *words, "--fleet", fleet.name, "--json")
    return result.returncode, json.loads(result.stdout), result.stderr


def test_an_engine_and_then_a_node_are_killed_under_load_and_no_request_fails(fleet):
    assert fleet.up() == 0
    assert eventually(lambda: [s["phase"] for s in fleet.status()["spares"]] == ["warm"])
    code, document, said = drilled(fleet, "rank")
    assert code == 2, "nobody can be asked here"
    assert "--yes" in document["error"]["hint"]
    assert fleet.status()["replicas"][0]["generation"] == 1

    code, document, said = drilled(fleet, "rank", "--yes", "--node", "n1")
    assert code == 0, said
    assert document["generation"] == {"before": 1, "after": 2}
    assert document["nodes"]["after"] == ["n1", "n2"]
    assert 0 < document["detect_s"] < document["serve_s"] < 30
    requests = document["requests"]
    assert (requests["failed"], requests["broken_streams"]) == (0, 0), requests
    assert requests["answered"] > 8

    assert eventually(lambda: [s["phase"] for s in fleet.status()["spares"]] == ["warm"])
    code, document, said = drilled(fleet, "node", "--yes")
    assert code == 0, said
    assert document["node"] == "n2"
    assert document["generation"] == {"before": 2, "after": 3}
    assert document["nodes"]["after"] == ["n1", "n3"], "the spare took its place"
    assert document["requests"]["failed"] == 0, document["requests"]
    told = fleet.cli("events", "--fleet", fleet.name).stdout
    assert "n1 is drilled: rank" in told
    assert "n2 is drilled: node" in told
    # The survivor's fence has a KILL that comes 5 s later: it must not meet the next generation.
    assert not eventually(lambda: fleet.status()["replicas"][0]["generation"] != 3, 7.0)


def test_a_fleet_that_does_not_fully_serve_is_not_drilled_and_a_wrong_fault_is_named(fleet):
    fleet.spec["limits"]["restarts"] = 0
    assert fleet.up() == 0
    code, document, _ = drilled(fleet, "link", "--yes")
    assert (code, "rank, node, hang, disk" in document["error"]["hint"]) == (2, True)
    asked = Terminal(fleet, "drill", "rank", "--fleet", fleet.name)
    asked.show("it will not come again", "Do it?")
    asked.type("n\n")
    assert asked.wait() == 1
    assert fleet.status()["phase"] == "serving"
    code, document, said = drilled(fleet, "rank", "--yes")
    assert code == 1, said
    assert document["serve_s"] is None
    assert "limits.restarts is 0" in fleet.status()["error"]["hint"]
    code, document, _ = drilled(fleet, "rank", "--yes")
    assert (code, document["error"]["code"]) == (2, "usage")


def test_a_hang_stops_the_engine_of_one_node_and_nothing_of_ours(fleet):
    assert fleet.up() == 0
    watching = fleet.cli.start("drill", "hang", "--yes", "--fleet", fleet.name)

    def stopped() -> set[str]:
        """The node's rank of each engine process that is stopped."""
        found = set()
        for process in fleet.engines():
            words = process.cmdline()
            if process.status() == psutil.STATUS_STOPPED:
                found.add(words[words.index("--node-rank") + 1])
        return found

    assert eventually(lambda: stopped() == {"1"}, 40)
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=20)
    assert watching.returncode == 130
    assert "n2 is told: stop the engine's processes" in said
