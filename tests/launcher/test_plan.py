from dataclasses import replace

import pytest

from health.report import Finding, NodeFacts
from launcher.apply import asked as taken
from launcher.apply import remember
from launcher.check import lint
from launcher.documents import Assignment
from launcher.planning import make_plan, new_record
from launcher.record import Seat
from launcher.snapshot import AllocationView
from launcher.steps import (
    Allocate,
    Assign,
    Down,
    End,
    Fail,
    Note,
    Over,
    Plan,
    Release,
    Settle,
    Sit,
)
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
    assert lint(context, record, made, seen) == []
    orders = [step.assignment for step in made.steps if isinstance(step, Assign)]
    for order in orders:  # an order without it ends what is parked; a drill repeats the last one
        assert order.drill or order.park == (None if order.goal == "stopped" else context.park)
    return made


def done(record, made):
    for step in made.steps:
        record = remember(record, step, NOW)
    return record


def only(made, kind):
    assert [type(step) for step in made.steps] == [kind], made
    return made.steps[0]


def nothing_yet(**changes):
    return snapshot(**changes, allocation=AllocationView("none"))


def test_a_new_fleet_asks_for_the_first_nodes_of_its_pool():
    context = make_context()
    record = new_record(context, 1, None, NOW)
    step = only(plan(context, record, nothing_yet()), Allocate)
    assert (step.allocation, step.nodes) == ("r1.a1", ("h1", "h2"))


def test_two_replicas_never_get_the_same_node():
    context = make_context(pool=("h1", "h2", "h3", "h4"), replicas=2)
    record = new_record(context, 1, None, NOW)
    steps = plan(context, record, nothing_yet()).steps
    assert [step.nodes for step in steps] == [("h1", "h2"), ("h3", "h4")]


def test_allocations_are_counted_over_the_fleets_life():
    context = make_context()
    before = begun(context, generation=3, slot=42).model_copy(update={"counts": {"r1": 7}})
    record = new_record(context, 2, before, NOW)
    assert (replica(record).generation, replica(record).slot) == (3, 42)
    assert only(plan(context, record, nothing_yet()), Allocate).allocation == "r1.a8"


def asked(context):
    """Slurm was asked for two nodes; which, it has not said."""
    record = new_record(context, 1, None, NOW)
    return taken(done(record, make_plan(context, record, nothing_yet())), "r1.a1")


def test_a_pending_job_is_waited_for_with_its_reason():
    context = make_context(pool=())
    seen = snapshot(allocation=AllocationView("pending", "Slurm job 7", reason="Resources"))
    made = plan(context, asked(context), seen)
    assert made.steps == ()
    assert made.waiting_for == ("r1: Resources",)


def test_a_job_that_has_begun_gives_the_replica_its_seats_in_its_own_order():
    context = make_context(pool=())
    seen = snapshot(
        view("h3", None),
        view("h1", None),
        allocation=AllocationView("running", nodes=("h3", "h1")),
    )
    made = plan(context, asked(context), seen)
    assert only(made, Settle).nodes == ("h3", "h1")
    made = plan(context, done(asked(context), made), seen)
    assert only(made, Sit).seats == (
        Seat(node="h3", allocation="r1.a1"),
        Seat(node="h1", allocation="r1.a1"),
    )


def test_a_job_that_stays_pending_past_the_limit_is_given_up_with_exit_code_4():
    context = make_context(pool=(), limits={"queue": "1m"})
    seen = snapshot(allocation=AllocationView("pending", "Slurm job 7"), now=NOW + 61)
    failure = only(plan(context, asked(context), seen), Fail).failure
    assert (failure.exit_code, failure.where) == (4, "Slurm job 7")


