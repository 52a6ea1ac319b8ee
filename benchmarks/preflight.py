"""Preflight of many hosts against `clush` starting the same probe, and what the checks cost.

    python benchmarks/preflight.py [--hosts 64] [--rounds 3] [--json]

Needs root: the testbed makes the hosts (real sshd on each), all on this machine, so that both
sides pay for the same probes on the same cores. Both fan out to 32 hosts at once. The cost of the
continuous checks is the CPU time of the passive level on a node of eight simulated GPUs, over the
period in which an agent repeats it.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import LAUNCHER, ROOT, alternate, document, options, scratch, show
from launcher.agent.checks import PASSIVE_EVERY_S
from launcher.backends.ssh_lines import INSTALL_FOLDER
from tests.cluster import bed, hardware

FAN_OUT = 32
LOOKS = 20


def by_launcher(spec: Path, state: Path) -> dict[str, float]:
    began = time.monotonic()
    subprocess.run(
        [
            LAUNCHER,
            *("preflight", "-f", str(spec), "--level", "passive", "--json"),
        ],
        env={**os.environ, "LAUNCHER_STATE_DIR": str(state)},
        check=True,
        capture_output=True,
    )
    return {"launcher_s": round(time.monotonic() - began, 2)}


def by_clush(hosts: int) -> dict[str, float]:
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
    return {"clush_s": round(took, 2)}


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


def fan_out(hosts: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    bed.down()
    bed.up(hosts, with_slurm=False)
    try:
        spec = folder / "fleet.yaml"
        spec.write_text(
            f"name: bench\nmodel: org/model\nnodes: {hosts}\ngpus_per_node: 1\n"
            f"parallelism: {{pipeline: {hosts}}}\n"
            f"backend: {{ssh: {{inventory: {ROOT}/.testbed/inventory.yaml}}}}\n"
        )
        command = [LAUNCHER, "bootstrap", "-f", str(spec)]
        subprocess.run(command, check=True, capture_output=True)
        ours = functools.partial(by_launcher, spec, folder / "state")
        return alternate([functools.partial(by_clush, hosts), ours], rounds)
    finally:
        bed.down()


def main() -> int:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--hosts", type=int, default=64)
    arguments = parser.parse_args()
    with scratch() as folder:
        cost = continuous(folder / "hardware")
        figures = fan_out(arguments.hosts, arguments.rounds, folder)
    clush, ours = (statistics.median(figures[name]) for name in ("clush_s", "launcher_s"))
    ratio = round(ours / clush, 3)
    found = {**figures, "ratio_of_medians": ratio, "continuous": cost}
    told = (
        f"{arguments.hosts} hosts: clush {figures['clush_s']} s, launcher "
        f"{figures['launcher_s']} s, ratio of medians {ratio}\n"
        f"continuous: {cost['cpu_s_of_a_look']} s CPU every {cost['period_s']:.0f} s, "
        f"{cost['percent_of_a_core']} % of a core"
    )
    show(document("preflight", hosts=arguments.hosts, **found), told, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
