"""Preflight of many hosts against `clush` starting the same probe, and what the checks cost.

    python benchmarks/preflight.py [--hosts 64] [--rounds 3] [--json]

Needs root: the testbed makes the hosts (real sshd on each), all on this machine, so that both
sides pay for the same probes on the same cores. Both fan out to 32 hosts at once. The cost of the
continuous checks is the CPU time of the passive level on a node of eight simulated GPUs, over the
period in which an agent repeats it.
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
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launcher.agent.checks import PASSIVE_EVERY_S
from launcher.backends.ssh_lines import INSTALL_FOLDER
from tests.cluster import bed, hardware

FAN_OUT = 32
LOOKS = 20


def by_launcher(spec: Path, state: Path) -> float:
    began = time.monotonic()
    subprocess.run(
        [
            str(Path(sys.executable).with_name("launcher")),
            *("preflight", "-f", str(spec), "--level", "passive", "--json"),
        ],
        env={**os.environ, "LAUNCHER_STATE_DIR": str(state)},
        check=True,
        capture_output=True,
    )
    return time.monotonic() - began


def by_clush(hosts: int) -> float:
    """The same program on the same hosts, its answers gathered here."""
    question = json.dumps({"level": "passive"})
    command = f"echo '{question}' | ~/{INSTALL_FOLDER}/venv/bin/python -m health.collect"
    began = time.monotonic()
    answer = subprocess.run(
        [
            str(Path(sys.executable).with_name("clush")),
            *("-w", f"h[1-{hosts}]", "-f", str(FAN_OUT)),
            *("-o", f"-F {ROOT}/.testbed/ssh_config", command),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    took = time.monotonic() - began
    assert answer.stdout.count('"version":1') == hosts, answer.stdout[-500:] + answer.stderr[-500:]
    return took


def continuous(folder: Path) -> dict[str, float]:
    """CPU seconds of one passive look on a node with everything, as an agent's child runs it."""
    for name in ("nvml", "infiniband", "pci", "nvme"):
        (folder / name).mkdir(parents=True)
    (folder / "kmsg").touch()
    hardware.play_tree(folder, "h100", "n1")
    child = subprocess.Popen(
        [sys.executable, "-m", "health.collect"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "LD_LIBRARY_PATH": hardware.library_path(),
            "LAUNCHER_TEST_NVML": str(folder / "nvml/state"),
        },
    )
    assert child.stdin
    assert child.stdout
    costs = []
    for _ in range(LOOKS):
        child.stdin.write(json.dumps({"kernel_log": str(folder / "kmsg")}) + "\n")
        child.stdin.flush()
        costs.append(json.loads(child.stdout.readline())["cpu_s"])
    child.stdin.close()
    child.wait()
    median = statistics.median(costs)
    return {
        "cpu_s_of_a_look": round(median, 4),
        "period_s": PASSIVE_EVERY_S,
        "percent_of_a_core": round(100 * median / PASSIVE_EVERY_S, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="launcher-bench-"))
    cost = continuous(folder / "hardware")
    bed.down()
    bed.up(arguments.hosts, with_slurm=False)
    try:
        spec = folder / "fleet.yaml"
        spec.write_text(
            f"name: bench\nmodel: org/model\nnodes: {arguments.hosts}\ngpus_per_node: 1\n"
            f"parallelism: {{pipeline: {arguments.hosts}}}\n"
            f"backend: {{ssh: {{inventory: {ROOT}/.testbed/inventory.yaml}}}}\n"
        )
        subprocess.run(
            [str(Path(sys.executable).with_name("launcher")), "bootstrap", "-f", str(spec)],
            check=True,
            capture_output=True,
        )
        figures: dict[str, list[float]] = {"clush_s": [], "launcher_s": []}
        for number in range(arguments.rounds + 1):
            for name, took in (
                ("clush_s", by_clush(arguments.hosts)),
                ("launcher_s", by_launcher(spec, folder / "state")),
            ):
                told = f"round {number}" if number else "warm-up"
                print(f"{told} {name} {took:.1f}", file=sys.stderr)
                if number:
                    figures[name].append(round(took, 2))
    finally:
        bed.down()
        shutil.rmtree(folder, ignore_errors=True)
    clush, ours = (statistics.median(figures[name]) for name in ("clush_s", "launcher_s"))
    document = {
        "benchmark": "preflight",
        "date": date.today().isoformat(),  # noqa: DTZ011
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "hosts": arguments.hosts,
        **figures,
        "ratio_of_medians": round(ours / clush, 3),
        "continuous": cost,
    }
    if arguments.json:
        print(json.dumps(document, indent=1))
    else:
        print(
            f"{arguments.hosts} hosts: clush {figures['clush_s']} s, launcher "
            f"{figures['launcher_s']} s, ratio of medians {document['ratio_of_medians']}"
        )
        print(
            f"continuous: {cost['cpu_s_of_a_look']} s CPU every {cost['period_s']:.0f} s, "
            f"{cost['percent_of_a_core']} % of a core"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
