import pytest

from health.report import Finding, NodeFacts
from inventory.ledger import Ledger
from launcher.apply import remember
from launcher.check import lint
from launcher.documents import Assignment
from launcher.plan import make_plan, new_record
from launcher.snapshot import AllocationView
from launcher.steps import Allocate, Assign, Down, Fail, Note, Release
from tests.launcher.worlds import (
    NOW,
    VERSIONS,
    accuses,
    begun,
    checked,
    died,
    make_context,
    member,
    ranked,
    replica,
    report,
    snapshot,
    view,
)


def plan(context, record, seen):
    made = make_plan(context, record, seen)
    assert lint(context, record, made, Ledger()) == []
    return made


def only(made, kind):
    assert [type(step) for step in made.steps] == [kind], made
    return made.steps[0]


def test_a_new_fleet_asks_for_the_first_nodes_of_its_pool():
    context = make_context()
    record = new_record(context, 1, None, NOW)
    step = only(plan(context, record, snapshot(allocation=AllocationView("none"))), Allocate)
    assert (step.allocation, step.nodes) == (1, ("h1", "h2"))


def test_two_replicas_never_get_the_same_node():
    context = make_context(pool=("h1", "h2", "h3", "h4"), replicas=2)
    record = new_record(context, 1, None, NOW)
    seen = snapshot(allocation=AllocationView("none"))
    seen.replicas["r2"] = seen.replicas["r1"]
    steps = plan(context, record, seen).steps
    assert [step.nodes for step in steps] == [("h1", "h2"), ("h3", "h4")]


def test_allocations_are_counted_over_the_fleets_life():
    context = make_context()
    before = begun(context, allocation=7, generation=3, slot=42)
    after = replica(new_record(context, 2, before, NOW))
    assert (after.allocation, after.generation, after.slot, after.intent) == (7, 3, 42, "none")


def test_a_pending_job_is_waited_for_with_its_reason():
    context = make_context(pool=())
    made = plan(
        context,
        begun(context, running_at=None, nodes=()),
        snapshot(allocation=AllocationView("pending", "Slurm job 7", reason="Resources")),
    )
    assert made.steps == ()
    assert made.waiting_for == ("r1: Resources",)


def test_a_job_that_stays_pending_past_the_limit_is_given_up_with_exit_code_4():
    context = make_context(pool=(), limits={"queue": "1m"})
    seen = snapshot(allocation=AllocationView("pending", "Slurm job 7"), now=NOW + 61)
    failure = only(plan(context, begun(context, running_at=None, nodes=()), seen), Fail).failure
    assert (failure.exit_code, failure.where) == (4, "Slurm job 7")


def test_a_backend_that_does_not_answer_is_unknown_and_nothing_is_done():
    context = make_context()
    made = plan(
        context,
        ranked(context),
        snapshot(
            view("h1", report("h1", "serving", member=member(0, True), assignment_revision=2)),
            view("h2", report("h2", "serving", member=member(1), assignment_revision=2)),
            allocation=AllocationView("unknown", reason="no answer"),
        ),
    )
    assert made.steps == ()


def test_missing_agents_are_named_and_given_up_after_the_limit():
    context = make_context()
    record = begun(context)
    made = plan(context, record, snapshot(view("h1", report("h1"))))
    assert made.waiting_for == ("r1: the agent on h2",)
    late = snapshot(view("h1", report("h1")), view("h2", None, problem="no route"), now=NOW + 999)
    failure = only(plan(context, record, late), Fail).failure
    assert "h2" in failure.message
    assert "no route" in failure.message
    assert failure.exit_code == 4


def test_agents_that_are_there_are_told_to_check_themselves_and_their_peers():
    context = make_context()
    made = plan(
        context, begun(context), snapshot(view("h1", report("h1")), view("h2", report("h2")))
    )
    assert {step.node for step in made.steps} == {"h1", "h2"}
    for step in made.steps:
        assert step.assignment.goal == "idle"
        assert step.assignment.checks.executor == "ray"
        assert [peer.node for peer in step.assignment.peers] == [
            {"h1": "h2", "h2": "h1"}[step.node]
        ]


