"""Bugs put in by hand, to see that the simulation finds them: `python -m tests.simulation.bugs`.

Each replaces one decision of the planner or executor by a wrong one that looks harmless. What
`patch` does here is to put the bug in; nothing is mocked.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from unittest.mock import patch

from inventory.ledger import Ledger
from launcher import apply, verdicts
from launcher.planning import bringup, draft, holdings
from tests.simulation.run import run_seed

SEEDS_MAX = 1500


@dataclass(frozen=True)
class Bug:
    """`put_in` is undone when its block is left. seed: the first that finds it."""

    name: str
    story: str
    put_in: Callable[[], AbstractContextManager[object]]
    seed: int


def _asked_before_it_was() -> AbstractContextManager[object]:
    real = apply._with_new_allocation

    def wrong(record, step, now):
        record = real(record, step, now)
        held = record.allocations[step.allocation].model_copy(update={"asked": True})
        return apply.with_allocation(record, held)

    return patch.object(apply, "_with_new_allocation", wrong)


def _free_with_cordons() -> AbstractContextManager[object]:
    def wrong(self):
        held = {n for a in self.record.allocations.values() if not a.released for n in a.nodes}
        return dict.fromkeys(node for node in self.context.pool if node not in held)

    prop = cached_property(wrong)
    prop.__set_name__(draft.Draft, "_free")
    return patch.object(draft.Draft, "_free", prop)


def _free_with_held() -> AbstractContextManager[object]:
    def wrong(self):
        barred = self.snapshot.ledger.cordons.keys()
        return dict.fromkeys(node for node in self.context.pool if node not in barred)

    prop = cached_property(wrong)
    prop.__set_name__(draft.Draft, "_free")
    return patch.object(draft.Draft, "_free", prop)


def _whole_instead_of_part() -> AbstractContextManager[object]:
    real = apply.Executor._act

    def wrong(self, step):
        real(self, replace(step, whole=True) if isinstance(step, apply.Release) else step)

    return patch.object(apply.Executor, "_act", wrong)


def _same_generation() -> AbstractContextManager[object]:
    real = bringup.Note

    def wrong(about, changes):
        return real(about, {k: v for k, v in changes.items() if k != "generation"})

    return patch.object(bringup, "Note", wrong)


def _orders_forgotten() -> AbstractContextManager[object]:
    real = apply.Executor.apply

    def wrong(self, made, now):
        acted = self._act

        def act(step):
            before = self.record
            try:
                acted(step)
            except apply.FleetError:
                if isinstance(step, apply.Assign):
                    held = before.allocations[step.seat.allocation]
                    rest = {n: a for n, a in held.assignments.items() if n != step.seat.node}
                    self._save(
                        apply.with_allocation(
                            before, held.model_copy(update={"assignments": rest})
                        )
                    )
                raise

        with patch.object(self, "_act", act):
            real(self, made, now)

    return patch.object(apply.Executor, "apply", wrong)


BUGS = (
    Bug(
        "held nodes are free",
        "a node that an allocation still holds is asked for again",
        _free_with_held,
        7,
    ),
    Bug(
        "orders are told once",
        "an assignment whose write was lost is never written again",
        lambda: patch.object(holdings, "remind", lambda _: None),
        7,
    ),
    Bug(
        "asked before it was",
        "the record says that nodes were asked for before they are; a kill in between loses them",
        _asked_before_it_was,
        123,
    ),
    Bug(
        "orders are forgotten when they fail",
        "an order whose answer was lost is struck out; the next has a revision that was used",
        _orders_forgotten,
        16,
    ),
    Bug("cordons are overlooked", "cordoned nodes count as free", _free_with_cordons, 31),
    Bug(
        "the whole for a part",
        "one dead node of an allocation gives all of its nodes back",
        _whole_instead_of_part,
        8,
    ),
    Bug(
        "the generation does not grow",
        "the next engine has the last one's number: its evidence is taken for new",
        _same_generation,
        452,
    ),
    Bug(
        "impatience",
        "a node counts as lost after one missed heartbeat",
        lambda: patch.multiple(verdicts, HEARTBEAT_LOST_S=-1.0, BEAT_LOST_WITH_HEARTBEAT_S=-1.0),
        1,
    ),
    Bug(
        "the brake is off",
        "every node that fails the same check is quarantined",
        lambda: patch.object(Ledger, "brake", lambda *_: ""),
        148,
    ),
    Bug(
        "spares are dismissed",
        "an agent that serves nobody is told to end",
        lambda: patch.object(holdings, "_keep", lambda *_: False),
        1,
    ),
    Bug(
        "the lost keep their seats",
        "who cannot be seen is waited for instead of replaced",
        lambda: patch.multiple(draft, is_lost=lambda _: False, is_dead=lambda _: False),
        42,
    ),
)


def first_seed(bug: Bug, seeds: range) -> tuple[int, str] | None:
    """The first seed that finds it, and the rule that broke."""
    with bug.put_in():
        for seed in seeds:
            outcome = run_seed(seed)
            if outcome.broken:
                return seed, outcome.broken.strip().splitlines()[-1][:100]
    return None


def main() -> int:
    logging.disable(logging.CRITICAL)
    missed = 0
    for bug in BUGS:
        found = first_seed(bug, range(1, SEEDS_MAX + 1))
        missed += found is None
        told = f"seed {found[0]}: {found[1]}" if found else f"NOT FOUND in {SEEDS_MAX} seeds"
        print(f"{bug.name:36} {told}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
