"""Parked processes of the real engine on this machine: the same answers, the same end, sooner."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from launcher.agent import segments
from launcher.agent.processes import scratch_root
from launcher.files import read_tail
from tests.conftest import ROOT
from tests.launcher.fleets import FleetUnderTest, ask, eventually, is_parked

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
ENGINE = ROOT / ".venv/engine"


SPEC = {
    "model": str(ROOT / "models/tiny"),
    "nodes": 2,
    "gpus_per_node": 1,
    "parallelism": {"tensor": 1, "pipeline": 2},
    "runtime": {"venv": str(ENGINE)},
    "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "CPU_ENGINE_START_METHOD": "fork"},
    "engine": {"args": {"enforce-eager": True, "dtype": "float32", "max-model-len": 512}},
    "preflight": "passive",
    "backend": "local",
}
ONE_NODE = {"nodes": 1, "parallelism": {"tensor": 1, "pipeline": 1}}
FOLLOWERS = {"mp": "headless", "ray": "ray-worker"}
ROUNDS = 50


@pytest.fixture
def fleet(tmp_path, cli, fleet_name, state_dir):
    missing = [
        p for p in (ENGINE / "bin/vllm", ROOT / "models/tiny/config.json") if not p.exists()
    ]
    if missing:
        pytest.fail(f"{', '.join(map(str, missing))} not there; run `make setup`")
    made = FleetUnderTest(tmp_path, cli, fleet_name, dict(SPEC))
    yield made
    made.down()
    assert eventually(lambda: of(state_dir) == [], 5), of(state_dir)


def of(state: Path) -> list[psutil.Process]:
    """Everything of this state folder that runs: engines, what is parked, agents, controller."""
    found = []
    for process in psutil.process_iter():
        try:
            text = " ".join([*process.cmdline(), process.environ().get("LAUNCHER_BASE", "")])
        except psutil.Error:
            continue
        if str(state) in text and process.pid != os.getpid():
            found.append(process)
    return found


def parked(state: Path) -> list[psutil.Process]:
    return [one for one in of(state) if is_parked(Path(f"/proc/{one.pid}"), state)]


def started(document: dict) -> set[str]:
    return {node["started"] for node in document["replicas"][0]["nodes"]}


def all_parked(fleet) -> bool:
    _, document = fleet.status()
    nodes = document["replicas"][0]["nodes"]
    return all(node["parked"] and node["parked"]["state"] == "ready" for node in nodes)


def pid_of(state: Path, name: str, node: str, process: str) -> int:
    """The newest report of this node knows it."""
    reports = (state / name / "runs").glob(f"*/*/nodes/{node}/report.json")
    newest = max(reports, key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text())["member"]["processes"][process]


def how_it_ends(fleet, state: Path) -> str:
    """What becomes of an API server that is sent SIGTERM, and of nobody else's doing."""
    _, document = fleet.status()
    generation = document["replicas"][0]["generation"]
    os.kill(pid_of(state, fleet.name, "n1", "serve"), signal.SIGTERM)
    told = f"generation {generation} ended: "

    def story() -> list[str]:
        return [t for t in fleet.status()[1]["replicas"][0]["story"] if t.startswith(told)]

    assert eventually(story, 30), fleet.status()[1]["replicas"]
    return story()[0].removeprefix(told)


def serves_as(fleet, generation: int) -> bool:
    code, document = fleet.status()
    return code == 0 and document["replicas"][0]["generation"] == generation


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_a_replica_comes_again_from_parked_engines_and_answers_alike(fleet, executor, state_dir):
    left_before = unmapped()
    fleet.spec["executor"] = executor
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert started(document) == {"parked"}
    answer = ask(document, tokens=16)
    assert eventually(lambda: all_parked(fleet), 90), fleet.status()[1]["replicas"]
    assert len(parked(state_dir)) == 2

    killed_at = time.monotonic()
    os.kill(pid_of(state_dir, fleet.name, "n2", FOLLOWERS[executor]), signal.SIGKILL)
    assert eventually(lambda: serves_as(fleet, 2), 90), fleet.status()[1]["replicas"]
    print(f"serves {time.monotonic() - killed_at:.1f} s after the kill")
    _, document = fleet.status()
    assert started(document) == {"parked"}
    workers = {node["ray_workers"] for node in document["replicas"][0]["nodes"]}
    assert workers == ({"1 parked"} if executor == "ray" else {""})
    assert ask(document, tokens=16) == answer

    assert fleet.down() == 0
    assert eventually(lambda: of(state_dir) == [], 5)
    assert unmapped() <= left_before


