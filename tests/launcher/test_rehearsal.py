"""The collective check beside the engine's start: who is asked, and what the answers lead to."""

import json
from dataclasses import replace

import pytest

from health.report import NodeFacts
from inventory.ledger import Ledger, Passed
from launcher.addresses import Choice
from launcher.documents import MemberReport
from launcher.fitness import judge_set
from launcher.planning import make_plan
from launcher.rehearsal import rehearsals, wanted
from launcher.steps import Assign, Fail, Note, Pass, Quarantine
from tests.launcher.worlds import (
    NOW,
    VERSIONS,
    checked,
    make_context,
    ranked,
    report,
    snapshot,
    view,
)

POOL = ("h1", "h2", "h3", "h4", "h5")


def context(nodes=2, **more):
    made = make_context(pool=POOL, nodes=nodes, parallelism={"pipeline": nodes})
    return replace(made, known=POOL, **more)


def reports():
    return {node: report(node) for node in ("h1", "h2")}


def test_nodes_that_passed_within_the_hour_are_not_asked_again():
    ground = context()
    replica = checked(ground).replicas["r1"]
    fresh = snapshot(view("h1", report("h1")), view("h2", report("h2")))
    assert wanted(ground, replica, reports(), fresh)
    passed = Ledger().with_passed(Passed(boots={"h1": "b", "h2": "b"}, at=NOW - 60))
    assert not wanted(ground, replica, reports(), replace(fresh, ledger=passed))
    rebooted = {**reports(), "h2": report("h2", boot_id="c")}
    assert wanted(ground, replica, rebooted, replace(fresh, ledger=passed))
    late = replace(fresh, ledger=passed, now=NOW + 4000)
    assert wanted(ground, replica, reports(), late)
    assert not wanted(replace(ground, shares_machine=True), replica, reports(), fresh)


def test_every_node_gets_its_ranks_and_all_meet_at_the_leader():
    ground = context()
    replica = checked(ground).replicas["r1"]
    chosen = {"h1": Choice("10.0.0.1", "eth0"), "h2": Choice("10.0.0.2", "eth0")}
    made = rehearsals(ground, replica, chosen, 20012)
    orders = {node: json.loads(one.order) for node, one in made.items()}
    assert [orders[node]["ranks"] for node in ("h1", "h2")] == [[0], [1]]
    assert [orders[node]["hosts_store"] for node in ("h1", "h2")] == [True, False]
    assert {one["store_address"] for one in orders.values()} == {"10.0.0.1"}
    assert [one["name"] for one in orders["h1"]["rounds"]] == ["all", "pipeline"]


def test_experts_that_are_spread_talk_all_to_all():
    ground = context()
    ground = replace(
        ground,
        spec=make_context(pool=POOL, engine={"args": {"enable-expert-parallel": True}}).spec,
    )
    chosen = {node: Choice("10.0.0.1", "eth0") for node in ("h1", "h2")}
    made = rehearsals(ground, checked(ground).replicas["r1"], chosen, 20012)
    assert json.loads(made["h1"].order)["rounds"][-1]["op"] == "all_to_all"


def test_ranks_are_handed_out_with_the_check_beside_the_engine():
    ground = context()
    seen = snapshot(view("h1", report("h1")), view("h2", report("h2")))
    steps = make_plan(ground, checked(ground), seen).steps
    members = [step.assignment.member for step in steps if isinstance(step, Assign)]
    assert all(member.rehearsal for member in members)
    (note,) = [step for step in steps if isinstance(step, Note)]
    assert note.changes["rehearses"]


def said(status="ok", stage="done", **more):
    def told(rank, *rounds):
        rows = [
            {
                "kind": "result",
                "round": name,
                "rank": rank,
                "status": status,
                "stage": stage,
                **more,
            }
            for name in rounds or ("all", "pipeline")
        ]
        rows.append({"kind": "done"})
        return "".join(f"LAUNCHER-COLLECTIVE {json.dumps(row)}\n" for row in rows)

    return told


def joining(node, rank, rehearsed, token=None):
    member = MemberReport(
        replica="r1", generation=1, rank=rank, rehearsed=rehearsed, first_token_at=token
    )
    phase = "serving" if token else "joining"
    return view(node, report(node, phase, member=member, assignment_revision=2))


def steps_of(first, second, *, ground=None, token=None):
    ground = ground or context()
    record = ranked(ground, rehearses=True)
    seen = snapshot(joining("h1", 0, first, token), joining("h2", 1, second, token))
    return make_plan(ground, record, seen)


def test_while_an_answer_is_awaited_the_engine_is_waited_for():
    plan = steps_of(said()(0), None)
    assert plan.steps == ()


def test_nodes_that_pass_are_remembered():
    (step,) = steps_of(said()(0), said()(1)).steps
    assert isinstance(step, Pass)
    assert step.passed.boots == {"h1": "b", "h2": "b"}


def test_a_node_that_did_not_come_is_swapped_though_the_engine_is_starting():
    missed = said("error", "peers", missing=1, detail="rank 1 did not come")(0, "all")
    nothing = "LAUNCHER-COLLECTIVE " + json.dumps({"kind": "done"}) + "\n"
    quarantine, note = steps_of(missed, nothing).steps
    assert isinstance(quarantine, Quarantine)
    assert quarantine.cordon.node == "h2"
    assert note.changes["stopping_at"] == NOW, "engines are starting: they end first"


def test_a_serving_replica_is_not_ended_by_what_a_check_foretold():
    missed = said("error", "peers", missing=1)(0, "all")
    (note,) = steps_of(missed, said()(1), token=NOW).steps
    assert isinstance(note, Note)
    assert "h2 is doubtful" in note.changes["story"][0]


def test_a_check_that_runs_nowhere_is_told_and_blames_nobody():
    (note,) = steps_of("no torch\n", "no torch\n").steps
    assert note.changes == {
        "rehearses": False,
        "story": ("the collective check did not run: no torch",),
    }


def test_when_nobody_gets_through_the_network_is_refused_and_no_node_blamed():
    stuck = said("timeout", "store")
    (fail,) = steps_of(stuck(0), stuck(1)).steps
    assert isinstance(fail, Fail)
    assert fail.failure.exit_code == 3
    assert fail.failure.where == "check collective"


@pytest.mark.parametrize(("offset", "blamed"), [(0, None), (30, "h2"), (-30, "h2")])
def test_a_clock_that_is_wrong_is_blamed_on_its_node(offset, blamed):
    facts = {
        "h1": NodeFacts(traits=VERSIONS, taken_at=NOW),
        "h2": NodeFacts(traits=VERSIONS, taken_at=NOW + offset),
    }
    unfit = judge_set(facts, dict.fromkeys(facts, NOW - 1), NOW + 1)
    assert (unfit and next(iter(unfit.blamed))) == blamed


def test_when_all_clocks_differ_from_ours_ours_is_wrong():
    facts = {node: NodeFacts(traits=VERSIONS, taken_at=NOW + 3600) for node in ("h1", "h2")}
    assert judge_set(facts, dict.fromkeys(facts, NOW - 1), NOW + 1) is None
