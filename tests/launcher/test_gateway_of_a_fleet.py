"""The gateway as a part of a fleet: fed by its controller, outliving it, ended by `down`."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from launcher.gateway.door import Gateway
from launcher.gateway.keeper import Keeper, is_due
from launcher.paths import FleetPaths
from launcher.wish import Driver, is_driven
from tests.gateway.engines import Engine
from tests.launcher.fleets import eventually, fake_spec


class Fleet:
    def __init__(self, folder, cli, engine, model, name, state):
        self.folder, self.cli, self.name = folder, cli, name
        self.paths = FleetPaths(state / name)
        self.gateway = Gateway(self.paths.gateway)
        self.spec = {"name": name, "replicas": 2, **fake_spec("local", model, engine), "nodes": 1}
        self.spec["parallelism"] = {}

    def up(self, *more):
        path = self.folder / "fleet.yaml"
        path.write_text(yaml.safe_dump(self.spec))
        result = self.cli("up", "-f", str(path), "--json", *more)
        self.document = json.loads(result.stdout)
        return result.returncode

    def status(self):
        return json.loads(self.cli("status", "--fleet", self.name, "--json").stdout)

    def client(self, secret=None) -> httpx.Client:
        secret = secret or Path(self.document["api_key_file"]).read_text().strip()
        return httpx.Client(
            base_url=self.document["endpoint"] + "/",
            headers={"Authorization": f"Bearer {secret}"},
            timeout=30,
        )

    def ask(self, client: httpx.Client) -> httpx.Response:
        body = {"model": self.name, "messages": [{"role": "user", "content": "x"}]}
        return client.post("chat/completions", json=body)

    def engines(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if any("fake_vllm" in word for word in words) and self.name in words:
                found.append(process)
        return found

    def driver(self) -> Driver:
        return Driver.model_validate_json(self.paths.controller.read_bytes())


@pytest.fixture
def fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir):
    made = Fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir)
    yield made
    made.cli("down", "--fleet", fleet_name)
    assert not made.paths.gateway.owner.exists()
    assert not made.paths.gateway.run_folder.exists()


@contextmanager
def steady_load(fleet):
    """Two clients that ask all the time; none of their requests may fail."""
    over = threading.Event()
    wrong: list[str] = []
    answered: list[float] = []

    def ask() -> None:
        with fleet.client() as client:
            while not over.is_set():
                try:
                    answer = fleet.ask(client)
                except httpx.HTTPError as error:
                    wrong.append(repr(error))
                    continue
                if answer.status_code != 200:
                    wrong.append(f"{answer.status_code} {answer.text[:200]}")
                answered.append(time.monotonic())
                time.sleep(0.02)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    assert wrong == []
    assert len(answered) > 4


def test_a_replica_that_dies_costs_no_request(fleet):
    fleet.spec["env"] = {"FAKE_ENGINE_DELAY_S": "0.3"}
    assert fleet.up() == 0
    with steady_load(fleet) as answered:
        assert eventually(lambda: len(answered) > 4)
        fleet.engines()[0].kill()
        assert eventually(lambda: fleet.status()["phase"] == "degraded")
        members = fleet.gateway.orders().members
        assert [member.goal for member in members].count("serving") == 1
        before = len(answered)
        assert eventually(lambda: len(answered) > before + 4)


def test_the_address_outlives_controller_and_supervisor_and_both_come_back(fleet):
    assert fleet.up() == 0
    with steady_load(fleet) as answered:
        supervisor = fleet.gateway.owner().supervisor.pid
        os.kill(fleet.driver().pid, signal.SIGKILL)
        os.kill(supervisor, signal.SIGKILL)
        assert eventually(lambda: not fleet.gateway.is_supervised())
        before = len(answered)
        assert eventually(lambda: len(answered) > before + 20)
        assert fleet.up() == 0  # joins, and a new controller adopts what runs
        assert eventually(fleet.gateway.is_supervised)
        assert fleet.gateway.owner().supervisor.pid != supervisor
        assert eventually(lambda: fleet.status()["phase"] == "serving")
    members = fleet.gateway.orders().members
    assert {member.name: member.goal for member in members} == {
        "r1.g1": "serving",
        "r2.g1": "serving",
    }


def test_a_controller_that_dies_is_started_again_without_anybody_looking(fleet):
    fleet.spec["replicas"] = 1
    assert fleet.up() == 0
    first = fleet.driver().pid
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: is_driven(fleet.paths) and fleet.driver().pid != first, 20)
    assert eventually(lambda: fleet.status()["phase"] == "serving")
    assert fleet.status()["run"] == 1
    second = fleet.driver().pid
    assert fleet.cli("down", "--fleet", fleet.name).returncode == 0
    assert fleet.driver().pid == second
    assert not fleet.gateway.is_supervised()  # nobody is left to bring back what is over
    assert not Keeper(fleet.paths).is_wanted()


def test_a_controller_that_does_not_stay_alive_is_started_ever_more_seldom():
    starts: list[float] = []
    for now in range(3600):
        if is_due(starts, float(now)):
            starts.append(float(now))
    assert starts[:4] == [0.0, 5.0, 20.0, 80.0]
    assert len(starts) < 20
    assert is_due([0.0], 4000.0)


def test_two_fleets_have_two_addresses_and_a_taken_port_is_named(fleet, tmp_path, cli):
    assert fleet.up() == 0
    port = int(fleet.document["endpoint"].split(":")[2].split("/")[0])
    other = Fleet(tmp_path, cli, fleet.spec["runtime"]["venv"], fleet.spec["model"], "", Path())
    other.name, other.spec = f"{fleet.name}b", {**fleet.spec, "name": f"{fleet.name}b"}
    other.spec["port"] = port
    assert other.up() == 3
    assert f"port {port}" in other.document["error"]["message"]
    del other.spec["port"]
    try:
        assert other.up() == 0
        assert other.document["endpoint"] != fleet.document["endpoint"]
        with other.client() as client, fleet.client() as first:
            assert other.ask(client).status_code == 200
            assert fleet.ask(first).status_code == 200
    finally:
        assert cli("down", "--fleet", other.name).returncode == 0
    with fleet.client() as client:
        assert fleet.ask(client).status_code == 200


def test_a_changed_gateway_is_taken_by_the_next_up_and_by_nothing_else(fleet):
    fleet.spec["replicas"] = 1
    assert fleet.up() == 0
    pids = sorted(process.pid for process in fleet.engines())
    fleet.spec["gateway"] = {"body_max_bytes": 2000}
    assert fleet.up() == 0

    def too_large() -> bool:
        with fleet.client() as client:
            return client.post("completions", json={"prompt": "x" * 3000}).status_code == 413

    assert eventually(too_large)
    assert sorted(process.pid for process in fleet.engines()) == pids


def test_keys_by_the_command_line(fleet):
    fleet.spec["replicas"] = 1
    assert fleet.up() == 0
    made = fleet.cli("gateway", "key", "add", "alice", "--fleet", fleet.name, "--json")
    secret = json.loads(made.stdout)["key"]

    def status() -> int:
        with fleet.client(secret) as client:
            return fleet.ask(client).status_code

    assert eventually(lambda: status() == 200)
    shown = fleet.cli("gateway", "status", "--fleet", fleet.name)
    assert shown.returncode == 0
    assert "r1.g1" in shown.stdout
    listed = json.loads(fleet.cli("gateway", "key", "ls", "--fleet", fleet.name, "--json").stdout)
    assert {key["name"] for key in listed["keys"]} == {"default", "alice"}
    assert fleet.cli("gateway", "key", "revoke", "alice", "--fleet", fleet.name).returncode == 0
    assert eventually(lambda: status() == 401)
    again = fleet.cli("gateway", "key", "revoke", "alice", "--fleet", fleet.name)
    assert (again.returncode, "no key named alice" in again.stderr) == (2, True)


def test_a_fallback_serves_while_no_replica_does_and_is_never_silent(fleet):
    small = Engine(key="other-key", model="small")
    key = fleet.folder / "other.key"
    key.write_text("other-key\n")
    key.chmod(0o600)
    fleet.spec["replicas"] = 1
    fleet.spec["gateway"] = {
        "fallback": {"url": f"{small.url}/v1", "model": "small", "key": {"file": str(key)}}
    }
    fleet.spec["env"] = {"FAKE_ENGINE_FAULT": "exit0"}
    try:
        assert fleet.up() == 0
        with fleet.client() as client:
            assert "x-launcher-fallback" not in fleet.ask(client).headers
            assert eventually(lambda: "x-launcher-fallback" in fleet.ask(client).headers, 10)
    finally:
        small.kill()


def test_a_certificate_that_is_not_there_is_refused_before_anything_starts(fleet):
    fleet.spec["gateway"] = {"tls": {"certificate": "no.pem", "key": "no.key"}}
    assert fleet.up() == 2
    assert "no.pem" in fleet.document["error"]["where"]
    assert fleet.engines() == []
