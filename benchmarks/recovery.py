"""Time from the detection of a lost node to serving again, against a cold start by hand.

    python benchmarks/recovery.py [--rounds 3] [--executor ray|mp|both] [--fork] [--json]

On this machine, alternating, under the same load: a fleet of two nodes (`steady`) answers two
clients without a pause. Beside it either a second fleet (two nodes, one spare) loses its
follower's node by `launcher drill node`: the time from the controller's verdict to the next
generation's first token counts; or the same engine is started by hand with nothing there
(benchmarks/bringup.py: ray start, vllm serve): the time to its first token counts.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from datetime import date
from pathlib import Path
from typing import Any

from bringup import ENGINE, MODEL, by_hand

# vLLM on the CPU binds each engine's thread to the same first core, where the one under load
# starves the one that starts; a GPU node has no such thing.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
LAUNCHER = str(Path(sys.executable).with_name("launcher"))
CLIENTS = 2
TOKENS = 16
WARM_WITHIN_S = 240


class Fleet:
    """One fleet of two nodes on this machine, in a state folder of the benchmark's own."""

    def __init__(self, name: str, state: Path, executor: str, start: str, spares: int) -> None:
        self.name = name
        self._environment = {**os.environ, "LAUNCHER_STATE_DIR": str(state)}
        self._spec = state / f"{name}.yaml"
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "CPU_ENGINE_START_METHOD": start}
        self._spec.write_text(
            f"name: {name}\nmodel: {MODEL}\nnodes: 2\nspares: {spares}\ngpus_per_node: 1\n"
            f"parallelism: {{pipeline: 2}}\nexecutor: {executor}\n"
            f"runtime: {{venv: {ENGINE.parent}}}\n"
            f"env: {json.dumps({**UNBOUND, **environment})}\n"
            "engine: {args: {enforce-eager: true, dtype: float32, max-model-len: 512}}\n"
        )

    def run(self, *words: str) -> dict[str, Any]:
        result = subprocess.run(
            [LAUNCHER, *words, "--json"],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise SystemExit(f"launcher {' '.join(words)}: {result.stderr}{result.stdout}")
        return json.loads(result.stdout)

    def up(self) -> dict[str, Any]:
        return self.run("up", "-f", str(self._spec))

    def wait_until_warm(self) -> None:
        """The spare is there, and no node is still parking its next engine process."""
        tick = threading.Event()
        for _ in range(WARM_WITHIN_S):
            status = self.status()
            nodes = [*status["replicas"][0]["nodes"], *status["spares"]]
            parked = [node["parked"] for node in nodes]
            over = all(not one or one["state"] == "ready" or one["reason"] for one in parked)
            if over and any(spare["phase"] == "warm" for spare in status["spares"]):
                self.parked = [one and f"{one['state']} {one['reason']}" for one in parked]
                return
            tick.wait(1.0)
        raise SystemExit(f"{self.name} is not warm after {WARM_WITHIN_S} s")

    def status(self) -> dict[str, Any]:
        return self.run("status", "--fleet", self.name)

    def lose_the_follower(self) -> float:
        """Seconds from the verdict to serving again."""
        told = self.run("drill", "node", "--yes", "--fleet", self.name)
        if told["generation"]["after"] != told["generation"]["before"] + 1:
            raise SystemExit(f"it did not come back at once: {told['generation']}")
        return float(told["serve_s"] - told["detect_s"])

    def down(self) -> None:
        self.run("down", "--fleet", self.name)


class Load:
    """Clients that ask again as soon as they are answered."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._url = f"{document['endpoint']}/completions"
        self._key = Path(document["api_key_file"]).read_text().strip()
        self._model = document["fleet"]
        self._enough = threading.Event()
        self.answered = 0
        self.failed = 0
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        order = {"model": self._model, "prompt": "Hello", "max_tokens": TOKENS}
        request = urllib.request.Request(
            self._url,
            json.dumps({**order, "ignore_eos": True}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        while not self._enough.is_set():
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    answer.read()
                self.answered += 1
            except (OSError, urllib.error.URLError):
                self.failed += 1


def recovered(state: Path, executor: str, start: str) -> float:
    fleet = Fleet("subject", state, executor, start, spares=1)
    fleet.up()
    try:
        fleet.wait_until_warm()
        print(f"parked: {fleet.parked}", file=sys.stderr)
        return fleet.lose_the_follower()
    finally:
        fleet.down()


def cold(executor: str, start: str) -> float:
    scratch = Path(tempfile.mkdtemp(prefix="lb-", dir="/tmp"))
    try:
        return by_hand(executor, start, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def measure(state: Path, executor: str, start: str, rounds: int) -> dict[str, Any]:
    steady = Fleet("steady", state, executor, start, spares=0)
    load = Load(steady.up())
    figures: dict[str, list[float]] = {"recovered_s": [], "cold_s": []}
    try:
        for number in range(rounds):
            figures["recovered_s"].append(round(recovered(state, executor, start), 1))
            figures["cold_s"].append(round(cold(executor, start), 1))
            told = {name: values[-1] for name, values in figures.items()}
            print(f"{executor} round {number + 1} {told}", file=sys.stderr)
    finally:
        load.stop()
        steady.down()
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {
        **figures,
        "ratio_of_medians": round(medians["recovered_s"] / medians["cold_s"], 3),
        "load": {"clients": CLIENTS, "answered": load.answered, "failed": load.failed},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--executor", choices=["ray", "mp", "both"], default="both")
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    start = "fork" if arguments.fork else "spawn"
    executors = ["ray", "mp"] if arguments.executor == "both" else [arguments.executor]
    os.environ.update(UNBOUND)  # for the start by hand
    state = Path(tempfile.mkdtemp(prefix="lb-state-", dir="/tmp"))
    try:
        results = {one: measure(state, one, start, arguments.rounds) for one in executors}
    finally:
        shutil.rmtree(state, ignore_errors=True)
    document = {
        "benchmark": "recovery",
        "date": date.today().isoformat(),  # noqa: DTZ011
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "start_method": start,
        "results": results,
    }
    if arguments.json:
        print(json.dumps(document, indent=1))
        return 0
    for executor, row in results.items():
        print(
            f"{executor}: detection to serving {row['recovered_s']} s, cold start by hand "
            f"{row['cold_s']} s, ratio of medians {row['ratio_of_medians']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
