"""Fleets on the testbed with the fake engine: real Slurm, real sshd, hosts that lose power."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import bed
from tests.cluster.hosts import address
from tests.conftest import ROOT
from tests.launcher.fleets import FleetUnderTest, ask, engine_processes, eventually, fake_spec

pytestmark = pytest.mark.cluster
BACKENDS = ("slurm", "ssh")


@pytest.fixture(params=BACKENDS)
def backend(request, cluster):
    if request.param == "ssh":
        request.getfixturevalue("bootstrapped")
        return {"ssh": {"inventory": str(ROOT / ".testbed/inventory.yaml")}}
    return {"slurm": {"partition": "gpu", "walltime": "30m"}}


@pytest.fixture
def fleet(backend, shared_cli, shared_dir, fake_engine, shared_model, fleet_name):
    spec = fake_spec(backend, shared_model, fake_engine)
    made = FleetUnderTest(shared_dir, shared_cli, fleet_name, spec)
    yield made
    bed.repair(wait_idle=False)
    made.down()
    bed.repair()
    assert engine_processes(fleet_name) == {}


def hosts_of(document: dict) -> list[str]:
    """The nodes of the first replica, the leader first."""
    assert document["error"] is None, document["error"]
    return [node["node"] for node in document["replicas"][0]["nodes"]]


def on(host: str, *command: str) -> str:
    return subprocess.run(bed.on(host, *command), capture_output=True, text=True).stdout


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_up_on_two_hosts_answers_and_down_leaves_nothing(fleet, executor):
    fleet.spec["executor"] = executor
    code, document = fleet.up("--nodes", "2")
    assert code == 0, document
    assert ask(document) == "x"
    assert document["endpoint"].startswith("http://10.77.0.1")
    hosts = hosts_of(document)
    assert len(set(hosts)) == 2
    assert fleet.down() == 0
    assert engine_processes(fleet.name) == {}
    for host in hosts:
        assert "fl-" not in on(host, "ls", "/tmp")
        assert "launcher.agent" not in on(host, "ps", "-eo", "args").replace("ps -eo", "")
    assert fleet.down() == 0


def test_the_cli_killed_in_up_then_up_again_is_one_job_and_one_replica(fleet):
    first = fleet.cli.start("up", "-f", fleet.file)
    assert eventually(lambda: engine_processes(fleet.name))
    first.kill()
    first.communicate()
    code, document = fleet.up()
    assert code == 0
    assert document["run"] == 1
    assert sorted(engine_processes(fleet.name).values()) == sorted(hosts_of(document))
    if "slurm" in fleet.spec["backend"]:
        names = subprocess.run(["squeue", "-h", "-o", "%j"], capture_output=True, text=True).stdout
        assert names.split().count(f"{fleet.name}.r1.a1") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_loses_power_is_named_and_its_peers_are_fenced_within_15_s(fleet, rank):
    code, document = fleet.up()
    assert code == 0
    victim = hosts_of(document)[rank]
    bed.kill(victim)
    began = time.monotonic()
    assert eventually(lambda: engine_processes(fleet.name) == {}, 15.0), "fenced within 15 s"
    assert time.monotonic() - began < 15
    assert eventually(lambda: fleet.status()[1]["finished"], 90.0)
    code, document = fleet.status()
    assert code == 1
    phases = {node["node"]: node for node in document["replicas"][0]["nodes"]}
    assert phases[victim]["phase"] == "lost"
    assert phases[victim]["lost_since"] == pytest.approx(time.time(), abs=120)
    assert document["error"]["where"] == f"node {victim}"
    text = fleet.cli("status", "--fleet", fleet.name)
    assert text.returncode == 1
    assert f"lost {victim}" in text.stdout


def test_a_cut_link_ends_the_engines_on_both_sides(fleet):
    follower = hosts_of(fleet.up()[1])[1]
    bed.cut(follower)
    assert eventually(lambda: engine_processes(fleet.name) == {}, 15.0), (
        "the cut host fences itself, too"
    )
    bed.heal(follower)
    assert eventually(lambda: fleet.status()[1]["finished"], 60.0)
    assert engine_processes(fleet.name) == {}


def test_an_engine_worker_killed_takes_the_other_node_down_within_15_s(fleet):
    follower = hosts_of(fleet.up()[1])[1]
    pid = next(pid for pid, node in engine_processes(fleet.name).items() if node == follower)
    os.kill(pid, 9)
    assert eventually(lambda: engine_processes(fleet.name) == {}, 15.0)
    assert eventually(lambda: fleet.status()[1]["finished"], 30.0)
    code, document = fleet.status()
    assert (code, document["error"]["where"]) == (1, f"node {follower}")


def test_a_killed_controller_is_replaced_while_a_host_is_away(fleet):
    follower = hosts_of(fleet.up()[1])[1]
    folder = Path(fleet.cli.environment["LAUNCHER_STATE_DIR"]) / fleet.name
    os.kill(json.loads((folder / "controller.json").read_text())["pid"], 9)
    bed.kill(follower)
    assert eventually(lambda: engine_processes(fleet.name) == {}, 15.0), (
        "leases need no controller"
    )
    code, document = fleet.up(timeout=120)
    assert code == 1
    assert document["error"]["where"] == f"node {follower}"


def test_what_render_writes_is_what_ran(fleet):
    out = fleet.folder / "out"
    assert fleet.cli("render", "-f", fleet.file, "--out", str(out)).returncode == 0
    assert fleet.up()[0] == 0
    kept = Path(fleet.cli.environment["LAUNCHER_STATE_DIR"]) / fleet.name / "runs/1"
    for file in (file for file in out.rglob("*") if file.is_file()):
        assert file.read_bytes() == (kept / "rendered" / file.relative_to(out)).read_bytes()
    if "slurm" in fleet.spec["backend"]:
        job = subprocess.run(
            ["scontrol", "write", "batch_script", _job_of(fleet), "-"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert job.stdout == (out / "r1.a1/replica.sbatch").read_text()


def _job_of(fleet) -> str:
    return fleet.status()[1]["replicas"][0]["allocation"].split()[-1]


@pytest.mark.parametrize("backend", ["ssh"], indirect=True)  # Slurm's state folder is shared
def test_a_full_disk_on_one_host_is_refused_with_exit_code_3(fleet):
    base = Path.home() / ".local/state/launcher" / fleet.name
    full = ("mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "full", str(base))
    base.mkdir(parents=True, exist_ok=True)
    on("h2", *full)
    fleet.spec["backend"]["ssh"]["nodes"] = "h[1-2]"  # no other host to take its place
    try:
        code, document = fleet.up()
    finally:
        on("h2", "umount", "-l", str(base))
    assert code == 3
    assert "h2" in document["error"]["where"]
    assert "MiB free" in document["error"]["message"]


@pytest.mark.usefixtures("cluster")
class TestSlurmRefuses:
    @pytest.fixture
    def spec(self, shared_cli, shared_dir, fake_engine, shared_model, fleet_name):
        made = FleetUnderTest(
            shared_dir,
            shared_cli,
            fleet_name,
            {
                "model": str(shared_model),
                "nodes": 2,
                "gpus_per_node": 1,
                "parallelism": {"pipeline": 2},
                "runtime": {"venv": str(fake_engine)},
                "backend": {"slurm": {"partition": "gpu"}},
            },
        )
        yield made
        made.down()

    def test_a_partition_that_does_not_exist(self, spec):
        spec.spec["backend"] = {"slurm": {"partition": "gqu"}}
        code, document = spec.up()
        assert code == 2
        assert "gpu" in document["error"]["hint"]

    def test_more_nodes_than_the_partition_has(self, spec):
        spec.spec["parallelism"] = {"pipeline": 9}
        code, document = spec.up("--nodes", "9")
        assert code == 5
        assert "4" in document["error"]["message"]

    def test_more_gpus_than_a_node_has(self, spec):
        spec.spec["gpus_per_node"] = 9
        assert spec.up()[0] == 2

    def test_a_queue_deadline_with_the_reason_and_no_job_left(self, spec):
        held = subprocess.run(
            ["sbatch", "--parsable", "-N4", "--exclusive", "--wrap", "sleep 60"],
            capture_output=True,
            text=True,
            check=True,
            cwd="/",
        ).stdout.strip()
        try:
            spec.spec["limits"] = {"queue": "3s"}
            code, document = spec.up()
            assert code == 4
            assert "Resources" in document["error"]["message"]
            listed = subprocess.run(["squeue", "-h", "-o", "%j"], capture_output=True, text=True)
            assert spec.name not in listed.stdout
        finally:
            subprocess.run(["scancel", held], check=True)

    def test_scancel_by_somebody_is_told_and_a_new_job_takes_over(self, spec):
        assert spec.up()[0] == 0
        first = _job_of(spec)
        subprocess.run(["scancel", first], check=True)
        assert eventually(lambda: spec.status()[1]["replicas"][0]["generation"] == 2, 60.0)
        assert eventually(lambda: spec.status()[0] == 0, 60.0)
        replica = spec.status()[1]["replicas"][0]
        assert first in replica["story"][-2]
        assert first not in replica["allocation"]

    def test_the_one_off_probe_runs_on_a_node(self, spec):
        result = spec.cli("bootstrap", "-f", spec.file)
        assert result.returncode == 0, result.stderr
        assert "runs launcher" in result.stderr


@pytest.mark.usefixtures("cluster", "bootstrapped")
class TestSshRefuses:
    @pytest.fixture
    def spec(self, shared_cli, shared_dir, fake_engine, shared_model, fleet_name):
        for name in ("ssh_config", "known_hosts"):
            text = (ROOT / ".testbed" / name).read_text()
            (shared_dir / name).write_text(
                text.replace(str(ROOT / ".testbed/known_hosts"), str(shared_dir / "known_hosts"))
            )
        made = FleetUnderTest(
            shared_dir,
            shared_cli,
            fleet_name,
            {
                "model": str(shared_model),
                "nodes": 2,
                "gpus_per_node": 1,
                "parallelism": {"pipeline": 2},
                "runtime": {"venv": str(fake_engine)},
                "backend": {"ssh": {"inventory": str(shared_dir / "inventory.yaml")}},
            },
        )
        self.inventory(made, "[h1, h2]")
        return made

    @staticmethod
    def inventory(made, hosts: str) -> None:
        text = f"ssh_config: ssh_config\npools: {{default: {hosts}}}\n"
        (made.folder / "inventory.yaml").write_text(text)

    def test_an_unreachable_host(self, spec):
        self.inventory(spec, "[h1, {name: h9, host: 10.77.0.99}]")
        config = spec.folder / "ssh_config"
        config.write_text(config.read_text() + "Host 10.77.*\n  UserKnownHostsFile /dev/null\n")
        code, document = spec.up()
        assert code == 5
        assert document["error"]["where"] == "h9"

    def test_a_wrong_key(self, spec):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(spec.folder / "wrong")],
            check=True,
        )
        config = spec.folder / "ssh_config"
        config.write_text(
            config.read_text().replace(
                str(ROOT / ".testbed/id_ed25519"), str(spec.folder / "wrong")
            )
        )
        code, document = spec.up()
        assert code == 5
        assert "refused our keys" in document["error"]["message"]

    def test_a_host_key_that_nobody_vouched_for_shows_the_fingerprint(self, spec):
        (spec.folder / "known_hosts").write_text("")
        code, document = spec.up()
        assert code == 5
        assert "SHA256:" in document["error"]["message"]

    def test_a_host_key_that_changed(self, spec):
        known = (spec.folder / "known_hosts").read_text().splitlines()
        h1 = next(line for line in known if line.startswith("h1,"))
        h2 = next(line for line in known if line.startswith("h2,"))
        swapped = [h1, h2.split(" ")[0] + " " + h1.split(" ", 1)[1]]
        (spec.folder / "known_hosts").write_text("\n".join(swapped) + "\n")
        code, document = spec.up()
        assert code == 5
        assert "has changed" in document["error"]["message"]

    def test_too_few_hosts(self, spec):
        self.inventory(spec, "[h1]")
        assert spec.up()[0] == 5

    def test_a_host_without_launcher_says_how_to_get_it(self, spec, tmp_path):
        (spec.folder / "elsewhere").mkdir()
        result = subprocess.run(
            bed.on(
                "h3",
                "mount",
                "--bind",
                str(spec.folder / "elsewhere"),
                str(Path.home() / ".local/share/launcher"),
            ),
        )
        assert result.returncode == 0
        try:
            self.inventory(spec, "[h1, h3]")
            code, document = spec.up()
        finally:
            on("h3", "umount", str(Path.home() / ".local/share/launcher"))
        assert code == 2
        assert "bootstrap" in document["error"]["hint"]


BIG = ("mypy*", "ruff*", "hypothesis*", "openai*", "cryptography*", "pip*", "setuptools*")


@pytest.fixture
def public_dir(cluster, fake_engine):
    """What every user of the machine may read, wherever this checkout lies: model, fake engine,
    and launcher in a venv of the system's Python. On the file system that all hosts share."""
    folder = Path(f"/var/tmp/launcher-tests-{os.getpid()}")
    folder.mkdir(mode=0o755)
    shutil.copytree(fake_engine, folder / "engine")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    subprocess.run(
        ["/usr/bin/python3", "-m", "venv", "--without-pip", str(folder / "venv")], check=True
    )
    site = next((folder / "venv/lib").glob("python3*/site-packages"))
    ours = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    left_out = shutil.ignore_patterns(*BIG, "__pycache__", "__editable__*")
    shutil.copytree(ours, site, dirs_exist_ok=True, ignore=left_out)
    for package in ("launcher", "health", "inventory", "sbatch_templates"):
        shutil.copytree(ROOT / package, site / package, ignore=left_out)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_two_users_on_the_same_hosts_do_not_touch_each_other(public_dir):
    """Processes, ports, folders: whoever goes down leaves the other serving."""
    users_python = public_dir / "venv/bin/python"
    documents = {}
    for user in ("lta", "ltb"):
        home = Path("/home") / user
        spec = home / "fleet.yaml"
        spec.write_text(
            f"name: same\nmodel: {public_dir}/model\nnodes: 2\ngpus_per_node: 1\nexecutor: ray\n"
            f"parallelism: {{pipeline: 2}}\nruntime: {{venv: {public_dir}/engine}}\n"
            "limits: {drain: 5s}\nbackend: {slurm: {partition: gpu, gpu_option: none}}\n"
        )
        documents[user] = json.loads(
            _as_user(users_python, user, "up", "-f", str(spec), "--json").stdout
        )
        assert documents[user]["error"] is None, documents[user]
    try:
        assert documents["lta"]["endpoint"] != documents["ltb"]["endpoint"]
        hosts = [[n["node"] for n in d["replicas"][0]["nodes"]] for d in documents.values()]
        assert hosts == [["h1", "h2"], ["h1", "h2"]], "the point is to share hosts"
        assert _as_user(users_python, "lta", "down", "--fleet", "same").returncode == 0
        assert not [p for p in _processes_of("lta") if "fake_" in p or "launcher" in p]
        status = json.loads(
            _as_user(users_python, "ltb", "status", "--fleet", "same", "--json").stdout
        )
        assert status["phase"] == "serving"
    finally:
        for user in ("lta", "ltb"):
            _as_user(users_python, user, "down", "--fleet", "same")
    assert not [p for p in _processes_of("ltb") if "fake_" in p or "launcher" in p]