def test_healthy_nodes_that_reach_each_other_become_ranks():
    context = make_context()
    record = checked(context)
    made = plan(context, record, snapshot(view("h1", report("h1")), view("h2", report("h2"))))
    leader, follower, note = made.steps
    assert isinstance(note, Note)
    assert note.changes["generation"] == 1
    assert [command.name for command in leader.assignment.member.commands] == ["ray-head", "serve"]
    assert [command.name for command in follower.assignment.member.commands] == ["ray-worker"]
    assert follower.assignment.member.leader_address == "10.0.0.1"
    assert follower.assignment.member.peers[0].node == "h1"
    for step in made.steps:
        record = remember(record, step, NOW)
    again = plan(context, record, snapshot(view("h1", report("h1")), view("h2", report("h2"))))
    assert again.steps == (), "applying a plan twice must not order anything twice"


def facts(**versions):
    return NodeFacts(traits={**VERSIONS, **versions})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"facts": facts(vllm="0.31.0")}, "vllm differs"),
        (
            {
                "facts": NodeFacts(
                    findings=(
                        Finding(check="disk", verdict="unhealthy", message="/x has 1 MiB free"),
                    )
                )
            },
            "1 MiB free",
        ),
    ],
)
def test_an_unfit_node_refuses_the_replica_with_exit_code_3(changed, told):
    context = make_context()
    seen = snapshot(view("h1", report("h1")), view("h2", report("h2", **changed)))
    failure = only(plan(context, checked(context), seen), Fail).failure
    assert failure.exit_code == 3
    assert told in failure.message


def busy_port():
    finding = Finding(check="host.ports", verdict="unhealthy", message="port 1 in use")
    return NodeFacts(findings=(finding,), traits=VERSIONS)


def test_a_busy_port_of_our_own_choice_moves_the_replica_to_the_next_block():
    context = make_context()
    record = checked(context)
    seen = snapshot(view("h1", report("h1", facts=busy_port())), view("h2", report("h2")))
    made = plan(context, record, seen)
    assert made.steps[0].changes["slot"] == (replica(record).slot + 1) % 120
    assert {step.node for step in made.steps[1:]} == {"h1", "h2"}


def test_nodes_that_do_not_reach_each_other_get_no_rank():
    context = make_context()
    seen = snapshot(view("h1", report("h1", reach={})), view("h2", report("h2")))
    made = plan(context, checked(context), seen)
    assert made.steps == ()
    assert "hear each other" in made.waiting_for[0]


def serving(**changes):
    return [
        view(
            "h1", report("h1", "serving", member=member(0, True), assignment_revision=2, **changes)
        ),
        view("h2", report("h2", "serving", member=member(1), assignment_revision=2)),
    ]


def test_the_plan_of_a_serving_fleet_is_empty():
    context = make_context()
    made = plan(context, ranked(context, serving_at=NOW), snapshot(*serving()))
    assert (made.steps, made.waiting_for) == ((), ())


def test_a_member_that_died_takes_the_whole_replica_down():
    context = make_context()
    record = ranked(context, serving_at=NOW)
    h1, _ = serving()
    h2 = view(
        "h2", report("h2", "failed", evidence=died("h2", "ray-worker"), assignment_revision=2)
    )
    made = plan(context, record, snapshot(h1, h2))
    failure = only(made, Fail).failure
    assert failure.where == "node h2"
    record = remember(record, made.steps[0], NOW)
    made = plan(context, record, snapshot(h1, h2))
    assert {(s.node, s.assignment.goal) for s in made.steps} == {
        ("h1", "stopped"),
        ("h2", "stopped"),
    }
    for step in made.steps:
        record = remember(record, step, NOW)
    stopped = [view(node, report(node, "stopped")) for node in ("h1", "h2")]
    made = plan(context, record, snapshot(*stopped))
    assert only(made, Release).allocation == 1
    record = remember(record, made.steps[0], NOW)
    assert plan(context, record, snapshot(*stopped)).finished


