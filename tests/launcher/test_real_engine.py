"""Real vLLM and real Ray: pairwise over backend × executor × layout, one greedy answer for all.

The full product is in `make acceptance`. Layout: one rank per host, tensor 2 or pipeline 2.
"""

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster import bed, hardware
from tests.conftest import ROOT, Cli
from tests.launcher.fleets import FleetUnderTest, ask, engine_processes, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(420)]
PAIRWISE = [
    ("local", "mp", "tensor", "spawn"),
    ("slurm", "ray", "pipeline", "fork"),
    ("slurm", "mp", "tensor", "fork"),
    ("ssh", "mp", "pipeline", "fork"),
    ("ssh", "ray", "tensor", "fork"),
]
FULL = [
    pytest.param(*case, "fork", marks=pytest.mark.acceptance)
    for case in (
        *itertools.product(("local", "slurm", "ssh"), ("ray", "mp"), ("tensor", "pipeline")),
        ("slurm", "mp", "data"),
    )
    if (*case, "fork") not in PAIRWISE
]
ANSWERS: dict[str, str] = {}


@pytest.fixture
def engine_ready():
    missing = [
        p for p in (".venv/engine/bin/vllm", "models/tiny/config.json") if not (ROOT / p).exists()
    ]
    if missing:
        pytest.fail(f"{', '.join(missing)} not there; run `make setup`")


@pytest.mark.usefixtures("engine_ready", "bootstrapped")
@pytest.mark.parametrize(("backend", "executor", "layout", "start"), [*PAIRWISE, *FULL])
def test_two_hosts_serve_one_model_and_answer_the_same(
    backend, executor, layout, start, shared_dir, shared_cli
):
    name = f"e-{backend}-{executor}-{layout[0]}"
    fleet = _fleet(name, backend, executor, {layout: 2}, start, shared_dir, shared_cli)
    try:
        code, document = fleet.up("--nodes", "2", timeout=400)
        assert code == 0, document["error"]
        ANSWERS[f"{backend} {executor} {layout}"] = ask(document, tokens=16)
        assert len(set(ANSWERS.values())) == 1, ANSWERS
        _streams(document)
    finally:
        assert fleet.down() == 0


@pytest.mark.acceptance
@pytest.mark.usefixtures("engine_ready", "bootstrapped")
@pytest.mark.parametrize("fault", ["power", "process"])
@pytest.mark.parametrize(("backend", "executor"), [("slurm", "ray"), ("ssh", "mp")])
def test_a_rank_that_dies_takes_the_real_engine_down_everywhere_within_15_s(
    backend, executor, fault, shared_dir, shared_cli
):
    name = f"f-{backend}-{executor}-{fault}"
    fleet = _fleet(name, backend, executor, {"pipeline": 2}, "fork", shared_dir, shared_cli)
    fleet.spec["limits"] = {**fleet.spec.get("limits", {}), "restarts": 0}
    try:
        code, document = fleet.up("--nodes", "2", timeout=400)
        assert code == 0, document["error"]
        follower = document["replicas"][0]["nodes"][1]["node"]
        running = engine_processes(name)
        assert set(running.values()) == {node["node"] for node in document["replicas"][0]["nodes"]}
        if fault == "power":
            bed.kill(follower)
        else:
            os.kill(max(pid for pid, node in running.items() if node == follower), 9)
        assert eventually(lambda: engine_processes(name) == {}, 15.0), engine_processes(name)
        assert eventually(lambda: fleet.status()[1]["finished"], 90.0)
        code, document = fleet.status()
        assert (code, document["error"]["where"]) == (1, f"node {follower}")
    finally:
        bed.repair(wait_idle=False)
        fleet.down()
        bed.repair()


@pytest.mark.acceptance
@pytest.mark.usefixtures("engine_ready", "bootstrapped")
@pytest.mark.parametrize(("backend", "fault"), [("ssh", "remap-failed"), ("slurm", "nvlink")])
def test_up_swaps_an_unfit_node_and_the_real_engine_serves_on_the_others(
    backend, fault, shared_dir, shared_cli
):
    for host in ("h1", "h2", "h3", "h4"):
        bed.gpus(host)
    bed.fault("h1", 3, fault)
    name = f"s-{backend}-{fault}"
    fleet = _fleet(name, backend, "mp", {"pipeline": 2}, "fork", shared_dir, shared_cli)
    try:
        code, document = fleet.up("--nodes", "2", timeout=400)
        assert code == 0, document["error"]
        nodes = [node["node"] for node in document["replicas"][0]["nodes"]]
        assert "h1" not in nodes
        assert [held["node"] for held in document["cordoned"]] == ["h1"]
        assert ask(document, tokens=4)
    finally:
        fleet.down()
        for host in ("h1", "h2", "h3", "h4"):
            hardware.clear(host)


