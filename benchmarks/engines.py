"""One engine over two nodes of this machine, started by hand and by `launcher`; timed to a token.

The same vLLM, model, arguments and environment for both. `start` is how vLLM makes its processes:
"spawn", as stock vLLM does on the CPU, or "fork", the way of examples/cpu_engine.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import LAUNCHER, ROOT, options, scratch
from launcher.agent import lastwords, segments
from launcher.agent.processes import MARK_VARIABLE, kill_all, marked

EXECUTORS = ("ray", "mp")
ENGINE = ROOT / ".venv/engine"
MODEL = ROOT / "models/tiny"
# vLLM on the CPU binds the threads of every node's rank to the same first core. Nodes that are
# machines have one each; here one rank would starve the other, and an engine under load both.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
NODES = 2
LEADER, FOLLOWER = "127.0.0.2", "127.0.0.3"
KEY = "benchmark"
ANSWERS_WITHIN_S = 300.0
PARKED_WITHIN_S = 240.0


def engine_options(description: str | None) -> argparse.ArgumentParser:
    parser = options(description, rounds=3)
    parser.add_argument("--executor", choices=[*EXECUTORS, "both"], default="both")
    return parser


def executors(chosen: str) -> tuple[str, ...]:
    return EXECUTORS if chosen == "both" else (chosen,)


def by_hand(executor: str, start: str) -> float:
    """Seconds from the first command to the first token, as a careful person types it: the head,
    the worker as soon as the head listens, the server as soon as both have joined."""
    with scratch() as folder:
        hand = Hand(start, folder)
        began = time.monotonic()
        try:
            if executor == "ray":
                hand.start_ray()
                hand.serve_on_ray()
            else:
                hand.serve_on_both()
            hand.wait(lambda: answers(hand.endpoint, "tiny", KEY), "a token")
            return round(time.monotonic() - began, 1)
        finally:
            hand.end()


class Hand:
    """The commands of one start; what runs by them is known by a mark, and ended."""

    def __init__(self, start: str, folder: Path) -> None:
        self._folder = folder
        self._meeting, self._api = _free_ports()[:2]
        self.endpoint = f"http://{LEADER}:{self._api}/v1"
        self._children: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._environment = {
            **os.environ,
            **ENVIRONMENT,
            "PATH": f"{ENGINE}/bin:{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": "lo",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # not set, it depends on what lies in ~/.ray
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_API_KEY": KEY,
            "CPU_ENGINE_START_METHOD": start,
            "TMPDIR": str(folder),
            MARK_VARIABLE: str(folder),
        }

    def start_ray(self) -> None:
        common = ["--num-gpus=1", "--num-cpus=2", "--block", "--disable-usage-stats"]
        head = ["--head", f"--node-ip-address={LEADER}", f"--port={self._meeting}"]
        head += ["--include-dashboard=false", f"--temp-dir={self._folder}/a"]
        self._type(LEADER, "ray", "start", *head, *common)
        self.wait(lambda: _listens(LEADER, self._meeting), "the Ray head")
        worker = [f"--address={LEADER}:{self._meeting}", f"--node-ip-address={FOLLOWER}"]
        worker += [f"--temp-dir={self._folder}/b"]
        log = self._type(FOLLOWER, "ray", "start", *worker, *common)
        self.wait(lambda: b"Ray runtime started" in log.read_bytes(), "the Ray worker")

    def serve_on_ray(self) -> None:
        how = [*self._listening(), "--distributed-executor-backend", "ray"]
        self._type(LEADER, *_serve(), *how, RAY_ADDRESS=f"{LEADER}:{self._meeting}")

    def serve_on_both(self) -> None:
        both = ["--distributed-executor-backend", "mp", "--nnodes", "2"]
        both += ["--master-addr", LEADER, "--master-port", str(self._meeting)]
        self._type(LEADER, *_serve(), *self._listening(), *both, "--node-rank", "0")
        self._type(FOLLOWER, *_serve(), *both, "--node-rank", "1", "--headless")

    def wait(self, observe: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            if any(child.poll() is not None for child, _ in self._children):
                raise SystemExit(f"by hand, waiting for {what}: a command ended\n{self._said()}")
            return observe()

        wait(look, what, ANSWERS_WITHIN_S)

    def end(self) -> None:
        ended, found = set[psutil.Process](), self._running()
        mapped = segments.mapped_by(found)
        while found:
            kill_all(found)
            ended |= set(found)
            found = self._running()
        for child, _ in self._children:
            child.wait()
        psutil.wait_procs(ended, timeout=5)  # orphans: as long as one maps a segment it stays
        segments.remove(mapped)

    def _said(self) -> str:
        """Of each command what ended it, as far as its log tells, and its last lines."""
        logs = [log.read_text(errors="replace") for _, log in self._children]
        return "\n".join(f"{lastwords.cause(log)}\n{lastwords.tail(log)}" for log in logs)

    def _running(self) -> list[psutil.Process]:
        """What its commands started: below them, or (Ray's) orphaned, but with the mark. Who has
        renamed itself, as vLLM's processes do, has lost the mark."""
        found = marked(str(self._folder))
        for child, _ in self._children:
            if child.poll() is None:
                process = psutil.Process(child.pid)
                found += [process, *process.children(recursive=True)]
        return found

    def _listening(self) -> list[str]:
        where = ["--host", LEADER, "--port", str(self._api)]
        return [*where, "--served-model-name", "tiny"]

    def _type(self, node: str, *command: str, **more: str) -> Path:
        log = self._folder / f"{len(self._children)}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                command,
                env={**self._environment, "VLLM_HOST_IP": node, **more},
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self._folder,
            )
        self._children.append((child, log))
        return log


