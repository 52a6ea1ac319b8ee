"""`python -m tests.simulation --seeds A-B`: run them on all cores; a failing one is told whole."""

import argparse
import logging
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.run import Outcome, run_seed

HISTORY_LINES = 120


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.simulation", description=__doc__)
    parser.add_argument("--seeds", required=True, help="A-B, or one seed")
    parser.add_argument("--history", action="store_true", help="print what happened")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    logging.disable(logging.CRITICAL)
    began = time.monotonic()
    outcomes = run_all(seeds)
    broken = [one for one in outcomes if one.broken]
    for one in broken[:5]:
        print(f"--- seed {one.seed}: {one.broken}")
        print("\n".join(one.history[-HISTORY_LINES:] if not arguments.history else one.history))
        print(f"repeat: python -m tests.simulation --seeds {one.seed}")
    rounds = sum(one.rounds for one in outcomes)
    print(
        f"{len(outcomes)} seeds ({arguments.seeds}), {rounds} rounds, "
        f"{sum(one.restarts for one in outcomes)} controllers killed, "
        f"{sum(one.given_up for one in outcomes)} replicas given up, {len(broken)} broken, "
        f"{time.monotonic() - began:.1f} s"
    )
    if broken:
        print("broken seeds:", *[one.seed for one in broken][:50])
    return 1 if broken else 0


def run_all(seeds: range) -> list[Outcome]:
    if len(seeds) == 1:
        return [run_seed(seeds[0])]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run_seed, seeds, chunksize=8))


if __name__ == "__main__":
    sys.exit(main())
