"""A whole fleet on this machine with the fake engine: real CLI, controller, agents, processes."""

import json
import os
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import yaml

from launcher.paths import FleetPaths
from launcher.wish import is_driven
from tests.launcher.fleets import eventually, fake_spec


@pytest.fixture
def fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir):
    made = LocalFleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir)
    yield made
    made.cli("down", "--fleet", fleet_name)
    # The controller has said that all is over a moment before its own process ends.
    assert eventually(lambda: made.processes() == [], 5), made.processes()


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; empty (but for one word) when it has ended meanwhile."""
    try:
        return process.cmdline() or [""]
    except psutil.Error:
        return [""]


class LocalFleet:
    def __init__(self, folder, cli, engine, model, name, state):
        self.folder, self.cli, self.name, self.state = folder, cli, name, state
        self.spec = {"name": name, **fake_spec("local", model, engine)}

    @property
    def file(self) -> str:
        path = self.folder / "fleet.yaml"
        path.write_text(yaml.safe_dump(self.spec))
        return str(path)

    def up(self, *more):
        result = self.cli("up", "-f", self.file, "--json", *more)
        return result.returncode, json.loads(result.stdout), result.stderr

    def status(self):
        result = self.cli("status", "--fleet", self.name, "--json")
        return result.returncode, json.loads(result.stdout)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this fleet: its engines, agents and controller."""
        found = []
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                inside = str(self.state) in words or str(self.state) in process.environ().get(
                    "LAUNCHER_BASE", ""
                )
            except psutil.Error:
                continue
            if inside and process.pid != os.getpid():
                found.append(process)
        return found

    def engines(self) -> list[psutil.Process]:
        return [p for p in self.processes() if any("fake_" in word for word in words_of(p))]


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_up_gives_an_endpoint_that_answers_and_down_leaves_nothing(fleet, executor):
    fleet.spec["executor"] = executor

    def left() -> set[Path]:
        """Another run on this machine, killed half-way, may have left its own."""
        return {*Path("/dev/shm").iterdir(), *Path("/tmp").glob(f"fl-{os.getuid()}-*")}

    before = left()
    code, document, _ = fleet.up()
    assert code == 0
    assert document["endpoint"].endswith("/v1")
    assert document["error"] is None
    key = Path(document["api_key_file"]).read_text().strip()
    assert Path(document["api_key_file"]).stat().st_mode & 0o777 == 0o600
    from openai import OpenAI

    client = OpenAI(base_url=document["endpoint"], api_key=key)
    answer = client.chat.completions.create(
        model=fleet.name, messages=[{"role": "user", "content": "Hello"}]
    )
    assert answer.choices[0].message.content == "x"
    assert document["replicas"][0]["nodes"][0]["phase"] == "serving"
    assert fleet.cli("down", "--fleet", fleet.name).returncode == 0
    # The controller has said that all is over a moment before its own process ends.
    assert eventually(lambda: fleet.processes() == [], 3)
    assert left() <= before
    assert fleet.cli("down", "--fleet", fleet.name).returncode == 0
    assert not list(fleet.state.rglob("r1.a1/secrets/*"))


def test_no_secret_is_in_an_argument_a_script_or_a_log(fleet):
    _, document, _ = fleet.up()
    secrets = [f.read_text().strip() for f in (fleet.state / fleet.name / "secrets").iterdir()]
    assert len(secrets) == 4
    words = "\n".join(" ".join(words_of(process)) for process in fleet.processes())
    written = "\n".join(
        file.read_text(errors="replace")
        for file in fleet.state.rglob("*")
        if file.is_file() and "secrets" not in file.parts
    )
    for secret in secrets:
        assert secret not in words
        assert secret not in written
        assert secret not in json.dumps(document)


def test_a_second_up_joins_the_first_and_a_changed_spec_is_refused(fleet):
    fleet.up()
    engines = {process.pid for process in fleet.engines()}
    code, document, _ = fleet.up()
    assert code == 0
    assert {process.pid for process in fleet.engines()} == engines
    fleet.spec["engine"] = {"args": {"max-model-len": 256}}
    code, document, _ = fleet.up()
    assert code == 2
    assert "engine" in document["error"]["message"]
    assert "down" in document["error"]["hint"]
    assert {process.pid for process in fleet.engines()} == engines


