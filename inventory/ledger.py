"""Cordons: which nodes take no new work, why, since when, by whom. Pure.

A quarantine is a cordon made by evidence; a passed preflight lifts it. A person's cordon only a
person lifts. The brake stops quarantines when many nodes fail the same check within minutes: that
is a bug in the check, a driver roll-out or a switch, not a fault of each node.
"""

from typing import Literal

from pydantic import Field

from inventory.model import Record

PASSED_VALID_S = 3600.0  # the quick level's validity
PASSED_KEPT = 200
BRAKE_WINDOW_S = 600.0
BRAKE_NODES = 3  # ours: with fewer it is still likely that each is broken by itself
BRAKE_SHARE = 0.5  # of the pool; NVSentinel stops at half of the nodes within five minutes


class Cordon(Record):
    """Why one node takes no new work. `check` is empty for a person's cordon."""

    node: str
    kind: Literal["manual", "quarantine"]
    reason: str
    at: float
    by: str
    check: str = ""
    device: str = ""
    advice: str = ""
    boot_id: str = ""


class Passed(Record):
    """A set of nodes (by boot: another boot voids it) that has shown that it can talk."""

    boots: dict[str, str]
    at: float


class Ledger(Record):
    """All cordons of one backend, by node, the quarantines of late for the brake, and the sets
    of nodes that passed a collective check of late."""

    version: int = 1
    cordons: dict[str, Cordon] = Field(default_factory=dict)
    recent: tuple[Cordon, ...] = ()
    passed: tuple[Passed, ...] = ()

    def with_cordon(self, cordon: Cordon) -> "Ledger":
        """A person's cordon is not replaced by a quarantine."""
        present = self.cordons.get(cordon.node)
        if present and present.kind == "manual" and cordon.kind == "quarantine":
            return self
        recent = tuple(c for c in self.recent if cordon.at - c.at < BRAKE_WINDOW_S)
        if cordon.kind == "quarantine":
            recent = (*recent, cordon)
        cordons = {**self.cordons, cordon.node: cordon}
        return self.model_copy(update={"cordons": cordons, "recent": recent})

    def with_passed(self, passed: Passed) -> "Ledger":
        kept = tuple(
            one
            for one in self.passed
            if passed.at - one.at < PASSED_VALID_S and one.boots.keys() != passed.boots.keys()
        )
        return self.model_copy(update={"passed": (*kept, passed)[-PASSED_KEPT:]})

    def has_passed(self, boots: dict[str, str], now: float) -> bool:
        """Whether exactly these nodes, in these boots, passed within the hour."""
        return any(
            one.boots == boots and 0 <= now - one.at < PASSED_VALID_S for one in self.passed
        )

    def without(self, node: str) -> "Ledger":
        cordons = {name: cordon for name, cordon in self.cordons.items() if name != node}
        return self.model_copy(update={"cordons": cordons})

    def brake(self, check: str, pool_size: int, now: float) -> str:
        """Why no further node may be quarantined for this check now; empty if it may."""
        same = {
            cordon.node
            for cordon in self.recent
            if cordon.check == check and now - cordon.at < BRAKE_WINDOW_S
        }
        limit = min(BRAKE_NODES, max(1, int(pool_size * BRAKE_SHARE)))
        if len(same) < limit:
            return ""
        return (
            f"{len(same)} nodes failed {check} within {BRAKE_WINDOW_S / 60:.0f} minutes "
            f"({', '.join(sorted(same))}): look at what they share before blaming another"
        )
