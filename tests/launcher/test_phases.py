"""How long each phase of a bring-up took, beside what, and what clocks that differ do to it."""

import pytest

from launcher.cli.screens import timing_lines
from launcher.documents import MemberReport, Parked, Report
from launcher.phases import Phase, phases_of
from launcher.record import Incident, RunRecord
from launcher.snapshot import Snapshot
from launcher.status import ReplicaStatus
from tests.launcher.worlds import (
    NOW,
    begun,
    make_context,
    make_status,
    replica,
    report,
    snapshot,
    view,
)

SERVING_AT = NOW + 20.0


def times(**at: float) -> dict[str, float]:
    return {f"{name}_at": NOW + seconds for name, seconds in at.items()}


def up(**more) -> RunRecord:
    """Asked for at 0, nodes wanted at 1, agents up at 2, ranks given at 5, a token at 20."""
    at = times(requested=1.0, running=1.5, agents=2.0, ranked=5.0, serving=20.0)
    record = begun(make_context(), generation=1, **{**at, **more})
    return record.model_copy(update={"asked_at": NOW})


def node(name: str, rank: int, behind_s: float = 0.0, **more) -> Report:
    """An engine from a parked process, by the node's own clock."""

    def at(seconds: float) -> float:
        return NOW + seconds - behind_s

    values = {
        "begun_at": at(5.2),
        "started_at": at(14.0),
        "first_token_at": None if rank else at(19.5),
        "parked": Parked(state="ready", since=at(13.5), took_s=11.0),
        **more,
    }
    return report(
        name,
        phase="serving",
        member=MemberReport(replica="r1", generation=1, rank=rank, **values),
        parked=Parked(state="importing", since=at(25.0)),
    )


def world(*reports: Report, now: float = SERVING_AT) -> Snapshot:
    return snapshot(*(view(one.node, one) for one in reports), now=now)


def told(record: RunRecord, seen: Snapshot) -> dict[tuple[str, str | None], Phase]:
    phases = phases_of(replica(record), record, seen)
    assert [one.began_s for one in phases] == sorted(one.began_s for one in phases)
    return {(one.name, one.node): one for one in phases}


def spans(record: RunRecord, seen: Snapshot) -> dict[tuple[str, str | None], tuple]:
    return {key: (one.began_s, one.took_s) for key, one in told(record, seen).items()}


def test_every_phase_counts_from_the_command():
    found = spans(up(), world(node("h1", 0), node("h2", 1)))
    assert found == {
        ("command", None): (0.0, 1.0),
        ("allocation", None): (1.0, 1.0),
        ("preflight", None): (2.0, 3.0),
        ("park", "h1"): (2.5, 11.0),
        ("park", "h2"): (2.5, 11.0),
        ("engine", "h1"): (5.2, 8.8),
        ("engine", "h2"): (5.2, 8.8),
        ("first_token", "h1"): (14.0, 5.5),
    }


def test_it_says_what_ran_beside_what():
    found = told(up(), world(node("h1", 0), node("h2", 1)))
    assert found["park", "h1"].beside == ["preflight", "engine"]
    assert found["preflight", None].beside == ["park"]
    assert found["engine", "h2"].beside == ["park"]
    assert found["first_token", "h1"].beside == []
    assert found["allocation", None].beside == []


@pytest.mark.parametrize("behind_s", [3600.0, -3600.0])
def test_a_node_whose_clock_is_wrong_is_put_where_it_must_have_been(behind_s):
    right = spans(up(), world(node("h1", 0), node("h2", 1)))
    found = told(up(), world(node("h1", 0, behind_s), node("h2", 1)))
    for key, (began_s, took_s) in right.items():
        # As far as the order of events tells: between the order and the token is some slack.
        assert found[key].began_s == pytest.approx(began_s, abs=0.6)
        assert found[key].took_s == took_s
    assert found["engine", "h1"].clock_off_s == pytest.approx(behind_s, abs=0.6)
    assert found["engine", "h2"].clock_off_s == 0.0
    assert found["park", "h1"].beside == ["preflight", "engine"]


def test_a_follower_whose_clock_is_ahead_began_before_the_token_came():
    found = told(up(), world(node("h1", 0), node("h2", 1, behind_s=-3600.0)))
    one = found["engine", "h2"]
    assert one.began_s >= 5.0
    assert one.began_s + one.took_s <= 20.0


def test_what_goes_on_has_no_duration_yet():
    record = up(serving_at=None)
    leader = node("h1", 0, first_token_at=None)
    follower = node("h2", 1, started_at=None, parked=None)
    found = told(record, world(leader, follower, now=NOW + 16.0))
    assert (found["first_token", "h1"].began_s, found["first_token", "h1"].took_s) == (14.0, None)
    assert found["engine", "h2"].took_s is None
    assert found["engine", "h2"].beside == ["park", "first_token"]
    assert (found["park", "h2"].began_s, found["park", "h2"].took_s) == (25.0, None)


def test_before_ranks_are_given_an_earlier_generation_does_not_count():
    record = up(ranked_at=None, serving_at=None)
    found = spans(record, world(node("h1", 0), node("h2", 1), now=NOW + 3.0))
    assert set(found) == {
        *(("command", None), ("allocation", None), ("preflight", None)),
        *(("park", "h1"), ("park", "h2")),
    }
    assert found["preflight", None] == (2.0, None)


def test_nodes_that_are_waited_for_are_an_allocation_that_goes_on():
    record = up(running_at=None, agents_at=None, ranked_at=None, serving_at=None)
    assert spans(record, snapshot(now=NOW + 9.0)) == {
        ("command", None): (0.0, 1.0),
        ("allocation", None): (1.0, None),
    }


def test_a_later_generation_counts_from_when_it_was_wanted():
    ended = Incident(at=NOW - 1.0, code="engine", message="serve exited")
    found = spans(up(incidents=(ended,)), world(node("h1", 0), node("h2", 1)))
    assert found["allocation", None] == (0.0, 1.0)
    assert found["first_token", "h1"] == (13.0, 5.5)
    assert ("command", None) not in found


def test_a_process_that_was_parked_long_before_was_done_before():
    before = Parked(state="ready", since=NOW - 90.0, took_s=10.0)
    found = told(up(), world(node("h1", 0, parked=before), node("h2", 1)))
    assert (found["park", "h1"].began_s, found["park", "h1"].took_s) == (-100.0, 10.0)
    assert found["park", "h1"].beside == []


def test_a_replica_that_nobody_has_asked_nodes_for_has_no_phases():
    assert phases_of(replica(up(requested_at=None)), up(), snapshot()) == []


def test_up_names_what_took_the_time():
    phases = phases_of(replica(up()), up(), world(node("h1", 0), node("h2", 1)))
    replicas = [
        ReplicaStatus(
            name=name, generation=1, phase="serving", endpoint=None, nodes=[], phases=its
        )
        for name, its in (("r1", phases), ("r2", phases[:-1]))
    ]
    status = make_status(*replicas)
    assert timing_lines(status) == (
        "first token after 20 s\n"
        "phases: command 1.0 s, allocation 1.0 s, preflight 3.0 s, engine 8.8 s, "
        "first token 5.5 s; beside them: park 11.0 s"
    )