def test_the_cli_killed_in_the_middle_of_up_leaves_one_fleet_that_the_next_up_joins(fleet):
    first = fleet.cli.start("up", "-f", fleet.file)
    assert eventually(lambda: fleet.engines() != [])
    first.send_signal(signal.SIGKILL)
    first.communicate()
    code, document, _ = fleet.up()
    assert code == 0
    assert document["run"] == 1
    assert len([p for p in fleet.engines() if "serve" in words_of(p)]) == 2


def test_ctrl_c_stops_watching_and_not_the_fleet(fleet):
    fleet.spec["env"] = {"FAKE_ENGINE_FAULT": "hang"}
    first = fleet.cli.start("up", "-f", fleet.file)
    assert eventually(lambda: len(fleet.engines()) == 2)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=10)
    assert first.returncode == 130
    assert "the fleet goes on" in said
    assert len(fleet.engines()) == 2


def test_a_killed_controller_is_replaced_and_adopts_what_runs(fleet):
    fleet.up()
    engines = {process.pid for process in fleet.engines()}
    paths = FleetPaths(fleet.state / fleet.name)
    pid = json.loads(paths.controller.read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not is_driven(paths))
    code, document = fleet.status()
    assert "not running" in document["controller"]
    code, document, _ = fleet.up()
    assert code == 0
    assert {process.pid for process in fleet.engines()} == engines
    code, document = fleet.status()
    assert (code, document["controller"], document["run"]) == (0, "running", 1)


def agent_of(fleet, node: str) -> psutil.Process:
    return next(
        p for p in fleet.processes() if words_of(p)[-1] == node and "agent" in str(words_of(p))
    )


def test_an_agent_killed_takes_its_engine_and_the_other_node_with_it(fleet):
    fleet.up()
    agent_of(fleet, "n2").send_signal(signal.SIGKILL)
    assert eventually(lambda: fleet.engines() == [], 15.0), "fenced within 15 s"
    assert eventually(lambda: fleet.status()[1]["finished"], 30.0)
    code, document = fleet.status()
    assert code == 1
    assert document["error"]["where"] == "node n2"
    phases = {n["node"]: n["phase"] for n in document["replicas"][0]["nodes"]}
    assert phases["n2"] == "lost"


@pytest.mark.parametrize("comes", ["down", "an agent"])
def test_what_an_engine_shared_when_it_was_killed_with_its_agent_is_removed(fleet, comes):
    fleet.spec["env"] = {"FAKE_ENGINE_SHARES": fleet.name}
    fleet.up()

    def shared(rank="") -> set[str]:
        return {file.name for file in Path("/dev/shm").glob(f"*{fleet.name}-{rank}*")}

    left = shared("1")
    assert (len(shared("0")), len(left)) == (2, 2)
    paths = FleetPaths(fleet.state / fleet.name)
    note = paths.run(1).base("r1.a1").node("n2").segments
    assert eventually(lambda: note.exists() and all(one in note.read_text() for one in left))
    controller = psutil.Process(json.loads(paths.controller.read_text())["pid"])
    agent = agent_of(fleet, "n2")
    command, environment = agent.cmdline(), agent.environ()
    controller.suspend()
    try:
        for process in (agent, *agent.children(recursive=True)):
            process.kill()
        assert left <= shared()
        if comes == "an agent":
            later = subprocess.Popen(command, env=environment, start_new_session=True)
            assert eventually(lambda: not left & shared())
    finally:
        controller.resume()
    assert fleet.cli("down", "--fleet", fleet.name).returncode == 0
    assert shared() == set()
    if comes == "an agent":
        later.wait(10)


@pytest.mark.parametrize("victim", ["n1", "n2"])
def test_an_engine_process_that_dies_takes_the_replica_down_and_is_named(fleet, victim):
    fleet.up()
    rank = "0" if victim == "n1" else "1"
    process = next(
        p for p in fleet.engines() if words_of(p)[words_of(p).index("--node-rank") + 1] == rank
    )
    process.send_signal(signal.SIGKILL)
    assert eventually(lambda: fleet.engines() == [], 15.0)
    assert eventually(lambda: fleet.status()[1]["finished"], 30.0)
    code, document = fleet.status()
    assert code == 1
    assert document["error"]["where"] == f"node {victim}"
    assert "killed by signal 9" in document["error"]["message"]
    text = fleet.cli("status", "--fleet", fleet.name)
    assert text.returncode == 1
    assert victim in text.stdout
    code, document, _ = fleet.up()
    assert (code, document["run"], document["replicas"][0]["generation"]) == (0, 2, 2)