@pytest.mark.usefixtures("engine_ready", "bootstrapped")
def test_a_slow_link_is_named_by_collectives_in_the_engines_own_environment(
    shared_dir, shared_cli
):
    """The other links run at ten times the rate; the slow one is no fault of its neighbours."""
    fleet = _fleet("c-slow", "ssh", "mp", {"pipeline": 2}, "fork", shared_dir, shared_cli)
    hosts = ("h1", "h2", "h3", "h4")
    for host in hosts:
        bed.slow(host, "100mbit" if host == "h3" else "1gbit")
    try:
        looked = fleet.cli("preflight", "-f", fleet.file, "--level", "fabric", "--json")
    finally:
        for host in hosts:
            bed.heal(host)
    assert looked.returncode == 3, looked.stderr
    nodes = json.loads(looked.stdout)["nodes"]
    unfit = {node for node in hosts if nodes[node]["verdict"] == "unhealthy"}
    assert unfit == {"h3"}
    (finding,) = [f for f in nodes["h3"]["findings"] if f["check"] == "collective"]
    assert "to its neighbours" in finding["message"]


@pytest.mark.usefixtures("engine_ready", "bootstrapped")
def test_a_link_cut_in_the_middle_of_a_collective_check_names_its_host(shared_dir, shared_cli):
    fleet = _fleet("c-cut", "ssh", "mp", {"pipeline": 2}, "fork", shared_dir, shared_cli)
    looking = fleet.cli.start("preflight", "-f", fleet.file, "--level", "fabric", "--json")
    try:
        assert eventually(lambda: _meets("h2"), 60)
        bed.cut("h2")
        output, _ = looking.communicate(timeout=200)
    finally:
        looking.kill()
        looking.communicate()
        bed.repair()
    assert looking.returncode == 3
    nodes = json.loads(output)["nodes"]
    assert {node for node in nodes if nodes[node]["verdict"] == "unhealthy"} == {"h2"}


def _meets(host: str) -> bool:
    """Whether a worker of the collective check runs on this host."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                rows = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"LAUNCHER_NODE={host}".encode() in rows and any(
                row.startswith(b"LAUNCHER_COLLECTIVE=") for row in rows
            ):
                return True
    return False


def _fleet(name, backend, executor, parallelism, start, shared_dir, shared_cli) -> FleetUnderTest:
    """The example of this backend with another executor and layout."""
    example = yaml.safe_load((ROOT / f"examples/{backend}.yaml").read_text())
    del example["name"]
    spec = {
        **example,
        "model": str(ROOT / "models/tiny"),
        "runtime": {"venv": str(ROOT / ".venv/engine")},
        "executor": executor,
        "parallelism": parallelism,
        "env": {**example["env"], "CPU_ENGINE_START_METHOD": start},
    }
    if backend == "ssh":
        spec["backend"] = {"ssh": {"inventory": str(ROOT / ".testbed/inventory.yaml")}}
    return FleetUnderTest(shared_dir, shared_cli, name, spec)


def _streams(document: dict) -> None:
    from openai import OpenAI

    key = Path(document["api_key_file"]).read_text().strip()
    client = OpenAI(base_url=document["endpoint"], api_key=key, max_retries=0, timeout=60)
    names = {model.id for model in client.models.list()}
    assert {document["fleet"], "tiny"} <= names
    stream = client.chat.completions.create(
        model=document["fleet"],
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=8,
        stream=True,
    )
    assert sum(1 for part in stream if part.choices) >= 8


@pytest.mark.usefixtures("engine_ready")
def test_a_ray_worker_without_the_token_is_refused(shared_dir, cluster):
    """Ray's token authentication is on: whoever lacks the file does not get in."""
    state = shared_dir / "state"
    cli = Cli({**os.environ, "LAUNCHER_STATE_DIR": str(state)}, shared_dir)
    example = yaml.safe_load((ROOT / "examples/local.yaml").read_text())
    spec = {
        **example,
        "model": str(ROOT / "models/tiny"),
        "runtime": {"venv": str(ROOT / ".venv/engine")},
    }
    del spec["name"]
    fleet = FleetUnderTest(shared_dir, cli, "e-token", spec)
    try:
        code, _ = fleet.up(timeout=300)
        assert code == 0
        assignment = json.loads(
            (state / "e-token/runs/1/r1.a1/nodes/n1/assignment.json").read_text()
        )
        member = assignment["member"]
        address = f"{member['leader_address']}:{member['ports']['rendezvous']}"
        question = f"import ray; ray.init({address!r}); print('let in')"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        answer = subprocess.run(
            [str(ROOT / ".venv/engine/bin/python"), "-c", question],
            env={**environment, "HOME": str(shared_dir)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "let in" not in answer.stdout
        assert "uthenticat" in answer.stderr
    finally:
        fleet.down()
