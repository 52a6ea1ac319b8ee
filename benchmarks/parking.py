"""What it costs an engine under load that its nodes park the next one beside it.

    python benchmarks/parking.py [--rounds 3] [--executor ray|mp|both] [--json]

A fleet of two nodes on this machine answers one client that asks again as soon as it is answered.
Time of an answer (16 tokens), median and 95th percentile of each round, in milliseconds:

    off        `warm: off`: nothing is parked
    importing  from the first token on, until all nodes are parked: imports at the lowest priority
    ready      afterwards

Beside that what one parked process takes: its share of memory (PSS), and the CPU time of its
imports. Somebody asks for the status each second, in all three.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import alternate, document, ratios, scratch, show, tables
from benchmarks.engines import Fleet, engine_options, executors
from benchmarks.load import Load
from launcher.agent.parked import WAITING

WATCHED_S = 20.0
RATIOS: dict[tuple[str, str], float | None] = {
    (f"{state}_{figure}_ms", f"off_{figure}_ms"): None
    for state in ("importing", "ready")
    for figure in ("p50", "p95")
}


def off(executor: str, state: Path) -> dict[str, float]:
    fleet = Fleet("tiny", state, executor, start="fork", warm="off")
    with fleet.running() as (told, _):
        return answers_of("off", told, functools.partial(watch, fleet))


def on(executor: str, state: Path) -> dict[str, float]:
    fleet = Fleet("tiny", state, executor, start="fork", warm="auto")
    with fleet.running() as (told, _):
        return {
            **answers_of("importing", told, fleet.wait_until_parked),
            **answers_of("ready", told, functools.partial(watch, fleet)),
            **cost(),
        }


def watch(fleet: Fleet) -> None:
    until = time.monotonic() + WATCHED_S
    while time.monotonic() < until:
        fleet.status()
        time.sleep(1.0)


def answers_of(what: str, told: dict[str, Any], meanwhile: Callable[[], None]) -> dict[str, float]:
    with Load(told, clients=1) as load:
        meanwhile()
    if load.failed:
        raise SystemExit(f"{what}: {load.failed} requests failed")
    took_ms = [took_s * 1000 for took_s in load.took_s]
    p95 = statistics.quantiles(took_ms, n=20)[-1]
    figures = {"p50": statistics.median(took_ms), "p95": p95}
    return {f"{what}_{name}_ms": round(value, 1) for name, value in figures.items()}


def cost() -> dict[str, float]:
    """Of one parked process of this machine, on average."""
    parked = [one for one in psutil.process_iter(["name"]) if one.info["name"] == WAITING]
    memory = statistics.mean(one.memory_full_info().pss for one in parked)
    spent = statistics.mean(sum(one.cpu_times()[:2]) for one in parked)
    return {"parked_mib": round(memory / 2**20), "imports_cpu_s": round(spent, 1)}


def main() -> int:
    chosen = engine_options(__doc__).parse_args()
    results = {}
    with scratch("lb-state-") as state:
        for executor in executors(chosen.executor):
            columns = [functools.partial(one, executor, state) for one in (off, on)]
            figures = alternate(columns, chosen.rounds, executor)
            results[executor] = {**figures, "ratios": ratios(figures, RATIOS)}
    show(document("parking", results=results), tables(results), as_json=chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