def test_an_engine_that_exits_with_code_0_has_failed(fleet):
    fleet.spec["env"] = {"FAKE_ENGINE_FAULT": "exit0"}
    fleet.up()
    assert eventually(lambda: fleet.status()[1]["finished"], 30.0)
    code, document = fleet.status()
    assert code == 1
    assert "exited with code 0" in document["error"]["message"]


def test_an_engine_that_crashes_at_start_shows_its_own_error_line(fleet):
    fleet.spec["env"] = {"FAKE_ENGINE_FAULT": "crash"}
    code, document, _ = fleet.up()
    assert code == 1
    assert "head size 7 is not supported" in document["error"]["message"]
    logs = fleet.cli("logs", "--fleet", fleet.name)
    first = logs.stdout.splitlines()[0]
    assert document["error"]["where"].removeprefix("node ") in first


def test_an_engine_that_never_answers_meets_its_deadline(fleet):
    fleet.spec["env"] = {"FAKE_ENGINE_FAULT": "hang"}
    fleet.spec["limits"]["start"] = "4s"
    code, document, _ = fleet.up()
    assert code == 4
    assert "waited for the API server" in document["error"]["message"]


def test_a_port_in_use_is_refused_with_exit_code_3_and_nothing_is_left(fleet):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        fleet.spec["port"] = taken.getsockname()[1]
        code, document, _ = fleet.up()
    assert code == 3
    assert str(fleet.spec["port"]) in document["error"]["message"]
    assert document["error"]["where"] == "port"
    assert fleet.processes() == []


