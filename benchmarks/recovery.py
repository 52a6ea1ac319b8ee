"""Time from the detection of a lost node to serving again, against a cold start by hand.

    python benchmarks/recovery.py [--rounds 3] [--executor ray|mp|both] [--json]

On this machine, in turn in every round:

    recovered_s  a fleet (two nodes, one spare, all parked) loses its follower's node by `launcher
                 drill node`: from the verdict to the next generation's first token. On one machine
                 the next spare comes only when that serves, so its imports are not beside it.
    cold_s       the same engine is started by hand with nothing there, to its first token; stock
                 vLLM, which spawns its processes on the CPU
    cold_fork_s  the same with the plug-in of examples/cpu_engine, which forks, as the fleet does
"""

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import alternate, document, ratios, say, scratch, show, tables
from benchmarks.engines import Fleet, by_hand, engine_options, executors

RATIOS = {("recovered_s", "cold_s"): 0.25, ("recovered_s", "cold_fork_s"): None}


def recovered(executor: str, state: Path) -> dict[str, float]:
    fleet = Fleet("tiny", state, executor, start="fork", warm="auto", spares=1)
    with fleet.running():
        fleet.wait_until_parked()
        told = fleet.document("drill", "node", "--yes", "--fleet", fleet.name)
        say(f"  started again: {fleet.how_started()}")
        if told["generation"]["after"] != told["generation"]["before"] + 1:
            raise SystemExit(f"it did not come back at once: {told['generation']}")
        return {"recovered_s": round(told["serve_s"] - told["detect_s"], 1)}


def cold(executor: str) -> dict[str, float]:
    return {"cold_s": by_hand(executor, "spawn")}


def cold_fork(executor: str) -> dict[str, float]:
    return {"cold_fork_s": by_hand(executor, "fork")}


def measured(executor: str, state: Path, rounds: int) -> dict[str, Any]:
    columns = [
        functools.partial(recovered, executor, state),
        functools.partial(cold, executor),
        functools.partial(cold_fork, executor),
    ]
    figures = alternate(columns, rounds, executor)
    return {**figures, "ratios": ratios(figures, RATIOS)}


def main() -> int:
    chosen = engine_options(__doc__).parse_args()
    with scratch("lb-state-") as state:
        results = {
            executor: measured(executor, state, chosen.rounds)
            for executor in executors(chosen.executor)
        }
    show(document("recovery", results=results), tables(results), as_json=chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