def _as_user(python: Path, user: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            "runuser",
            "-u",
            user,
            "--",
            "env",
            "-i",
            f"HOME=/home/{user}",
            f"USER={user}",
            "PATH=/usr/bin:/bin:/usr/sbin",
            str(python),
            "-m",
            "launcher",
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=f"/home/{user}",
        timeout=120,
    )


def _processes_of(user: str) -> list[str]:
    return subprocess.run(
        ["ps", "-u", user, "-o", "args="], capture_output=True, text=True
    ).stdout.splitlines()


@pytest.mark.usefixtures("bootstrapped")
def test_a_host_behind_a_jump_host_is_reached_and_only_that_way(
    shared_cli, shared_dir, fleet_name
):
    """No route of ours leads to h2; h1 reaches it."""
    inventory = shared_dir / "inventory.yaml"
    inventory.write_text(
        f"version: 1\nssh_config: {ROOT}/.testbed/ssh_config\n"
        "pools:\n  default:\n    - {name: h2, jump_host: h1}\n"
    )
    spec = {
        "model": "org/model",
        "nodes": 1,
        "gpus_per_node": 1,
        "backend": {"ssh": {"inventory": str(inventory)}},
    }
    fleet = FleetUnderTest(shared_dir, shared_cli, fleet_name, spec)
    route = ("route", "add", "blackhole", address("h2"))
    subprocess.run(["ip", *route], check=True)
    try:
        looked = fleet.cli("preflight", "-f", fleet.file, "--level", "passive", "--json")
    finally:
        subprocess.run(["ip", "route", "del", "blackhole", address("h2")], check=True)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert json.loads(looked.stdout)["nodes"]["h2"]["verdict"] == "healthy"
