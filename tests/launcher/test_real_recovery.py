"""Real vLLM loses a host, a rank hangs, a link is cut, under a steady load of the official client.

Run by `make acceptance ONLY=recovery`; the figures are printed and kept in docs/controller.md.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml
from openai import OpenAI

from tests.cluster import bed
from tests.conftest import ROOT, Cli
from tests.launcher.fleets import FleetUnderTest, engine_processes, eventually

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.engine,
    pytest.mark.acceptance,
    pytest.mark.timeout(900),
]
MENDED_AFTER_S = 120.0
WAIT_MAX_S = 45.0  # no non-streaming request waits longer, whatever happens to one replica


class Load:
    """Four at a time, streaming and not; what fails is kept with the reason."""

    def __init__(self, document: dict) -> None:
        key = Path(document["api_key_file"]).read_text().strip()
        self._client = OpenAI(
            base_url=document["endpoint"], api_key=key, max_retries=0, timeout=300
        )
        self._model = document["fleet"]
        self._enough = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(n % 2 == 0,), daemon=True) for n in range(4)
        ]
        self.answered = 0
        self.failed: list[str] = []
        self.broken_streams: list[str] = []
        self.longest_s = 0.0
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(320)

    def _run(self, streams: bool) -> None:
        while not self._enough.is_set():
            began, tokens = time.monotonic(), 0
            try:
                if streams:
                    for part in self._ask(stream=True):
                        tokens += bool(part.choices)  # a token may be no text yet
                else:
                    self._ask()
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.answered += 1
            except Exception as error:  # noqa: BLE001 - whatever the client sees is counted
                told = f"{'stream' if streams else 'request'}: {error!r}"[:200]
                (self.broken_streams if streams and tokens else self.failed).append(told)

    def _ask(self, **more):
        return self._client.completions.create(
            model=self._model,
            prompt="The quick brown fox",
            max_tokens=16,
            temperature=0,
            extra_body={"ignore_eos": True},
            **more,
        )


@pytest.fixture(params=["ssh", "slurm"])
def fleet(request, cluster):
    bed.up(5)
    folder = ROOT / ".testbed/tmp/recovery"
    folder.mkdir(parents=True, exist_ok=True)
    cli = Cli({**os.environ, "LAUNCHER_STATE_DIR": str(folder / "state")}, folder)
    if request.param == "ssh":
        assert cli("bootstrap", "-f", str(ROOT / "examples/ssh.yaml")).returncode == 0
    example = yaml.safe_load((ROOT / f"examples/{request.param}.yaml").read_text())
    del example["name"]
    backend = {"slurm": {"partition": "gpu", "walltime": "1h", "exclusive": True}}
    if request.param == "ssh":
        backend = {"ssh": {"inventory": str(ROOT / ".testbed/inventory.yaml")}}
    spec = {
        **example,
        "model": str(ROOT / "models/tiny"),
        "runtime": {"venv": str(ROOT / ".venv/engine")},
        "replicas": 2,
        "nodes": 2,
        "spares": 1,
        "executor": "mp",
        "parallelism": {"pipeline": 2},
        "env": {**example["env"], "CPU_ENGINE_START_METHOD": "fork"},
        "backend": backend,
    }
    made = FleetUnderTest(folder, cli, f"rec-{request.param}", spec)
    try:
        code, document = made.up(timeout=600)
        assert code == 0, document["error"]
        told = made.cli("status", "--fleet", made.name)
        assert eventually(lambda: _has_a_warm_spare(made), 120), told.stdout
        made.document = document
        yield made
        print(made.cli("events", "--fleet", made.name, "--limit", "300").stdout)
    finally:
        bed.repair(wait_idle=False)
        made.down()
        bed.down()


def _has_a_warm_spare(fleet) -> bool:
    return any(spare["phase"] == "warm" for spare in fleet.status()[1]["spares"])


def interrupted_at(fleet, after: float) -> float | None:
    rows = fleet.cli("events", "--fleet", fleet.name, "--json", "--limit", "500").stdout
    events = [json.loads(line) for line in rows.splitlines()]
    told = [e["at"] for e in events if e["event"] == "interrupt" and e["at"] > after]
    return told[0] if told else None


@pytest.mark.parametrize("fault", ["power", "power and controller", "hang", "cut"])
def test_two_replicas_and_a_spare_lose_a_node_under_load(fleet, fault):
    victim = fleet.document["replicas"][1]["nodes"][1]["node"]
    load = Load(fleet.document)
    assert eventually(lambda: load.answered > 8, 120)
    began = time.time()
    if fault.startswith("power"):
        bed.kill(victim)
    elif fault == "cut":
        bed.cut(victim)
    else:
        for pid in [p for p, node in engine_processes(fleet.name).items() if node == victim]:
            if b"vllm" in Path(f"/proc/{pid}/cmdline").read_bytes().lower():
                os.kill(pid, signal.SIGSTOP)
    if fault == "power and controller":
        folder = Path(fleet.cli.environment["LAUNCHER_STATE_DIR"]) / fleet.name
        os.kill(json.loads((folder / "controller.json").read_text())["pid"], 9)
    assert eventually(lambda: interrupted_at(fleet, began) is not None, 60)
    detected_s = interrupted_at(fleet, began) - began
    assert eventually(lambda: fleet.status()[0] == 0, 300), fleet.status()
    served_s = time.time() - began
    answered = load.answered
    assert eventually(lambda: load.answered > answered + 8, 60)
    load.stop()
    print(
        f"{fleet.name} {fault}: detected after {detected_s:.1f} s, served again after "
        f"{served_s:.1f} s, {load.answered} answered, {len(load.failed)} failed, "
        f"{len(load.broken_streams)} begun streams broken, longest {load.longest_s:.1f} s"
    )
    assert load.failed == []
    assert load.longest_s < WAIT_MAX_S
    if fault in ("power", "cut"):
        assert detected_s < 6.0, "detection is a safety bound"
    if fault == "cut":
        time.sleep(max(0.0, MENDED_AFTER_S - (time.time() - began)))
        bed.heal(victim)
        time_to_settle = 30.0
        assert not eventually(lambda: fleet.status()[0] != 0, time_to_settle), (
            "nobody is disturbed"
        )
