"""An unfit node is swapped for another one, or the fleet is refused; nothing in between."""

from dataclasses import replace

import pytest

from health.report import Finding, NodeFacts
from inventory.ledger import Cordon, Ledger
from launcher.apply import remember
from launcher.check import lint
from launcher.planning import make_plan, new_record
from launcher.steps import Allocate, End, Fail, Plan, Quarantine, Release
from tests.launcher.worlds import NOW, VERSIONS, checked, make_context, report, snapshot, view

BROKEN = NodeFacts(
    findings=(
        Finding(
            check="gpu.remap_failed",
            verdict="unhealthy",
            message="row remap failed",
            device="GPU 3",
            advice="inspect or RMA",
        ),
    ),
    traits=VERSIONS,
)


def context(pool=("h1", "h2", "h3"), **more):
    return replace(make_context(pool=pool), known=tuple(pool), **more)


def unfit(ledger=None):
    seen = snapshot(view("h1", report("h1")), view("h2", report("h2", facts=BROKEN)))
    return replace(seen, ledger=ledger or Ledger())


def swapped(ground):
    """The record after an unfit h2 was met, and the ledger with its cordon."""
    record = checked(ground)
    made = make_plan(ground, record, unfit())
    assert lint(ground, record, made, unfit()) == []
    quarantine = made.steps[0]
    assert isinstance(quarantine, Quarantine)
    assert quarantine.cordon.node == "h2"
    assert quarantine.cordon.reason == "GPU 3: row remap failed"
    for step in made.steps:
        record = remember(record, step, NOW)
    assert record.replicas["r1"].story == ("h2 swapped out by preflight: GPU 3: row remap failed",)
    return record, made, Ledger().with_cordon(quarantine.cordon)


def test_an_unfit_node_is_quarantined_and_another_takes_its_place():
    ground = context()
    record, _, ledger = swapped(ground)
    assert record.replicas["r1"].nodes == ("h1",), "the healthy one is kept"
    seen = replace(unfit(), ledger=ledger)
    steps = make_plan(ground, record, seen).steps
    (allocate,) = [step for step in steps if isinstance(step, Allocate)]
    assert (allocate.allocation, allocate.nodes) == ("r1.a2", ("h3",))
    (release,) = [step for step in steps if isinstance(step, Release)] or [None]
    assert release is None, "its agent lives: it is told to stop before its node is swept"


def test_slurm_gives_the_whole_job_back_while_nothing_has_served_yet():
    ground = replace(context(), pool=())
    record, made, ledger = swapped(ground)
    assert any(isinstance(step, End) for step in made.steps)
    assert record.replicas["r1"].nodes == ()
    seen = replace(unfit(), ledger=ledger)
    steps = make_plan(ground, record, seen).steps
    (allocate,) = [step for step in steps if isinstance(step, Allocate)]
    assert (allocate.allocation, allocate.size, allocate.exclude) == ("r1.a2", 2, ("h2",))


def test_slurm_is_asked_for_nodes_other_than_the_cordoned_ones():
    ground = replace(context(), pool=())
    cordon = Cordon(node="h2", kind="manual", reason="x", at=NOW, by="me")
    seen = replace(snapshot(), ledger=Ledger().with_cordon(cordon))
    (allocate,) = make_plan(ground, new_record(ground, 1, None, NOW), seen).steps
    assert (allocate.nodes, allocate.exclude) == ((), ("h2",))


def quarantined(*nodes):
    ledger = Ledger()
    for node in nodes:
        ledger = ledger.with_cordon(
            Cordon(
                node=node, kind="quarantine", reason="x", at=NOW, by="t", check="gpu.remap_failed"
            )
        )
    return ledger


@pytest.mark.parametrize(
    ("ground", "ledger", "swaps", "why"),
    [
        (context(pool=("h1", "h2")), None, 0, "No other node is free"),
        (
            context(),
            Ledger().with_cordon(Cordon(node="h3", kind="manual", reason="x", at=NOW, by="me")),
            0,
            "No other node is free",
        ),
        (context(), None, 3, "3 swaps were tried"),
        (context(shares_machine=True), None, 0, "This machine plays all nodes"),
        (
            context(pool=tuple(f"h{n}" for n in range(1, 9))),
            quarantined("h4", "h5", "h6"),
            0,
            "No more automatic quarantine",
        ),
    ],
)
def test_where_no_node_can_be_swapped_the_fleet_is_refused_with_the_reason(
    ground, ledger, swaps, why
):
    record = checked(ground)
    replica = record.replicas["r1"].model_copy(update={"swaps": swaps})
    record = record.model_copy(update={"replicas": {"r1": replica}})
    (fail,) = make_plan(ground, record, unfit(ledger)).steps
    assert isinstance(fail, Fail)
    assert fail.failure.exit_code == 3
    assert fail.failure.where == "node h2, check gpu.remap_failed"
    assert why in fail.failure.hint


def test_two_nodes_that_differ_are_refused_for_nobody_can_be_blamed():
    ground = context()
    other = NodeFacts(traits={**VERSIONS, "vllm": "0.31.0"})
    seen = snapshot(view("h1", report("h1")), view("h2", report("h2", facts=other)))
    (fail,) = make_plan(ground, checked(ground), seen).steps
    assert "vllm differs" in fail.failure.message
    assert "No single node is to blame" in fail.failure.hint


def test_the_linter_knows_cordons():
    ground = context()
    cordon = Cordon(node="h2", kind="manual", reason="x", at=NOW, by="me")
    bad = Plan(steps=(Allocate("r1", 2, 1, ("h2",)),))
    record = new_record(ground, 1, None, NOW)
    (problem,) = lint(ground, record, bad, unfit(Ledger().with_cordon(cordon)))
    assert "h2, which is cordoned" in problem
