"""Preflight on the testbed: simulated GPUs on real hosts, over real sshd and real Slurm."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cluster import bed, faults, hardware
from tests.conftest import ROOT
from tests.launcher.fleets import FleetUnderTest, ask
from tests.launcher.test_cluster_fleet import engine_processes, hosts_of, on

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
    made = FleetUnderTest(
        shared_dir,
        shared_cli,
        fleet_name,
        {
            "model": str(shared_model),
            "nodes": 2,
            "gpus_per_node": 1,
            "parallelism": {"pipeline": 2},
            "executor": "mp",
            "runtime": {"venv": str(fake_engine)},
            "limits": {"drain": "5s", "start": "30s"},
            "backend": backend,
        },
    )
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
class TestTheHostItself:
    """Faults of a host that are no fault of its GPUs, each through the real channel."""

    def one(self, fleet, host, check, *, level="passive", device=None):
        code, document = preflight(fleet, "--level", level)
        found = [
            f
            for f in document["nodes"][host]["findings"]
            if f["check"] == check and device in (None, f["device"])
        ]
        assert found, document["nodes"][host]["findings"]
        others = [n for n in document["nodes"] if n != host]
        assert all(document["nodes"][n]["verdict"] == "healthy" for n in others), document
        return code, found[0]

    def test_small_shared_memory(self, fleet):
        on("h2", "mount", "-o", "remount,size=64m", "/dev/shm")
        try:
            code, found = self.one(fleet, "h2", "disk.free", device="/dev/shm")
        finally:
            on("h2", "mount", "-o", "remount,size=2g", "/dev/shm")
        assert code == 3
        assert "64 MiB free" in found["message"]

    def test_a_full_nvme(self, fleet, shared_model):
        (shared_model / "model.safetensors").write_bytes(b"\0" * 64 * 1024**2)
        on("h3", "fallocate", "-l", "1000m", "/nvme0/full")
        try:
            code, found = self.one(fleet, "h3", "disk.free", device="/nvme0")
        finally:
            on("h3", "rm", "/nvme0/full")
        assert code == 3
        assert found["advice"] == "clean up"

    def test_a_hung_mount(self, fleet):
        script = ROOT / "tests/cluster/hungmount.py"
        folder = ROOT / ".testbed/hung"
        folder.mkdir(exist_ok=True)
        child = subprocess.Popen(
            bed.on("h2", "/usr/bin/python3", str(script), str(folder)),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert child.stdout.readline().strip() == "mounted"
            code, found = self.one(fleet, "h2", "mount")
        finally:
            on("h2", "umount", "-l", str(folder))
            child.kill()
            child.wait()
            child.stdout.close()
        assert code == 3
        assert "does not answer" in found["message"]

    def test_a_clock_ahead(self, fleet):
        library = bed.clock_library()
        bed.shift_clock("h4", library, 30)
        try:
            code, found = self.one(fleet, "h4", "host.clock_offset")
        finally:
            bed.shift_clock("h4", library, 0)
        assert code == 3
        assert "s ahead of ours" in found["message"]

    def test_sshd_hangs_after_connect(self, fleet):
        bed.stop_sshd("h3", hang=True)
        try:
            code, found = self.one(fleet, "h3", "reach")
        finally:
            bed.stop_sshd("h3", hang=False)
        assert code == 3
        assert "could not be looked at" in found["message"]

    def test_another_nccl(self, fleet, fake_engine):
        info = fake_engine / "lib/nvidia_nccl_cu12-2.27.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: nvidia-nccl-cu12\nVersion: 2.27.3\n"
        )
        other = fake_engine / "other-METADATA"
        other.write_text((info / "METADATA").read_text().replace("2.27.3", "2.21.5"))
        on("h2", "mount", "--bind", str(other), str(info / "METADATA"))
        try:
            code, found = self.one(fleet, "h2", "parity.nccl", level="quick")
        finally:
            on("h2", "umount", str(info / "METADATA"))
            (info / "METADATA").unlink()
            info.rmdir()
        assert code == 3
        assert found["message"] == "nccl 2.21.5 where the other nodes have 2.27.3"

    def test_another_driver(self, fleet):
        state = hardware.read_state(hardware.tree("h1"))
        hardware.write_state(hardware.tree("h1"), {**state, "driver": "550.54.15"})
        code, found = self.one(fleet, "h1", "parity.driver")
        assert code == 3
        assert found["value"] == "550.54.15"

    def test_memlock_of_an_ordinary_user(self, fleet):
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
