"""This machine plays N nodes, each an agent with a loopback address of its own. I/O."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from inventory.model import Node, Pool
from launcher import quoting
from launcher.agent.processes import MARK_VARIABLE
from launcher.agent.sweep import sweep
from launcher.backends import asking
from launcher.backends.base import Allocation, Answer, Question, Seen
from launcher.backends.shared_files import SharedFiles
from launcher.errors import CapacityError
from launcher.files import make_private, open_log
from launcher.snapshot import AllocationView
from launcher.spec import FleetSpec

NODES_MAX = 200
AGENT_STOP_S = 8.0


class LocalBackend(SharedFiles):
    kind = "local"
    shares_machine = True
    chooses_nodes = False

    def __init__(self, spec: FleetSpec) -> None:
        self._spec = spec

    def check(self) -> None:
        wanted = self._wanted()
        if wanted > NODES_MAX:
            raise CapacityError(
                f"{wanted} nodes asked for, this machine plays {NODES_MAX} at most",
                where="backend.local",
            )

    def pool(self) -> Pool:
        wanted = self._wanted()
        from health.probes.gpu import count_gpus  # loads NVML, which most commands do not need

        gpus = self._spec.gpus_per_node or max(1, (count_gpus() or 0) // max(1, wanted))
        nodes = (Node(name=f"n{number}", gpus=gpus) for number in range(1, wanted + 1))
        return Pool(name="local", nodes=tuple(nodes))

    def _wanted(self) -> int:
        return self._spec.nodes * self._spec.replicas + self._spec.spares

    def commands(self, allocation: Allocation) -> dict[str, str]:
        lines = [quoting.line(_agent_command(allocation, node)) for node in allocation.nodes]
        return {"agents.sh": "#!/bin/bash\n" + "\n".join(lines) + "\n"}

    def allocate(self, allocation: Allocation) -> None:
        addresses = {node: f"127.0.0.{1 + int(node[1:])}" for node in allocation.nodes}
        config = allocation.config.model_copy(update={"addresses": addresses})
        self.prepare(replace(allocation, config=config))
        for node in allocation.nodes:
            if _living_agent(allocation, node) is None:
                _start_agent(allocation, node)

    def observe(self, allocation: Allocation) -> AllocationView:
        if not allocation.base.config.is_file():
            return AllocationView("none")
        return AllocationView(
            "running", identity=f"pid of {allocation.name}", nodes=allocation.nodes
        )

    def look(self, allocation: Allocation, nodes: tuple[str, ...]) -> dict[str, Seen]:
        seen = super().look(allocation, nodes)
        for node, one in seen.items():
            if one.report is not None and _living_agent(allocation, node) is None:
                seen[node] = replace(one, ended=True, problem="its agent's process ended")
        return seen

    def release(self, allocation: Allocation, nodes: tuple[str, ...] | None = None) -> None:
        chosen = allocation.nodes if nodes is None else nodes
        living = {node: _living_agent(allocation, node) for node in chosen}
        pids = [pid for pid in living.values() if pid is not None]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + AGENT_STOP_S
        for node in [node for node, pid in living.items() if pid]:
            while _living_agent(allocation, node) and time.monotonic() < deadline:
                time.sleep(0.05)
            stubborn = _living_agent(allocation, node)
            if stubborn is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stubborn, signal.SIGKILL)
        if nodes is None:
            sweep(allocation.config.mark, map(allocation.base.node, allocation.nodes))
            self.forget_secrets(allocation)
        for node in nodes or ():
            sweep(f"{allocation.config.mark}/{node}", [allocation.base.node(node)])

    def ask(self, questions: dict[str, Question], deadline_s: float) -> dict[str, Answer]:
        with ThreadPoolExecutor(len(questions) or 1) as pool:
            asked = {n: pool.submit(_ask, n, q, deadline_s) for n, q in questions.items()}
            return {node: answer.result() for node, answer in asked.items()}

    def close(self) -> None:
        return


def _ask(node: str, question: Question, deadline_s: float) -> Answer:
    began_at = time.time()
    with tempfile.TemporaryDirectory(prefix="launcher-ask-") as folder:
        try:
            output, errors = asking.answer_here(question, folder, node, deadline_s)
        except subprocess.TimeoutExpired:
            problem = f"no answer within {deadline_s:.0f} s"
            return Answer(began_at, time.time(), problem=problem)
    return Answer(began_at, time.time(), output, errors)


def _agent_command(allocation: Allocation, node: str) -> list[str]:
    base = str(allocation.base.root)
    return [sys.executable, "-m", "launcher.agent", "--base", base, "--node", node]


def _start_agent(allocation: Allocation, node: str) -> None:
    root = make_private(allocation.base.node(node).root)
    with open_log(root / "agent.log") as log:
        subprocess.Popen(
            _agent_command(allocation, node),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, MARK_VARIABLE: f"{allocation.config.mark}/agent"},
            cwd="/",
        )


def _living_agent(allocation: Allocation, node: str) -> int | None:
    """The process id of the agent that holds the node's lock, if one does."""
    lock: Path = allocation.base.node(node).root / "agent.lock"
    try:
        handle = os.open(lock, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.read(handle, 32).decode("ascii", "replace").strip()
        return int(text) if text.isdecimal() else None
    finally:
        os.close(handle)
    return None