class Fleet:
    """One fleet of two nodes on this machine, in a state folder of the benchmark's own: the caches
    of the engines lie there."""

    def __init__(
        self, name: str, state: Path, executor: str, *, start: str, warm: str, spares: int = 0
    ) -> None:
        self.name = name
        self._environment = {**os.environ, "LAUNCHER_STATE_DIR": str(state)}
        self._file = state / f"{name}.yaml"
        self._spares = spares
        spec = {
            "name": name,
            "model": str(MODEL),
            "nodes": NODES,
            "spares": spares,
            "gpus_per_node": 1,
            "parallelism": {"pipeline": 2},
            "executor": executor,
            "warm": warm,
            "runtime": {"venv": str(ENGINE)},
            "env": {**ENVIRONMENT, "CPU_ENGINE_START_METHOD": start},
            "engine": {"args": {"enforce-eager": True, "dtype": "float32", "max-model-len": 512}},
        }
        self._file.write_text(json.dumps(spec))

    @contextlib.contextmanager
    def running(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Its document, and the seconds from the command to a token through its address."""
        began = time.monotonic()
        try:
            document = self.document("up", "-f", str(self._file))
            self._wait_for_token(document)
            yield document, round(time.monotonic() - began, 1)
        finally:
            self._run("down", "--fleet", self.name)

    def restarted(self) -> tuple[float, float]:
        """Seconds from the command to a token of the next generation through the address, and how
        many of them the old one took to end, the word to the gateway included."""
        before = self.status()["replicas"][0]["generation"]
        began = time.monotonic()
        document = self.document("restart", "r1", "--fleet", self.name)
        self._wait_for_token(document)
        took_s = time.monotonic() - began
        after = document["replicas"][0]["generation"]
        if after != before + 1:
            raise SystemExit(f"{self.name}: generation {after} came after {before}")
        events = self._run("events", "--fleet", self.name, "--json").splitlines()
        return round(took_s, 1), round(end_s([json.loads(event) for event in events]), 1)

    def wait_until_parked(self) -> None:
        """Every node, the spares included, has a process that is ready to become its engine."""
        try:
            wait(self._is_parked, "parked", PARKED_WITHIN_S, every_s=1.0)
        except TimeoutError:
            told = json.dumps([node["parked"] for node in self._nodes()])
            raise SystemExit(
                f"{self.name}: not parked in {PARKED_WITHIN_S:.0f} s: {told}"
            ) from None

    def how_started(self) -> str:
        """How the engine of each node came to be, as the nodes say."""
        return ", ".join(node["started"] for node in self.status()["replicas"][0]["nodes"])

    def status(self) -> dict[str, Any]:
        return self.document("status", "--fleet", self.name)

    def document(self, *words: str) -> dict[str, Any]:
        return json.loads(self._run(*words, "--json"))

    def _run(self, *words: str) -> str:
        result = subprocess.run(
            [LAUNCHER, *words],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise SystemExit(f"launcher {' '.join(words)}: {result.stderr}{result.stdout}")
        return result.stdout

    def _is_parked(self) -> bool:
        nodes = self._nodes()
        are_ready = all(node["parked"] and node["parked"]["state"] == "ready" for node in nodes)
        return are_ready and len(nodes) == NODES + self._spares

    def _nodes(self) -> list[dict[str, Any]]:
        status = self.status()
        return [*status["replicas"][0]["nodes"], *status["spares"]]

    def _wait_for_token(self, document: dict[str, Any]) -> None:
        key = Path(document["api_key_file"]).read_text().strip()
        wait(lambda: answers(document["endpoint"], self.name, key), "a token", ANSWERS_WITHIN_S)


def end_s(events: list[dict[str, Any]]) -> float:
    """How long the last generation that was ended on purpose took for it: from the controller's
    taking the order up until no process of it was left."""
    last = max(n for n, event in enumerate(events) if event["event"] == "interrupt")
    over = next(event for event in events[last:] if event.get("requested_at"))
    return over["at"] - events[last]["at"]


def answers(endpoint: str, model: str, key: str) -> bool:
    request = urllib.request.Request(
        f"{endpoint}/completions",
        json.dumps({"model": model, "prompt": "Hello", "max_tokens": 1}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["usage"]["completion_tokens"] == 1
    except OSError:
        return False


def wait(observe: Callable[[], bool], what: str, within_s: float, *, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + within_s
    while not observe():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(every_s)


def _serve() -> list[str]:
    numbers = ["--max-model-len", "512", "--pipeline-parallel-size", "2"]
    return ["vllm", "serve", str(MODEL), "--enforce-eager", "--dtype", "float32", *numbers]


def _free_ports() -> list[int]:
    """Between those of fleets (launcher/ports.py) and those that the kernel gives away."""
    found = []
    for port in range(32_000, 32_768):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
    return found


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0
