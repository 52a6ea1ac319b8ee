"""Inside a Slurm job: `python -m launcher.supervisor --base DIR`, exec'ed by the batch script.

Starts one agent on each node, each in a single-node step of its own: a step that spans a dead node
is killed with it, single steps live on. Obeys Slurm's signals and leaves exit.json, for many
clusters keep no accounting. Decides nothing about the fleet.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from inventory import nodeset
from launcher.agent.sweep import sweep
from launcher.backends.slurm import ExitRecord
from launcher.documents import AgentConfig
from launcher.files import make_private, read_document, write_document
from launcher.paths import BasePaths

STEP_STOP_S = 25.0


class Supervisor:
    def __init__(self, base: BasePaths) -> None:
        self.base = base
        self.nodes = nodeset.expand(os.environ["SLURM_JOB_NODELIST"])
        self.steps: dict[str, subprocess.Popen[bytes]] = {}
        self.reason = "all agents ended"
        self._told_to_end = threading.Event()

    def run(self) -> int:
        """Until every agent has ended, or Slurm tells us to."""
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGUSR1, self._on_warning)
        make_private(self.base.root / "nodes")
        for node in self.nodes:
            self.steps[node] = self._start(node)
        while any(step.poll() is None for step in self.steps.values()):
            if self._told_to_end.wait(0.5):
                break
        self._end_steps()
        codes = {node: step.poll() or 0 for node, step in self.steps.items()}
        record = ExitRecord(reason=self.reason, at=time.time(), steps=codes)
        write_document(self.base.root / "exit.json", record)
        config = read_document(self.base.config, AgentConfig)
        if config:
            sweep(config.mark, map(self.base.node, self.nodes))
        return 0

    def _start(self, node: str) -> subprocess.Popen[bytes]:
        root = make_private(self.base.node(node).root)
        command = [
            *("srun", "--no-kill", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap"),
            *("--quiet", "--export=ALL", f"--output={_literal(root / 'agent.log')}"),
            *("--open-mode=append", sys.executable, "-m", "launcher.agent"),
            *("--base", str(self.base.root), "--node", node),
        ]
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")
        if cpus:  # srun of 22.05 and 23.02 does not take it from the job
            command[1:1] = [f"--cpus-per-task={cpus}"]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def _end_steps(self) -> None:
        """The agents get TERM through Slurm, for a TERM to srun would KILL them at once."""
        job = os.environ["SLURM_JOB_ID"]
        if all(step.poll() is not None for step in self.steps.values()):
            return
        subprocess.run(["scancel", "--signal=TERM", job], check=False, timeout=30)
        deadline = time.monotonic() + STEP_STOP_S
        while time.monotonic() < deadline:
            if all(step.poll() is not None for step in self.steps.values()):
                return
            self._told_to_end.clear()
            self._told_to_end.wait(0.2)

    def _on_term(self, number: int, frame: object) -> None:
        self.reason = "Slurm ended the job (walltime, preemption or scancel)"
        self._told_to_end.set()

    def _on_warning(self, number: int, frame: object) -> None:
        """Slurm warns before the walltime; what follows from it is the controller's business."""
        print(f"{socket.gethostname()}: Slurm warns that the job ends soon", flush=True)


def _literal(path: Path) -> str:
    """A path in --output, where % starts a pattern."""
    return str(path).replace("%", "%%")


def main() -> int:
    parser = argparse.ArgumentParser(prog="launcher.supervisor", description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    return Supervisor(BasePaths(parser.parse_args().base.absolute())).run()


if __name__ == "__main__":
    sys.exit(main())