@pytest.mark.acceptance
@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_parked_and_plain_engines_answer_warn_and_end_alike(fleet, executor, state_dir):
    fleet.spec["executor"] = executor
    seen = []
    for warm in ("auto", "off"):
        fleet.spec["warm"] = warm
        code, document = fleet.up()
        assert code == 0, document["error"]
        assert started(document) == {"parked" if warm == "auto" else "plain"}
        assert warm == "auto" or parked(state_dir) == []
        answer = ask(document, tokens=16)
        warned = warnings_of(state_dir, fleet.name)
        seen.append((answer, how_it_ends(fleet, state_dir), warned))
        assert fleet.down() == 0
    assert seen[0][:2] == seen[1][:2]
    assert sorted(seen[0][2] ^ seen[1][2]) == [], "one of them warned of it, and not the other"


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_fifty_rounds_of_park_serve_kill_leave_nothing_and_take_no_more_memory(
    fleet, executor, state_dir
):
    folders = set(scratch_root().glob("fl-*"))
    left_before = unmapped()
    fleet.spec |= {"executor": executor, **ONE_NODE, "limits": {"restarts": 1000}}
    code, document = fleet.up()
    assert code == 0, document["error"]
    memory = []
    for number in range(ROUNDS):
        assert eventually(lambda: all_parked(fleet), 90), fleet.status()[1]["replicas"]
        memory.append(agents_memory(state_dir))
        before = fleet.status()[1]["replicas"][0]["generation"]
        os.kill(pid_of(state_dir, fleet.name, "n1", "serve"), signal.SIGKILL)
        # Not the back-off of a crash loop, but at once.
        again = fleet.cli("restart", "r1", "--fleet", fleet.name, timeout=180)
        assert again.returncode == 0, again.stdout + again.stderr
        _, document = fleet.status()
        assert document["replicas"][0]["generation"] > before
        assert started(document) == {"parked"}, (number, document["replicas"])
        assert ask(document, tokens=4)
        print(f"round {number + 1}: the agent has {memory[-1] >> 20} MiB")
    assert fleet.down() == 0
    assert eventually(lambda: of(state_dir) == [], 5)
    assert unmapped() <= left_before
    assert set(scratch_root().glob("fl-*")) <= folders
    assert memory[-1] < memory[4] * 1.1 + 4 * 2**20, [one >> 20 for one in memory]


def unmapped() -> set[Path]:
    """What nobody has in use in shared memory; another fleet may run beside this one."""
    mapped = segments.mapped_by(psutil.process_iter())
    found = set()
    for path in segments.FOLDER.iterdir():
        with contextlib.suppress(OSError):
            found |= {path} if path.stat().st_ino not in mapped else set()
    return found


def agents_memory(state: Path) -> int:
    """What the agents of this state folder have for themselves; engines come and go."""
    agents = [one for one in of(state) if "launcher.agent" in one.cmdline()]
    return sum(one.memory_full_info().uss for one in agents)


def warnings_of(state: Path, name: str) -> set[str]:
    """What the newest engine warned of on its leader, its imports included, without numbers and
    without how often Ray says that it was said."""
    logs = (state / name / "runs").glob("*/*/nodes/n1/logs/g*.serve.log")
    newest = max(logs, key=lambda file: file.stat().st_mtime)
    text = newest.read_text(errors="replace") + read_tail(newest.with_name("park.log"), 1 << 20)
    found = re.findall(r"WARNING \S+ \S+ (.+)", text)
    return {re.sub(r"\d+", "N", line.partition(" [repeated ")[0]) for line in found}
