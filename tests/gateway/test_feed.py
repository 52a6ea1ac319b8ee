"""From what the controller knows to who takes traffic."""

from launcher.gateway import feed
from launcher.gateway.documents import Member, Orders
from launcher.gateway.members import with_slots
from launcher.record import Failure
from launcher.snapshot import AllocationView, Snapshot
from tests.launcher.worlds import NOW, make_context, member, ranked, report, snapshot, view

KEY = "/secrets/engine_key"


def serving():
    return (
        view("h1", report("h1", "serving", member=member(0, True), assignment_revision=2)),
        view("h2", report("h2", "serving", member=member(1), assignment_revision=2)),
    )


def fed(record, seen, before=None, backup=None):
    return feed.orders(record, seen, before or Orders(), KEY, backup)


def taking() -> Orders:
    return fed(ranked(make_context()), snapshot(*serving()))


def goals(orders: Orders) -> dict[str, str]:
    return {one.name: one.goal for one in orders.members}


def test_a_replica_takes_traffic_after_its_proving_token():
    context = make_context()
    joining = view("h1", report("h1", "joining", member=member(0), assignment_revision=2))
    coming = fed(ranked(context), snapshot(joining, serving()[1]))
    assert (coming.members, coming.expects, coming.open) == ((), True, True)
    orders = fed(ranked(context), snapshot(*serving()))
    (one,) = orders.members
    assert not orders.expects
    assert (one.name, one.url, one.key_file) == ("r1.g1", "http://10.0.0.1:1", KEY)
    assert "h[1-2]" in one.where


def test_a_member_that_died_is_dead_before_the_replica_is_stopped():
    failed = view("h2", report("h2", "failed", member=member(1), assignment_revision=2))
    assert goals(fed(ranked(make_context()), snapshot(serving()[0], failed), taking())) == {
        "r1.g1": "dead"
    }
    lost = view("h2", serving()[1].report, heartbeat_silent_s=9.0, beat_silent_s=20.0)
    assert goals(fed(ranked(make_context()), snapshot(serving()[0], lost), taking())) == {
        "r1.g1": "dead"
    }


def test_a_failure_of_record_is_a_verdict():
    failure = Failure(code="engine", exit_code=1, message="died", at=NOW)
    record = ranked(make_context(), intent="down", failure=failure)
    assert goals(fed(record, snapshot(*serving()), taking())) == {"r1.g1": "dead"}


def test_an_orderly_end_drains_and_takes_no_new_requests():
    record = ranked(make_context(), intent="down")
    orders = fed(record, snapshot(*serving(), desired="down"), taking())
    assert goals(orders) == {"r1.g1": "draining"}
    assert (orders.open, orders.expects) == (False, False)


def test_a_controller_that_sees_nothing_yet_changes_nothing():
    empty = Snapshot(NOW, "up", {"r1.a1": AllocationView("running")})
    assert goals(fed(ranked(make_context()), empty, taking())) == {"r1.g1": "serving"}


def test_a_replica_that_is_gone_is_no_member_and_the_next_generation_is_another_one():
    over = ranked(make_context(), intent="down", over=True)
    assert fed(over, snapshot(*serving()), taking()).members == ()
    second = ranked(make_context())
    second.replicas["r1"] = second.replicas["r1"].model_copy(update={"generation": 2})
    again = member(0, True).model_copy(update={"generation": 2})
    leader = view("h1", report("h1", "serving", member=again, assignment_revision=2))
    orders = fed(second, snapshot(leader, serving()[1]), taking())
    assert goals(orders) == {"r1.g2": "serving"}
    assert orders.members[0].slot != taking().members[0].slot


def test_the_fallback_is_a_member_of_its_own_kind():
    backup = feed.Backup("https://other.example/v1", "small", "/secrets/fallback_key")
    (one,) = fed(ranked(make_context()), snapshot(serving()[1]), None, backup).members
    assert (one.url, one.fallback, one.model) == ("https://other.example", True, "small")


def test_columns_of_members_that_left_are_not_used_at_once():
    def made(*names):
        return [Member(name=name, slot=0, url="http://x") for name in names]

    first = with_slots((), made("a", "b"))
    assert [one.slot for one in first] == [0, 1]
    assert [one.slot for one in with_slots(first, made("b", "c"))] == [1, 2]
