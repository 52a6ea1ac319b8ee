"""One round of the loop, the same for the controller and for the simulation. I/O by its parts.

observe → Snapshot → plan (pure) → check (pure) → journal → apply
"""

import logging
from collections.abc import Callable

from launcher.apply import Executor
from launcher.backends.base import Allocation
from launcher.check import lint
from launcher.observe import Observer
from launcher.planning import make_plan
from launcher.record import AllocationRecord, RunRecord
from launcher.snapshot import GatewayView, Snapshot
from launcher.steps import Context, Plan
from launcher.store import Store
from launcher.wish import Wish

log = logging.getLogger("launcher.loop")


class Loop:
    """Looks, plans, checks and acts; what it must remember is the executor's record."""

    def __init__(
        self,
        context: Context,
        observer: Observer,
        executor: Executor,
        store: Store,
        describe: Callable[[int, AllocationRecord], Allocation],
    ) -> None:
        self.context = context
        self._observer = observer
        self._executor = executor
        self._store = store
        self._describe = describe

    @property
    def record(self) -> RunRecord:
        return self._executor.record

    def look(self, wish: Wish, gateway: GatewayView) -> Snapshot:
        """What is, now."""
        record = self.record
        described = {
            name: self._describe(record.run, held) for name, held in record.allocations.items()
        }
        return self._observer.observe(
            record,
            described,
            "down" if record.closed else wish.desired,
            self._store.ledger(),
            gateway,
            wish.restarts,
            wish.drills,
        )

    def plan(self, snapshot: Snapshot) -> Plan:
        """What is to be done; nothing where the plan breaks a rule."""
        plan = make_plan(self.context, self.record, snapshot)
        problems = lint(self.context, self.record, plan, snapshot)
        if problems:
            self._store.note("refused", problems=problems)
            log.error("plan refused: %s", "; ".join(problems))
            plan = Plan(waiting_for=tuple(problems))
        return plan

    def apply(self, plan: Plan, snapshot: Snapshot) -> None:
        self._executor.apply(plan, snapshot.now)
