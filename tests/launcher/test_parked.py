"""Parked processes of the real engine on this machine: the same answers, the same end, sooner."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.launcher.fleets import FleetUnderTest, ask, eventually, is_parked

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
ENGINE = ROOT / ".venv/engine"


@pytest.fixture
def fleet(tmp_path, cli, fleet_name, state_dir):
    missing = [
        p for p in (ENGINE / "bin/vllm", ROOT / "models/tiny/config.json") if not p.exists()
    ]
    if missing:
        pytest.fail(f"{', '.join(map(str, missing))} not there; run `make setup`")
    spec = {
        "model": str(ROOT / "models/tiny"),
        "nodes": 2,
        "gpus_per_node": 1,
        "parallelism": {"tensor": 1, "pipeline": 2},
        "executor": "mp",
        "runtime": {"venv": str(ENGINE)},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "CPU_ENGINE_START_METHOD": "fork"},
        "engine": {"args": {"enforce-eager": True, "dtype": "float32", "max-model-len": 512}},
        "preflight": "passive",
        "backend": "local",
    }
    made = FleetUnderTest(tmp_path, cli, fleet_name, spec)
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


def test_parked_engines_answer_and_end_like_plain_ones_and_come_again(fleet, state_dir):
    segments = set(Path("/dev/shm").iterdir())
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert started(document) == {"parked"}
    answer = ask(document, tokens=16)
    assert eventually(lambda: all_parked(fleet), 90), fleet.status()[1]["replicas"]
    assert len(parked(state_dir)) == 2

    killed_at = time.monotonic()
    os.kill(pid_of(state_dir, fleet.name, "n2", "headless"), signal.SIGKILL)

    def is_back() -> bool:
        code, document = fleet.status()
        return code == 0 and document["replicas"][0]["generation"] == 2

    assert eventually(is_back, 90), fleet.status()[1]["replicas"]
    print(f"serves {time.monotonic() - killed_at:.1f} s after the kill")
    _, document = fleet.status()
    assert started(document) == {"parked"}
    assert ask(document, tokens=16) == answer

    end = how_it_ends(fleet, state_dir)
    assert fleet.down() == 0
    assert eventually(lambda: of(state_dir) == [], 5)
    assert set(Path("/dev/shm").iterdir()) <= segments

    fleet.spec["warm"] = "off"
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert started(document) == {"plain"}
    assert parked(state_dir) == []
    assert ask(document, tokens=16) == answer
    assert how_it_ends(fleet, state_dir) == end
