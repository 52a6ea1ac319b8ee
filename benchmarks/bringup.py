"""Time from command to first token: by hand (ray start, vllm serve, curl) and by `launcher up`.

    python benchmarks/bringup.py [--rounds 3] [--executor ray|mp|both] [--fork] [--json]

Two nodes on this machine, the same engine, model and arguments, alternating in one run. By hand is
what a careful person types: the head, a worker as soon as the head listens, the server as soon as
both have joined. Both use stock vLLM, which spawns its processes on the CPU; with `--fork` they
start the way of examples/cpu_engine, where an engine is up in ten seconds and each of ours shows.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / ".venv/engine/bin"
MODEL = ROOT / "models/tiny"
ARGUMENTS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512"]
DEADLINE_S = 300.0
KEY = "benchmark"
# One state folder for all rounds: the engine's own caches are warm for both, from the first,
# uncounted round on (by hand they lie in ~/.cache).
STATE = Path(tempfile.mkdtemp(prefix="lb-state-", dir="/tmp"))


def wait(observe, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not observe():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0


def token(endpoint: str, model: str, key: str) -> bool:
    request = urllib.request.Request(
        f"{endpoint}/completions",
        json.dumps({"model": model, "prompt": "Hello", "max_tokens": 1}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["usage"]["completion_tokens"] == 1
    except (OSError, urllib.error.URLError):
        return False


def by_hand(executor: str, start: str, scratch: Path) -> float:
    environment = {
        **os.environ,
        "PATH": f"{ENGINE}:{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_API_KEY": KEY,
        "CPU_ENGINE_START_METHOD": start,
        "TMPDIR": str(scratch),
    }
    children: list[subprocess.Popen[bytes]] = []
    segments = set(Path("/dev/shm").iterdir())

    def run(node: int, *command: str, **more: str) -> subprocess.Popen[bytes]:
        log = (scratch / f"{len(children)}.log").open("wb")
        child = subprocess.Popen(
            command,
            env={**environment, "VLLM_HOST_IP": f"127.0.0.{node}", **more},
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=scratch,
        )
        children.append(child)
        return child

    serve = ["vllm", "serve", str(MODEL), *ARGUMENTS, "--pipeline-parallel-size", "2"]
    api = ["--host", "127.0.0.2", "--port", "33001", "--served-model-name", "tiny"]
    began = time.monotonic()
    try:
        if executor == "ray":
            common = ["--num-gpus=1", "--num-cpus=2", "--block", "--disable-usage-stats"]
            run(
                2,
                "ray",
                "start",
                "--head",
                "--node-ip-address=127.0.0.2",
                "--port=33000",
                "--include-dashboard=false",
                f"--temp-dir={scratch}/a",
                *common,
            )
            wait(lambda: listens("127.0.0.2", 33000), "the Ray head")
            worker = run(
                3,
                "ray",
                "start",
                "--address=127.0.0.2:33000",
                "--node-ip-address=127.0.0.3",
                f"--temp-dir={scratch}/b",
                *common,
            )
            log = scratch / "1.log"
            wait(lambda: b"Ray runtime started" in log.read_bytes(), "the Ray worker")
            assert worker.poll() is None
            run(
                2,
                *serve,
                *api,
                "--distributed-executor-backend",
                "ray",
                RAY_ADDRESS="127.0.0.2:33000",
            )
        else:
            both = [
                "--distributed-executor-backend",
                "mp",
                "--nnodes",
                "2",
                "--master-addr",
                "127.0.0.2",
                "--master-port",
                "33000",
            ]
            run(2, *serve, *api, *both, "--node-rank", "0")
            run(3, *serve, *both, "--node-rank", "1", "--headless")
        wait(lambda: token("http://127.0.0.2:33001/v1", "tiny", KEY), "a token")
        return time.monotonic() - began
    finally:
        end(children, scratch)
        for segment in set(Path("/dev/shm").iterdir()) - segments:  # a killed engine leaves them
            segment.unlink(missing_ok=True)


def end(children: list[subprocess.Popen[bytes]], scratch: Path) -> None:
    """Everything of this round, by the scratch folder that it carries in its environment."""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    mark = f"TMPDIR={scratch}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                continue


def by_launcher(executor: str, start: str, scratch: Path) -> float:
    launcher = str(Path(sys.executable).with_name("launcher"))
    environment = {**os.environ, "LAUNCHER_STATE_DIR": str(STATE)}
    spec = scratch / "fleet.yaml"
    spec.write_text(
        f"name: tiny\nmodel: {MODEL}\nnodes: 2\ngpus_per_node: 1\nparallelism: {{pipeline: 2}}\n"
        f"executor: {executor}\nruntime: {{venv: {ENGINE.parent}}}\n"
        f"env: {{VLLM_CPU_KVCACHE_SPACE: 1, CPU_ENGINE_START_METHOD: {start}}}\n"
        "engine: {args: {enforce-eager: true, dtype: float32, max-model-len: 512}}\n"
    )
    began = time.monotonic()
    try:
        up = subprocess.run(
            [launcher, "up", "-f", str(spec), "--json"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        document = json.loads(up.stdout)
        key = Path(document["api_key_file"]).read_text().strip()
        assert token(document["endpoint"], "tiny", key)
        return time.monotonic() - began
    finally:
        subprocess.run(
            [launcher, "down", "--fleet", "tiny"],
            env=environment,
            capture_output=True,
            check=False,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--executor", choices=["ray", "mp", "both"], default="both")
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    start = "fork" if arguments.fork else "spawn"
    executors = ["ray", "mp"] if arguments.executor == "both" else [arguments.executor]
    results = {}
    for executor in executors:
        figures: dict[str, list[float]] = {"by_hand_s": [], "launcher_s": []}
        for number in range(arguments.rounds + 1):
            for name, measure in (("by_hand_s", by_hand), ("launcher_s", by_launcher)):
                scratch = Path(tempfile.mkdtemp(prefix="lb-", dir="/tmp"))
                try:
                    figures[name].append(round(measure(executor, start, scratch), 1))
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                told = f"round {number}" if number else "warm-up"
                print(f"{executor} {told} {name} {figures[name][-1]}", file=sys.stderr)
            if number == 0:
                figures = {name: [] for name in figures}
        hand, ours = (statistics.median(figures[name]) for name in ("by_hand_s", "launcher_s"))
        results[executor] = {**figures, "ratio_of_medians": round(ours / hand, 3)}
    shutil.rmtree(STATE, ignore_errors=True)
    document = {
        "benchmark": "bringup",
        "date": date.today().isoformat(),  # noqa: DTZ011
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "start_method": start,
        "results": results,
    }
    if arguments.json:
        print(json.dumps(document, indent=1))
    else:
        for executor, row in results.items():
            print(
                f"{executor}: by hand {row['by_hand_s']} s, launcher {row['launcher_s']} s, "
                f"ratio of medians {row['ratio_of_medians']}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
