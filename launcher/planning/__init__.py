"""The planner: from record and snapshot to the next steps, and what they wait for. Pure.

It is level-triggered: called each round with what is, it returns what is missing. Steps are so
exact that the executor has no choices. The plan of a fleet that is as it should be is empty.

    plan.py        one round: allocations, replicas, spares, in this order
    gather.py      a replica's seats: survivors first, then spares, then nodes asked for
    bringup.py     preflight, addresses, ranks, the proving token
    lifetime.py    whether the fleet has lived long enough
    unfit.py       a node that may not serve: swapped, or the fleet is refused
    ending.py      engines are told to stop: for the next generation, or for good
    holdings.py    allocations: settled, kept while they are of use, given back
    spares.py      as many as the spec wants
    drills.py      a fault on purpose, once
    draft.py       what the parts of one round share
"""

from launcher.planning.plan import make_plan, new_record

__all__ = ["make_plan", "new_record"]