def test_ray_missing_from_the_engine_is_said_before_anything_starts(fleet, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(fleet.spec["runtime"]["venv"], bare)
    shutil.rmtree(bare / "lib/ray-2.60.0.dist-info")
    (bare / "bin/ray").unlink()
    fleet.spec.update(executor="ray", runtime={"venv": str(bare)})
    code, document, _ = fleet.up()
    assert code == 3
    assert "Ray is not in the engine's environment" in document["error"]["message"]
    assert "executor: mp" in document["error"]["hint"]


def test_an_engine_environment_that_does_not_exist_is_refused(fleet):
    fleet.spec["runtime"] = {"venv": "/nowhere/at all"}
    code, document, _ = fleet.up()
    assert code == 3
    assert "vLLM is not in the engine's environment" in document["error"]["message"]


def test_a_model_path_with_quotes_blanks_and_a_command_is_only_a_path(fleet, tmp_path):
    marker = tmp_path / "executed"
    odd = tmp_path / f'it\'s "a" model $(touch {marker.name})'
    odd.mkdir()
    (odd / "config.json").write_text("{}")
    fleet.spec["model"] = str(odd)
    code, document, _ = fleet.up()
    assert code == 0
    assert document["model"] == str(odd)
    assert not marker.exists()
    assert not (Path.cwd() / marker.name).exists()


def test_what_render_writes_is_byte_for_byte_what_runs(fleet, tmp_path):
    out = tmp_path / "out"
    assert fleet.cli("render", "-f", fleet.file, "--out", str(out)).returncode == 0
    fleet.up()
    kept = fleet.state / fleet.name / "runs/1/rendered"
    listed = {
        file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()
    }
    assert listed == {
        file.relative_to(kept): file.read_bytes() for file in kept.rglob("*") if file.is_file()
    }
    ran = fleet.state / fleet.name / "runs/1/r1.a1/nodes/n1/engine/serve.sh"
    assert ran.read_bytes() == (out / "r1.a1/serve-mp.sh").read_bytes()


def test_two_replicas_stand_side_by_side_and_one_keeps_serving_when_the_other_dies(fleet):
    fleet.spec["replicas"] = 2
    code, document, _ = fleet.up()
    assert code == 0
    ports = {replica["endpoint"] for replica in document["replicas"]}
    assert len(ports) == 2
    victim = next(p for p in fleet.engines() if "127.0.0.4" in words_of(p))
    victim.send_signal(signal.SIGKILL)
    assert eventually(lambda: fleet.status()[1]["phase"] == "degraded", 20.0)
    code, document = fleet.status()
    assert code == 1
    phases = {replica["name"]: replica["phase"] for replica in document["replicas"]}
    assert phases["r1"] == "serving"
    assert eventually(lambda: len(fleet.engines()) == 2)


def test_a_wrong_fleet_name_lists_those_that_there_are(cli):
    result = cli("status", "--fleet", "nope", "--json")
    assert result.returncode == 2
    assert "no fleet nope" in json.loads(result.stdout)["error"]["message"]


def test_help_is_quick_to_import():
    code = "import sys, launcher.cli.app; print(sorted({m.split('.')[0] for m in sys.modules}))"
    import sys

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for heavy in ("pydantic", "paramiko", "fabric", "submitit", "yaml", "psutil", "httpx"):
        assert f"'{heavy}'" not in loaded


def test_events_tell_what_was_done_and_why(fleet):
    fleet.up()
    victim = fleet.engines()[0]
    victim.send_signal(signal.SIGKILL)
    assert eventually(lambda: fleet.status()[1]["finished"], 20.0)
    told = fleet.cli("events", "--fleet", fleet.name).stdout
    for words in (
        "asked for nodes: n[1-2] (allocation 1)",
        "n1 becomes a rank of generation 1",
        "serves",
        "the address is http://127.0.0.1:",
        "traffic: r1.g1 serving",
        "given up: node n",
        "the gateway has ended",
    ):
        assert words in told, told
    rows = fleet.cli("events", "--fleet", fleet.name, "--json", "--limit", "3").stdout.splitlines()
    assert [set(json.loads(row)) >= {"at", "event"} for row in rows] == [True] * 3


def test_status_tells_what_is_warm_and_up_what_took_how_long(fleet):
    (Path(fleet.spec["model"]) / "model.safetensors").write_bytes(b"x" * 3 * 1024**2)
    code, document, _ = fleet.up()
    assert code == 0
    phases = document["replicas"][0]["phases"]
    ranks = [("engine", "n1"), ("engine", "n2"), ("first_token", "n1")]
    together = [("command", None), ("allocation", None), ("preflight", None)]
    assert {(one["name"], one["node"]) for one in phases} == {*together, *ranks}
    assert phases[0]["name"] == "command"
    assert phases[0]["began_s"] == 0
    for one, after in pairwise(phases[:3]):
        assert after["began_s"] == pytest.approx(one["began_s"] + one["took_s"], abs=0.02)
    token = next(one for one in phases if one["name"] == "first_token")
    assert token["began_s"] >= phases[2]["began_s"] + phases[2]["took_s"] - 0.02
    assert all(one["clock_off_s"] == 0 for one in phases)

    def weights() -> list[dict]:
        return [node["weights"] for node in fleet.status()[1]["replicas"][0]["nodes"]]

    assert eventually(lambda: all(weights()))
    assert [one["total_bytes"] for one in weights()] == [3 * 1024**2] * 2
    line = "weights of n[1-2]: 3.0 MiB on disk"
    assert line in fleet.cli("status", "--fleet", fleet.name).stdout


def test_an_archive_for_a_report_has_the_logs_and_no_secret(fleet, tmp_path):
    import tarfile

    fleet.up()
    key = (fleet.state / fleet.name / "secrets/api_key").read_text().strip()
    log = next((fleet.state / fleet.name / "runs/1/r1.a1/nodes/n1/logs").iterdir())
    with log.open("a") as file:
        file.write(f"an engine that tells its key: {key}\n")
    out = tmp_path / "report.tar.gz"
    made = fleet.cli("support", "--fleet", fleet.name, "--out", str(out), "--json")
    assert json.loads(made.stdout)["problems"] == []
    assert out.stat().st_mode & 0o777 == 0o600
    secrets = [
        file.read_bytes().strip()
        for file in (fleet.state / fleet.name / "secrets").iterdir()
        if file.is_file()
    ]
    with tarfile.open(out) as archive:
        names = set(archive.getnames())
        texts = {name: archive.extractfile(name).read() for name in names}
    assert {"status.json", "gateway/state.json", "runs/1/journal.ndjson", "versions.json"} <= names
    assert any(name.endswith(f"logs/{log.name}") for name in names)
    assert not [name for name in names if "secrets" in name or "keys" in name]
    assert not [name for name, text in texts.items() if any(s in text for s in secrets)]
    assert any(b"<secret api_key>" in text for text in texts.values())


def stalls_of(fleet) -> dict[str, dict]:
    """Failures by replica, once every replica has one."""
    replicas = fleet.status()[1]["replicas"]
    failures = {one["name"]: one["failure"] for one in replicas if one["failure"]}
    return failures if len(failures) == len(replicas) else {}


def bundles_of(fleet) -> dict[str, dict[str, str]]:
    """The evidence of the first generation, by node and file."""
    folders = (fleet.state / fleet.name).glob("runs/1/r*.a1/nodes/n*/evidence/g1")
    return {
        folder.parents[1].name: {file.name: file.read_text() for file in folder.iterdir()}
        for folder in folders
    }


def test_a_stopped_rank_stalls_its_replica_which_is_ended_with_evidence(fleet):
    """The leader's process of one replica and the follower's of the other, both idle."""
    fleet.spec["replicas"] = 2
    fleet.up()
    secrets = [f.read_text().strip() for f in (fleet.state / fleet.name / "secrets").iterdir()]
    engines = {process.environ()["LAUNCHER_NODE"]: process for process in fleet.engines()}
    for node in ("n1", "n4"):
        engines[node].send_signal(signal.SIGSTOP)
    assert eventually(lambda: stalls_of(fleet), 35.0), "30 s, and what it takes to tell"
    r1, r2 = (stalls_of(fleet)[name] for name in ("r1", "r2"))
    stopped = {node: f"process {engines[node].pid} (" for node in engines}
    assert "stalled: no token for " in r1["message"]
    assert "/health does not answer" in r1["message"]
    assert stopped["n1"] in r1["message"] and "is stopped (SIGSTOP?)" in r1["message"]
    assert r1["where"] == "node n1"
    assert "stalled: no token for " in r2["message"]
    assert "/health answers 200" in r2["message"]
    assert f"on n4: {stopped['n4']}" in r2["message"]
    assert r2["where"] == "node n4"
    assert eventually(lambda: fleet.status()[1]["finished"], 30.0)
    assert fleet.engines() == []
    assert fleet.status()[0] == 1
    bundles = bundles_of(fleet)
    assert set(bundles) == {"n1", "n2", "n3", "n4"}
    for node in ("n1", "n4"):
        assert f"process {engines[node].pid} " in bundles[node]["processes.txt"]
        assert "state T" in bundles[node]["processes.txt"]
    assert "fake engine" in bundles["n1"]["log-g1.serve.txt"]
    for node in ("n2", "n4"):  # told by the lease, or by the controller where that was faster
        assert (
            "ended its part" in bundles[node]["about.txt"]
            or "stalled" in (bundles[node]["about.txt"])
        )
    assert "stalled" in bundles["n3"]["about.txt"]
    texts = "".join(text for files in bundles.values() for text in files.values())
    assert not [secret for secret in secrets if secret in texts]


def test_an_engine_that_hangs_with_requests_is_ended_though_its_health_answers(fleet):
    import http.client

    fleet.spec["env"] = {"FAKE_ENGINE_FAULT": "stall", "FAKE_ENGINE_STALL_AFTER": "1"}
    _, document, _ = fleet.up()
    host, port = document["replicas"][0]["endpoint"].split("/")[2].split(":")
    key = (fleet.state / fleet.name / "secrets/engine_key").read_text().strip()
    asked = [http.client.HTTPConnection(host, int(port)) for _ in range(3)]
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    for one in asked:
        one.request("POST", "/v1/completions", json.dumps({"model": fleet.name}), headers)
    assert eventually(lambda: stalls_of(fleet), 35.0)
    message = stalls_of(fleet)["r1"]["message"]
    assert "stalled: no token for 2" in message
    assert "requests run; /health answers 200" in message
    assert eventually(lambda: fleet.engines() == [], 15.0)
    assert fleet.status()[0] == 1
    for one in asked:
        one.close()
