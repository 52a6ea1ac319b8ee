"""Time from command to first token: by hand (ray start, vllm serve, curl) and by `launcher`.

    python benchmarks/bringup.py [--rounds 3] [--executor ray|mp|both] [--only COLUMN ...] [--json]

Two nodes on this machine, the same engine, model and arguments, each in turn in every round:

    by_hand_s       what a careful person types; stock vLLM, which spawns its processes on the CPU
    by_hand_fork_s  the same with the plug-in of examples/cpu_engine, which forks them
    off_s           `launcher up` with `warm: off`, spawn
    first_s         `launcher up` with `warm: auto`, fork; nothing runs before
    warm_s          `launcher restart` of that fleet, whose nodes all say that they are parked

warm_s goes from the command to the first token of the next generation through the address of the
fleet, so the end of the old engine is in it; warm_without_end_s leaves that out. Where ours park
they fork (as vLLM on GPUs does by itself): what parking alone saves is in the ratios to
by_hand_fork_s.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import alternate, document, ratios, say, scratch, show, tables
from benchmarks.engines import Fleet, by_hand, engine_options, executors

COLUMNS = ("by_hand", "by_hand_fork", "off", "on")
RATIOS = {
    ("off_s", "by_hand_s"): 1.10,
    ("first_s", "by_hand_s"): 0.6,
    ("warm_s", "by_hand_s"): 0.25,
    ("warm_without_end_s", "by_hand_s"): None,
    ("first_s", "by_hand_fork_s"): None,
    ("warm_s", "by_hand_fork_s"): None,
}


def measured(column: str, executor: str, state: Path) -> dict[str, float]:
    match column:
        case "by_hand":
            return {"by_hand_s": by_hand(executor, "spawn")}
        case "by_hand_fork":
            return {"by_hand_fork_s": by_hand(executor, "fork")}
        case "off":
            with Fleet("tiny", state, executor, start="spawn", warm="off").running() as (
                _,
                took_s,
            ):
                return {"off_s": took_s}
        case _:
            return on(Fleet("tiny", state, executor, start="fork", warm="auto"))


def on(fleet: Fleet) -> dict[str, float]:
    with fleet.running() as (_, first_s):
        say(f"  first start: {fleet.how_started()}")
        fleet.wait_until_parked()
        warm_s, end_s = fleet.restarted()
        say(f"  warm start: {fleet.how_started()}")
        left_s = round(warm_s - end_s, 1)
        return {"first_s": first_s, "warm_s": warm_s, "warm_without_end_s": left_s}


def arguments() -> argparse.Namespace:
    parser = engine_options(__doc__)
    help_ = "figures to measure; on: first_s and warm_s"
    parser.add_argument("--only", nargs="+", choices=COLUMNS, default=COLUMNS, help=help_)
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    results = {}
    with scratch("lb-state-") as state:
        for executor in executors(chosen.executor):
            columns = [functools.partial(measured, c, executor, state) for c in chosen.only]
            figures = alternate(columns, chosen.rounds, executor)
            results[executor] = {**figures, "ratios": ratios(figures, RATIOS)}
    show(document("bringup", results=results), tables(results), as_json=chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