def test_a_silent_peer_is_lost_and_not_the_exit_that_followed():
    context = make_context()
    exited = died("h1", at=NOW + 1, message="serve exited with code 1: connection reset")
    h1 = view("h1", report("h1", "failed", evidence=exited, assignment_revision=2))
    gone = view("h2", report("h2", "serving"), heartbeat_silent_s=30, beat_silent_s=30)
    failure = only(plan(context, ranked(context), snapshot(h1, gone)), Fail).failure
    assert failure.where == "node h1", "an exit is the cause while nobody accuses a peer"
    h1 = view("h1", report("h1", "failed", evidence=accuses("h1", "h2"), assignment_revision=2))
    failure = only(plan(context, ranked(context), snapshot(h1, gone)), Fail).failure
    assert (failure.code, failure.where) == ("node_lost", "node h2")


def test_a_peer_that_has_evidence_of_its_own_is_the_cause():
    context = make_context()
    h1 = view("h1", report("h1", "failed", evidence=accuses("h1", "h2", NOW)))
    h2 = view("h2", report("h2", "failed", evidence=died("h2", "ray-worker", NOW + 0.2)))
    failure = only(plan(context, ranked(context), snapshot(h1, h2)), Fail).failure
    assert failure.where == "node h2"
    assert failure.code == "engine"


def test_down_stops_the_leader_first_and_gives_the_nodes_back_last():
    context = make_context()
    record = ranked(context, serving_at=NOW)
    made = plan(context, record, snapshot(*serving(), desired="down"))
    assert only(made, Down)
    record = remember(record, made.steps[0], NOW)
    made = plan(context, record, snapshot(*serving(), desired="down"))
    assert only(made, Assign).node == "h1"
    record = remember(record, made.steps[0], NOW)
    assert plan(context, record, snapshot(*serving(), desired="down")).steps == ()
    h1, h2 = view("h1", report("h1", "stopped")), serving()[1]
    made = plan(context, record, snapshot(h1, h2, desired="down"))
    assert only(made, Assign).node == "h2"


def test_a_node_that_cannot_be_asked_does_not_hold_down_for_ever():
    context = make_context()
    stopped = {node: Assignment(revision=3, goal="stopped") for node in ("h1", "h2")}
    record = begun(context, assignments=stopped, ranked_at=NOW, intent="down", stopping_at=NOW)
    h1 = view("h1", report("h1", "stopped"))
    h2 = view("h2", report("h2", "serving"), heartbeat_silent_s=30, beat_silent_s=30)
    assert only(plan(context, record, snapshot(h1, h2, desired="down")), Release)


def test_a_node_that_was_never_seen_does_not_hold_down_either():
    """A controller that took over while a host was away has no report of it at all."""
    context = make_context()
    stopped = {"h1": Assignment(revision=3, goal="stopped")}
    record = begun(context, assignments=stopped, intent="down", stopping_at=NOW - 60)
    h1, h2 = view("h1", report("h1", "stopped")), view("h2", None, problem="no route")
    assert only(plan(context, record, snapshot(h1, h2, desired="down")), Release)


def test_a_plan_that_breaks_a_rule_is_named_by_the_linter():
    context = make_context()
    record = ranked(context)
    back = Assign("r1", "h1", Assignment(revision=1, goal="idle"))
    twice = Allocate("r2", 1, ("h1", "h3"))
    made = make_plan(context, record, snapshot(*serving()))
    bad = type(made)(steps=(back, twice))
    problems = " ".join(lint(context, record, bad, Ledger()))
    assert "would go back to 1" in problems
    assert "h1 would serve r2 and r1" in problems