def test_a_backend_that_does_not_answer_is_unknown_and_nothing_is_done():
    context = make_context()
    made = plan(
        context,
        ranked(context, serving_at=NOW),
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
        context,
        begun(context),
        snapshot(view("h1", report("h1", facts=None)), view("h2", report("h2", facts=None))),
    )
    assert {step.seat.node for step in made.steps} == {"h1", "h2"}
    for step in made.steps:
        assert step.assignment.goal == "idle"
        assert step.assignment.checks.executor == "ray"
        assert [peer.node for peer in step.assignment.peers] == [
            {"h1": "h2", "h2": "h1"}[step.seat.node]
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
    record = done(record, made)
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
    assert {step.seat.node for step in made.steps[1:]} == {"h1", "h2"}


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


NO_RESTART = {"limits": {"restarts": 0}}


def test_a_member_that_died_takes_the_whole_replica_down_where_restarts_are_off():
    context = make_context(**NO_RESTART)
    record = ranked(context, serving_at=NOW)
    h1, _ = serving()
    h2 = view(
        "h2", report("h2", "failed", evidence=died("h2", "ray-worker"), assignment_revision=2)
    )
    made = plan(context, record, snapshot(h1, h2))
    failure = only(made, Fail).failure
    assert failure.where == "node h2"
    record = done(record, made)
    made = plan(context, record, snapshot(h1, h2))
    assert {(s.seat.node, s.assignment.goal) for s in made.steps} == {
        ("h1", "stopped"),
        ("h2", "stopped"),
    }
    record = done(record, made)
    stopped = snapshot(*(view(node, report(node, "stopped")) for node in ("h1", "h2")))
    for kind in (Over, End, Release):
        made = plan(context, record, stopped)
        assert isinstance(made.steps[0], kind), made
        assert not made.finished
        record = done(record, made)
    assert plan(context, record, stopped).finished


def failure_of(seen):
    context = make_context(**NO_RESTART)
    return only(plan(context, ranked(context), seen), Fail).failure


def test_a_silent_peer_is_lost_and_not_the_exit_that_followed():
    exited = died("h1", at=NOW + 1, message="serve exited with code 1: connection reset")
    h1 = view("h1", report("h1", "failed", evidence=exited, assignment_revision=2))
    gone = view("h2", report("h2", "serving"), heartbeat_silent_s=30, beat_silent_s=30)
    failure = failure_of(snapshot(h1, gone))
    assert failure.where == "node h1", "an exit is the cause while nobody accuses a peer"
    h1 = view("h1", report("h1", "failed", evidence=accuses("h1", "h2"), assignment_revision=2))
    failure = failure_of(snapshot(h1, gone))
    assert (failure.code, failure.where) == ("node_lost", "node h2")


def test_a_peer_that_has_evidence_of_its_own_is_the_cause():
    h1 = view("h1", report("h1", "failed", evidence=accuses("h1", "h2", NOW)))
    h2 = view("h2", report("h2", "failed", evidence=died("h2", "ray-worker", NOW + 0.2)))
    failure = failure_of(snapshot(h1, h2))
    assert failure.where == "node h2"
    assert failure.code == "engine"


def test_down_stops_the_leader_first_and_gives_the_nodes_back_last():
    context = make_context()
    record = ranked(context, serving_at=NOW)
    made = plan(context, record, snapshot(*serving(), desired="down"))
    assert only(made, Down)
    record = done(record, made)
    made = plan(context, record, snapshot(*serving(), desired="down"))
    assert only(made, Assign).seat.node == "h1"
    record = done(record, made)
    assert plan(context, record, snapshot(*serving(), desired="down")).steps == ()
    h1, h2 = view("h1", report("h1", "stopped")), serving()[1]
    made = plan(context, record, snapshot(h1, h2, desired="down"))
    assert only(made, Assign).seat.node == "h2"


def to_the_end(context, record, seen) -> list[type]:
    """What is done until the plan is finished, while the world stays as it is."""
    kinds = []
    for _ in range(10):
        made = plan(context, record, seen)
        if made.finished:
            return kinds
        kinds += [type(step) for step in made.steps]
        record = done(record, made)
    raise AssertionError(made)


def test_a_node_that_cannot_be_asked_does_not_hold_down_for_ever():
    context = make_context()
    stopped = {node: Assignment(revision=3, goal="stopped") for node in ("h1", "h2")}
    record = begun(context, assignments=stopped, ranked_at=NOW, intent="down", stopping_at=NOW)
    h1 = view("h1", report("h1", "stopped"))
    h2 = view("h2", report("h2", "serving"), heartbeat_silent_s=30, beat_silent_s=30)
    seen = snapshot(h1, h2, desired="down")
    assert to_the_end(context, record, seen) == [Over, End, Release]


def test_a_node_that_was_never_seen_does_not_hold_down_either():
    """A controller that took over while a host was away has no report of it at all."""
    context = make_context()
    stopped = {"h1": Assignment(revision=3, goal="stopped")}
    record = begun(context, assignments=stopped, intent="down", stopping_at=NOW - 60)
    h1, h2 = view("h1", report("h1", "stopped")), view("h2", None, problem="no route")
    seen = snapshot(h1, h2, desired="down")
    assert to_the_end(context, record, seen) == [Over, End, Release]


def test_a_plan_that_breaks_a_rule_is_named_by_the_linter():
    context = make_context()
    record = ranked(context)
    seat = replica(record).seats[0]
    back = Assign("r1", seat, Assignment(revision=1, goal="idle"))
    twice = Allocate("r2", 1, 2, ("h1", "h3"))
    busy = Assign("r1", seat, Assignment(revision=3, goal="rank"))
    stranger = Assign("r9", seat, Assignment(revision=3, goal="idle"))
    bad = Plan(steps=(back, twice, busy, stranger))
    problems = " ".join(lint(context, record, bad, snapshot(*serving())))
    assert "would go back to 1" in problems
    assert "h1 would be held by r2.a1 and r1.a1" in problems
    assert "h1 would get a rank before it is known to be idle" in problems


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ({"problem": "has not answered for 4 s"}, "h2: has not answered for 4 s"),
        ({"problem": "its agent's process ended", "ended": True}, ""),
    ],
)
def test_who_serves_and_cannot_be_asked_is_told_and_not_who_has_ended(seen, told):
    context = make_context()
    views = serving()
    views[1] = replace(views[1], **seen)
    made = plan(context, ranked(context, serving_at=NOW), snapshot(*views))
    goes_on = [wait for wait in made.waiting_for if "what runs there goes on" in wait]
    assert [wait.partition(";")[0] for wait in goes_on] == ([told] if told else [])
