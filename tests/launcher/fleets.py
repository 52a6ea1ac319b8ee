"""A fleet under test: its spec, its commands, and what it has running. Shared by all backends."""

import json
import time
from pathlib import Path

import yaml


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
