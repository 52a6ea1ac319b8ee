"""Preflight on the testbed: simulated GPUs on real hosts, over real sshd and real Slurm."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cluster import bed, faults, hardware
from tests.cluster.hostfaults import HOST_FAULTS
from tests.conftest import ROOT
from tests.launcher.fleets import FleetUnderTest, ask, engine_processes, eventually, fake_spec
from tests.launcher.test_cluster_fleet import hosts_of

pytestmark = pytest.mark.cluster
HOSTS = ("h1", "h2", "h3", "h4")


@pytest.fixture(scope="module")
def gpus(cluster):
    """Four hosts of eight simulated H100s, for as long as this module runs."""
    for host in HOSTS:
        bed.gpus(host)
    yield
    for host in HOSTS:
        hardware.clear(host)


@pytest.fixture
def healthy(gpus):
    yield
    for host in HOSTS:
        bed.gpus(host)


@pytest.fixture(params=["ssh", "slurm"])
def backend(request, healthy, bootstrapped):
    if request.param == "ssh":
        return {"ssh": {"inventory": str(ROOT / ".testbed/inventory.yaml")}}
    return {"slurm": {"partition": "gpu", "walltime": "30m"}}


@pytest.fixture
def fleet(backend, shared_cli, shared_dir, fake_engine, shared_model, fleet_name):
    spec = fake_spec(backend, shared_model, fake_engine)
    made = FleetUnderTest(shared_dir, shared_cli, fleet_name, spec)
    yield made
    made.down()
    bed.repair()
    assert engine_processes(fleet_name) == {}


def preflight(fleet, *words):
    result = fleet.cli("preflight", "-f", fleet.file, "--json", *words)
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout)


def findings(document, node):
    return {(f["check"], f["device"]): f for f in document["nodes"][node]["findings"]}


def test_a_healthy_set_passes_and_folds_into_one_line(fleet):
    code, document = preflight(fleet, "--level", "passive")
    assert code == 0, document
    assert document["fit"]
    text = fleet.cli("preflight", "-f", fleet.file, "--level", "passive")
    assert text.stdout.startswith("h[1-4]: healthy")
    assert text.returncode == 0


@pytest.mark.parametrize("backend", ["ssh"], indirect=True)
def test_several_faults_on_several_nodes_are_each_named_with_their_device(fleet):
    given = {
        "h1": (0, "nvlink"),
        "h2": (3, "remap-failed"),
        "h3": (5, "port-rate"),
        "h4": (7, "xid-79"),
    }
    for host, (index, name) in given.items():
        bed.fault(host, index, name)
    code, document = preflight(fleet, "--level", "passive")
    assert code == 3
    for host, (index, name) in given.items():
        fault = faults.FAULTS[name]
        found = findings(document, host)
        key = (fault.check, faults.device_of(fault, index))
        assert key in found, (host, list(found))
        assert found[key]["verdict"] == fault.verdict
    text = fleet.cli("preflight", "-f", fleet.file, "--level", "passive", "h2").stdout
    assert "GPU 3" in text
    assert "row remap failed" in text
    assert "repeat on h2: nvidia-smi -q -i 3 -d ROW_REMAPPER" in text


def test_up_swaps_an_unfit_node_quarantines_it_and_tells_the_story(fleet):
    bed.fault("h2", 3, "remap-failed")
    bed.fault("h1", 0, "hang")
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert sorted(hosts_of(document)) == ["h3", "h4"]
    assert ask(document) == "x"
    held = {one["node"]: one for one in document["cordoned"]}
    assert held["h2"]["reason"] == "GPU 3: row remap failed"
    assert "NVML hangs" in held["h1"]["reason"]
    text = fleet.cli("status", "--fleet", fleet.name).stdout
    assert "swapped out by preflight" in text
    assert "cordoned h2: GPU 3: row remap failed (quarantined" in text


def test_without_another_node_up_refuses_with_the_node_and_the_device(fleet):
    bed.fault("h1", 3, "remap-failed")
    fleet.spec["nodes"] = 4
    fleet.spec["parallelism"] = {"pipeline": 4}
    code, document = fleet.up()
    assert code == 3
    assert document["error"]["where"] == "node h1, check gpu.remap_failed"
    assert document["error"]["message"] == "GPU 3: row remap failed"
    assert "No other node is free" in document["error"]["hint"]
    assert fleet.cli("cordon", "h1", "--reason", "x", "-f", fleet.file).returncode == 0


@pytest.mark.parametrize("backend", ["ssh"], indirect=True)
def test_a_cordon_keeps_a_node_out_until_it_is_lifted(fleet):
    assert (
        fleet.cli("cordon", "h[1-2]", "--reason", "new cables", "-f", fleet.file).returncode == 0
    )
    nodes = json.loads(fleet.cli("nodes", "-f", fleet.file, "--json").stdout)
    assert set(nodes["cordons"]) == {"h1", "h2"}
    assert "new cables" in fleet.cli("nodes", "-f", fleet.file).stdout
    code, document = fleet.up()
    assert code == 0
    assert sorted(hosts_of(document)) == ["h3", "h4"]
    assert fleet.down() == 0
    fleet.spec["nodes"] = 3
    fleet.spec["parallelism"] = {"pipeline": 3}
    code, document = fleet.up()
    assert code == 5
    assert "2 of them cordoned (h[1-2])" in document["error"]["message"]
    bed.fault("h1", 2, "ecc")
    lifted = fleet.cli("uncordon", "h[1-2]", "-f", fleet.file)
    assert lifted.returncode == 3
    assert "h2 takes work again" in lifted.stderr
    assert fleet.cli("uncordon", "h1", "--force", "-f", fleet.file).returncode == 0
    nodes = json.loads(fleet.cli("nodes", "-f", fleet.file, "--json").stdout)
    assert nodes["cordons"] == {}


@pytest.mark.parametrize("backend", ["ssh"], indirect=True)
def test_a_passed_preflight_lifts_a_quarantine_and_no_persons_cordon(fleet):
    bed.fault("h1", 1, "lost")
    code, document = fleet.up()
    assert code == 0, document["error"]
    fleet.cli("cordon", "h4", "--reason", "mine", "-f", fleet.file)
    bed.gpus("h1")
    code, document = preflight(fleet, "--level", "quick", "h1", "h4")
    assert code == 0, document
    assert document["quarantine_lifted"] == ["h1"]
    nodes = json.loads(fleet.cli("nodes", "-f", fleet.file, "--json").stdout)
    assert set(nodes["cordons"]) == {"h4"}


@pytest.mark.parametrize("backend", ["ssh"], indirect=True)
def test_a_recording_is_judged_again_with_other_thresholds(fleet, shared_dir):
    bed.fault("h2", 3, "remap-full")
    record = shared_dir / "record"
    assert preflight(fleet, "--level", "passive", "--record", str(record))[0] == 3
    bed.gpus("h2")
    code, document = preflight(fleet, "--replay", str(record))
    assert code == 3
    assert ("gpu.remap_total", "GPU 3") in findings(document, "h2")
    (shared_dir / "limits.yaml").write_text("remapped_rows_max: 10000\n")
    limits = ("--thresholds", str(shared_dir / "limits.yaml"))
    assert preflight(fleet, "--replay", str(record), *limits)[0] == 0
    (shared_dir / "limits.yaml").write_text("remaped_rows: 1\n")
    wrong = fleet.cli("preflight", "-f", fleet.file, "--replay", str(record), *limits)
    assert wrong.returncode == 2
    assert "remaped_rows" in wrong.stderr
    (record / "h3.json").write_text("{")
    broken = fleet.cli("preflight", "-f", fleet.file, "--replay", str(record))
    assert broken.returncode == 1
    assert "h3.json" in broken.stderr


@pytest.mark.parametrize("backend", ["ssh"], indirect=True)
@pytest.mark.parametrize("name", HOST_FAULTS)
def test_a_fault_of_the_host_is_named_and_the_others_stay_healthy(fleet, shared_model, name):
    (shared_model / "model.safetensors").write_bytes(b"\0" * 64 * 1024**2)
    fault = HOST_FAULTS[name]
    with fault.given("h2"):
        code, document = preflight(fleet, "--level", fault.level)
    assert code == 3, document
    found = findings(document, "h2")
    assert (fault.check, fault.device) in found, list(found)
    assert found[fault.check, fault.device]["verdict"] == "unhealthy"
    assert fault.message in found[fault.check, fault.device]["message"]
    others = [node for node in document["nodes"] if node != "h2"]
    assert all(document["nodes"][node]["verdict"] == "healthy" for node in others), document


@pytest.mark.parametrize("backend", ["ssh"], indirect=True)
def test_the_wrong_interface_is_refused_with_what_to_write(fleet):
    fleet.spec["interface"] = "ib0"
    code, document = fleet.up()
    assert code == 3
    assert "no interface ib0 with an IPv4 address on h1, h2" in document["error"]["message"]


@pytest.mark.parametrize("backend", ["ssh"], indirect=True)
def test_healthy_hosts_under_full_load_raise_no_alarm(fleet):
    """Five rounds of four hosts; the acceptance run makes fifty."""
    _no_alarm(fleet, "passive", 5)


@pytest.mark.acceptance
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", ["ssh"], indirect=True)
def test_two_hundred_looks_and_ten_quick_rounds_under_full_load_raise_no_alarm(fleet):
    _no_alarm(fleet, "passive", 50)
    _no_alarm(fleet, "quick", 10)


def _no_alarm(fleet, level, rounds):
    # The load ends with us, also if we are killed.
    burn = ["sh", "-c", "while [ -d /proc/$PPID ]; do :; done"]
    burners = [subprocess.Popen(burn) for _ in range(2)]
    try:
        for _ in range(rounds):
            code, document = preflight(fleet, "--level", level)
            assert code == 0, document
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


@pytest.mark.parametrize("backend", ["ssh"], indirect=True)
def test_an_xid_while_serving_is_in_the_status_at_once_and_ends_nothing(fleet):
    code, document = fleet.up()
    assert code == 0
    leader = hosts_of(document)[0]
    bed.fault(leader, 3, "xid-31")

    def told():
        document = fleet.status()[1]
        node = document["replicas"][0]["nodes"][0]
        return any("XID 31" in doubt for doubt in node["doubts"])

    assert eventually(told, 20.0), "NVML's event makes the agent look at once"
    code, document = fleet.status()
    assert (code, document["phase"]) == (0, "serving")
    text = fleet.cli("status", "--fleet", fleet.name).stdout
    assert f"doubtful {leader}: GPU" in text


@pytest.mark.parametrize("backend", ["slurm"], indirect=True)
def test_an_operators_cordon_drains_in_slurm_and_lifts_only_its_own(fleet):
    def reason(node):
        row = subprocess.run(
            ["sinfo", "-h", "-N", "-n", node, "-o", "%T %E"], capture_output=True, text=True
        )
        return row.stdout.strip()

    other = ["scontrol", "update", "NodeName=h4", "State=DRAIN", "Reason=dust"]
    subprocess.run(other, check=True)
    try:
        done = fleet.cli("cordon", "h[3-4]", "--reason", "new 'fan'", "--drain", "-f", fleet.file)
        assert done.returncode == 0, done.stderr
        assert "h4 is drained in Slurm already (dust)" in done.stderr
        assert reason("h3") == "drained launcher: new 'fan'"
        assert reason("h4") == "drained dust"
        lifted = fleet.cli("uncordon", "h[3-4]", "--force", "-f", fleet.file)
        assert lifted.returncode == 0
        assert reason("h3").startswith("idle")
        assert reason("h4") == "drained dust"
    finally:
        subprocess.run(["scontrol", "update", "NodeName=h[3-4]", "State=RESUME"], check=False)


def test_a_pool_that_does_not_exist_and_a_node_that_is_not_in_it_are_named(fleet):
    wrong = fleet.cli("preflight", "-f", fleet.file, "--pool", "none")
    assert wrong.returncode == 2
    assert "'none'" in wrong.stderr
    wrong = fleet.cli("preflight", "-f", fleet.file, "h9")
    assert wrong.returncode == 2
    assert "h9 is not in the pool" in wrong.stderr
    wrong = fleet.cli("preflight", "-f", fleet.file, "--level", "qick")
    assert wrong.returncode == 2
    assert "passive, quick, fabric, deep" in wrong.stderr


def test_memlock_of_an_ordinary_user(bootstrapped):
    asked = json.dumps({"node": "h1"})
    python = Path("/root/.local/share/launcher")
    answer = subprocess.run(
        bed.on(
            "h1",
            "setpriv",
            "--bounding-set",
            "-ipc_lock",
            "--inh-caps",
            "-ipc_lock",
            "prlimit",
            "--memlock=65536",
            *_probes(python),
        ),
        input=asked + "\n",
        capture_output=True,
        text=True,
    )
    from health.evidence import NodeEvidence
    from health.judge import judge

    facts = judge(NodeEvidence.model_validate_json(answer.stdout))
    (found,) = [f for f in facts.findings if f.check == "host.memlock"]
    assert (found.verdict, found.value) == ("unhealthy", "65536")


def _probes(install: Path) -> list[str]:
    (python,) = install.glob("*/venv/bin/python")
    return [str(python), "-m", "health.collect"]
