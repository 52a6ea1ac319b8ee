"""How many spares there are, and that one whose walltime ends has a successor in time."""

from dataclasses import replace

import pytest

from launcher.documents import Assignment
from launcher.planning import make_plan
from launcher.steps import Allocate, End, Sit
from tests.launcher.worlds import (
    NOW,
    held,
    make_context,
    member,
    ranked,
    report,
    running,
    seats,
    snapshot,
    view,
)

WALLTIME_S = 4 * 3600.0


IDLE = {"revision": 1, "goal": "idle"}


def planned(*, left_s=None, successor=None, spares=1, lost=False):
    """A Slurm fleet on h1 and h2 with a spare on h3, whose job ends in left_s."""
    context = make_context(pool=(), spares=spares)
    idle = {node: Assignment(**IDLE) for node in ("h3", "h4")}
    began = NOW - WALLTIME_S + (left_s or WALLTIME_S)
    jobs = [held("s1.a1", ("h3",), running_at=began, assignments={"h3": idle["h3"]})]
    views = {"s1.a1": running(view("h3", report("h3", "warm")))}
    if left_s is not None:
        views["s1.a1"] = replace(views["s1.a1"], ends_at=NOW + left_s)
    if successor is not None:
        jobs.append(held("s2.a1", ("h4",), assignments={"h4": idle["h4"]}))
        views["s2.a1"] = running(view("h4", report("h4", "warm")))
        views["s2.a1"] = replace(views["s2.a1"], ends_at=NOW + WALLTIME_S)
        if successor == "pending":
            jobs[-1] = held("s2.a1", (), size=1, running_at=None)
            views["s2.a1"] = replace(views["s2.a1"], state="pending", nodes=(), agents={})
    record = ranked(context, serving_at=NOW, served=True)
    record = record.model_copy(
        update={"allocations": {**record.allocations, **{one.name: one for one in jobs}}}
    )
    mine = [
        view("h1", report("h1", "serving", member=member(0, True), assignment_revision=2)),
        view("h2", report("h2", "serving", member=member(1), assignment_revision=2)),
    ]
    if lost:
        left = {"seats": seats("h1"), "ranked_at": None, "serving_at": None}
        rest = record.allocations["r1.a1"].model_copy(
            update={"nodes": ("h1",), "assignments": {"h1": idle["h3"]}}
        )
        record = record.model_copy(
            update={
                "replicas": {"r1": record.replicas["r1"].model_copy(update=left)},
                "allocations": {**record.allocations, "r1.a1": rest},
            }
        )
        mine = [view("h1", report("h1", "warm"))]
    return make_plan(context, record, snapshot(*mine, more=views)).steps


def kinds(steps, kind) -> list[str]:
    return [getattr(one, "allocation", "") for one in steps if isinstance(one, kind)]


@pytest.mark.parametrize(
    ("left_s", "successor", "asked", "ended"),
    [
        (None, None, [], []),  # nobody knows of an end
        (1900.0, None, [], []),
        (1700.0, None, ["s2.a1"], []),
        (1700.0, "pending", [], []),  # it stays until its successor is warm
        (1700.0, "warm", [], ["s1.a1"]),
        (60.0, "pending", [], []),
        (1900.0, "warm", [], ["s2.a1"]),  # one too many: the newest goes
    ],
)
def test_a_spare_whose_walltime_ends_soon_has_a_successor_first(left_s, successor, asked, ended):
    steps = planned(left_s=left_s, successor=successor)
    assert (kinds(steps, Allocate), kinds(steps, End)) == (asked, ended)


def test_of_two_spares_the_one_that_lasts_takes_the_place():
    steps = planned(left_s=600.0, successor="warm", lost=True)
    sits = next(one for one in steps if isinstance(one, Sit))
    assert [seat.node for seat in sits.seats] == ["h1", "h4"]


def test_one_that_ends_soon_is_better_than_none():
    steps = planned(left_s=600.0, lost=True)
    sits = next(one for one in steps if isinstance(one, Sit))
    assert [seat.node for seat in sits.seats] == ["h1", "h3"]


@pytest.mark.parametrize(("serves", "asked"), [(None, 0), (NOW, 1)])
def test_on_one_machine_spares_come_when_the_replicas_serve(serves, asked):
    """Their imports would take the cores of the engine that starts."""
    context = replace(make_context(pool=(), spares=1), shares_machine=True)
    record = ranked(context, serving_at=serves, served=bool(serves))
    phase = "serving" if serves else "joining"
    views = [
        view(node, report(node, phase, member=member(rank, token=bool(serves))))
        for rank, node in enumerate(("h1", "h2"))
    ]
    made = make_plan(context, record, snapshot(*views))
    assert len([step for step in made.steps if isinstance(step, Allocate)]) == asked
