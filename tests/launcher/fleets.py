"""A fleet under test: its spec, its commands, and what it has running. Shared by all backends."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import psutil
import yaml

from launcher import ports
from launcher.agent.engine import Engine
from launcher.agent.processes import Reaper
from launcher.agent.surroundings import Surroundings
from launcher.documents import Command
from tests.launcher.worlds import lone_member


class FleetUnderTest:
    def __init__(self, folder: Path, cli, name: str, spec: dict) -> None:
        self.folder, self.cli, self.name = folder, cli, name
        self.spec = {"name": name, **spec}

    @property
    def file(self) -> str:
        path = self.folder / "fleet.yaml"
        path.write_text(yaml.safe_dump(self.spec))
        return str(path)

    def up(self, *more, timeout=300):
        result = self.cli("up", "-f", self.file, "--json", *more, timeout=timeout)
        assert result.stdout, result.stderr
        return result.returncode, json.loads(result.stdout)

    def status(self):
        result = self.cli("status", "--fleet", self.name, "--json")
        return result.returncode, json.loads(result.stdout)

    def down(self):
        return self.cli("down", "--fleet", self.name).returncode


def fake_spec(backend: dict | str, model: Path, engine: Path) -> dict:
    """Two hosts with the fake engine, up in a second."""
    return {
        "model": str(model),
        "nodes": 2,
        "gpus_per_node": 1,
        "parallelism": {"pipeline": 2},
        "executor": "mp",
        "runtime": {"venv": str(engine)},
        # What dies stays dead, so that the tests of dying can look at it.
        "limits": {"drain": "5s", "start": "30s", "restarts": 0},
        "backend": backend,
    }


def engine_processes(name: str) -> dict[int, str]:
    """The node of every engine process of this fleet; namespaces hide none from outside."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                rows = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                words = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"health.collect" in words or is_parked(folder):
                continue  # the agent's own probes know the node, too, and what waits for an order
            if any(f"/{name}/" in row for row in rows):
                found |= {
                    int(folder.name): row.removeprefix("LAUNCHER_NODE=")
                    for row in rows
                    if row.startswith("LAUNCHER_NODE=")
                }
    return found


def is_parked(folder: Path, state: Path = Path("/")) -> bool:
    """Whether this process (a folder of /proc) is parked for a fleet there, and no engine yet."""
    try:
        name = (folder / "comm").read_text().strip()
        environment = (folder / "environ").read_bytes()
    except OSError:
        return False
    begins = b"\0LAUNCHER_PARK=" in environment and name in ("bash", "env", "python3")
    is_its = f"\0LAUNCHER_BASE={state}".encode() in environment
    return is_its and (name == "engine-parked" or begins)


def eventually(observe, timeout_s=20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if observe():
            return True
        time.sleep(0.1)
    return False


def ask(document: dict, prompt="The quick brown fox", tokens=8) -> str:
    """A greedy completion through the endpoint by the official client."""
    from openai import OpenAI

    key = Path(document["api_key_file"]).read_text().strip()
    client = OpenAI(base_url=document["endpoint"], api_key=key, max_retries=0, timeout=60)
    answer = client.completions.create(
        model=document["fleet"], prompt=prompt, max_tokens=tokens, temperature=0
    )
    return answer.choices[0].text


def replica_of(fleet, name="r1") -> dict:
    return next(one for one in fleet.status()[1]["replicas"] if one["name"] == name)


def nodes_of(fleet, name="r1") -> list[str]:
    return [node["node"] for node in replica_of(fleet, name)["nodes"]]


def serves_again(fleet, generation: int, name="r1") -> bool:
    replica = replica_of(fleet, name)
    return replica["phase"] == "serving" and replica["generation"] >= generation


def kill_controller(fleet) -> None:
    folder = Path(fleet.cli.environment["LAUNCHER_STATE_DIR"]) / fleet.name
    os.kill(json.loads((folder / "controller.json").read_text())["pid"], 9)


def spares(fleet) -> list[str]:
    return [one["node"] for one in fleet.status()[1]["spares"] if one["phase"] == "warm"]


def engines(fleet) -> set[str]:
    """The nodes on which an engine of this fleet runs (the agent's probes are none)."""
    return {
        node
        for pid, node in engine_processes(fleet.name).items()
        if b"fake_" in Path(f"/proc/{pid}/cmdline").read_bytes()
    }


class Asking(threading.Thread):
    """Requests, one after the other, until told to stop; each must be answered."""

    def __init__(self, document: dict) -> None:
        super().__init__(daemon=True)
        self._document = document
        self._enough = threading.Event()
        self.answered, self.failed, self.longest_s = 0, [], 0.0

    def run(self) -> None:
        while not self._enough.is_set():
            began = time.monotonic()
            try:
                assert ask(self._document) == "x"
                self.answered += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what is counted
                self.failed.append(repr(error))
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    def stop(self) -> None:
        self._enough.set()
        self.join(60)


def lone_engine(folder: Path, *commands: Command, slot: int) -> Engine:
    """A follower's engine below this process, on a block of ports that no fleet here prefers."""
    block = ports.block(slot)
    around = Surroundings("n1", *[folder] * 4, f"test-{folder.name}/n1", {**os.environ}, {})
    update = {"ports": block, "guard_port": block["guard"], "commands": commands}
    member = lone_member().model_copy(update={"rank": 1, **update})
    return Engine(member, around, OwnReaper())


class OwnReaper(Reaper):
    """Of a process that has other children, too, as pytest has its testbed: they are spared."""

    def descendants(self) -> list[psutil.Process]:
        found = []
        for pid in tuple(self._own):
            with contextlib.suppress(psutil.Error):
                child = psutil.Process(pid)
                below = [child, *child.children(recursive=True)]
                found += [one for one in below if one.status() != psutil.STATUS_ZOMBIE]
        return found
