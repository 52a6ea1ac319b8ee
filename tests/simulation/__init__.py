"""The real loop, planner, linter and executor against a simulated world, from one seed.

    python -m tests.simulation --seeds 1-2000

Simulated are the outside only: nodes, links, agents, engines, Slurm, the disk. Time is the
world's. What must never happen is checked all the time (invariants.py); after the last fault the
fleet must come to rest as the spec wants it.
"""
