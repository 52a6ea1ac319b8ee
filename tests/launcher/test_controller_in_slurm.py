"""The controller in a Slurm job of its own: on the testbed, with the fake engine."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from openai import OpenAIError

from tests.cluster import bed
from tests.launcher.fleets import FleetUnderTest, ask, engine_processes, eventually, fake_spec

pytestmark = pytest.mark.cluster


@pytest.fixture
def fleet(cluster, shared_cli, shared_dir, fake_engine, shared_model, fleet_name):
    backend = {"slurm": {"partition": "gpu", "walltime": "30m", "exclusive": True}}
    spec = fake_spec(backend, shared_model, fake_engine)
    spec["limits"] = {"drain": "5s", "start": "30s"}
    spec["controller"] = {"slurm": {"walltime": "30m"}}
    made = FleetUnderTest(shared_dir, shared_cli, fleet_name, spec)
    yield made
    print(made.cli("events", "--fleet", fleet_name, "--limit", "500").stdout)
    print("\n".join(log.read_text() for log in shared_dir.rglob("controller.log")))
    print("\n".join(log.read_text() for log in shared_dir.rglob("gateway.log")))
    made.down()
    bed.repair()
    assert engine_processes(fleet_name) == {}


def controllers(fleet) -> dict[str, tuple[str, str]]:
    """State and node of this fleet's controller jobs that are not over."""
    rows = subprocess.run(
        ["squeue", "-h", "-n", f"{fleet.name}.controller", "-o", "%i %T %B"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return {identity: (state, host) for identity, state, host in map(str.split, rows)}


def driver(fleet) -> dict:
    folder = Path(fleet.cli.environment["LAUNCHER_STATE_DIR"]) / fleet.name
    return json.loads((folder / "controller.json").read_text())


def is_well(fleet) -> bool:
    code, status = fleet.status()
    return code == 0 and status["phase"] == "serving"


def is_answered(fleet) -> bool:
    try:
        return ask(fleet.status()[1]) == "x"
    except OpenAIError:
        return False


def ours(fleet) -> list[str]:
    """Every process that works on this fleet's folder, on all hosts."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"/{fleet.name}" in words or f"{fleet.name}." in words:
                found.append(words.replace("\0", " "))
    return found


def test_a_controller_in_a_job_of_its_own_comes_back_is_adopted_and_ends(fleet):
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert ask(document) == "x"
    ((first, (_, host)),) = controllers(fleet).items()
    assert document["controller"] == f"running in Slurm job {first} on {host}"
    assert driver(fleet)["job"] == first
    engines = engine_processes(fleet.name)
    assert len(engines) > 1

    rendered = json.loads(fleet.cli("render", "-f", fleet.file, "--json").stdout)["files"]
    kept = next(fleet.folder.rglob("rendered/controller.sbatch"))
    assert rendered["controller.sbatch"] == kept.read_text()

    # It dies: its job brings it back, and no one else notices.
    before = driver(fleet)["pid"]
    subprocess.run(bed.on(host, "kill", "-9", str(before)), check=True)
    assert eventually(lambda: driver(fleet)["pid"] != before and is_well(fleet), 30)
    assert ask(document) == "x"
    assert list(controllers(fleet)) == [first]

    # Its job is cancelled: the engines go on, the address is gone, and `status` says both.
    subprocess.run(["scancel", first], check=True)
    assert eventually(lambda: not controllers(fleet), 30)
    assert eventually(lambda: fleet.status()[0] == 1, 15), fleet.status()
    status = fleet.status()[1]
    assert status["phase"] == "degraded"
    assert f"job {first}: CANCELLED" in status["controller"]
    assert any("launcher up" in one for one in status["waiting_for"])
    assert any("gateway" in one for one in status["waiting_for"])
    assert engine_processes(fleet.name) == engines

    # `up` brings a job back, which adopts what runs.
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert ask(document) == "x"
    assert document["replicas"][0]["generation"] == 1
    assert engine_processes(fleet.name) == engines
    ((second, _),) = controllers(fleet).items()
    assert second != first

    # Slurm warns of the walltime: a successor is asked for, and takes over.
    subprocess.run(["scancel", "--batch", "--signal=USR1", second], check=True)
    assert eventually(lambda: set(controllers(fleet)) - {second}, 30)
    assert eventually(lambda: second not in controllers(fleet) and is_well(fleet), 60)
    assert driver(fleet)["job"] != second
    assert eventually(lambda: is_answered(fleet), 15), "its gateway is a new one, too"
    assert engine_processes(fleet.name) == engines

    assert fleet.down() == 0
    assert eventually(lambda: not controllers(fleet), 15)
    assert eventually(lambda: not ours(fleet), 15), ours(fleet)
