"""Two thousand seeds hold every rule; bugs put in by hand are found."""

import logging

import pytest

from tests.simulation.__main__ import run_all
from tests.simulation.bugs import BUGS, first_seed
from tests.simulation.run import run_seed

SEEDS = range(1, 2001)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_no_seed_breaks_a_rule():
    outcomes = run_all(SEEDS)
    broken = {one.seed: one.broken[:300] for one in outcomes if one.broken}
    assert not broken, "repeat one with: python -m tests.simulation --seeds SEED"
    assert sum(one.restarts for one in outcomes) > 100, "controllers were killed on the way"
    given_up = sum(one.given_up for one in outcomes)
    assert given_up < len(SEEDS) / 10, "giving up must stay the exception"


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_bug_put_in_by_hand_is_found(bug):
    """By the seed that is noted; `python -m tests.simulation.bugs` finds them anew."""
    assert not run_seed(bug.seed).broken
    assert first_seed(bug, range(bug.seed, bug.seed + 1)), bug.story
