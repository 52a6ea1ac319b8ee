"""Shared fixtures. Every test has its own state folder; nothing of the user's is touched."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = Path(sys.executable).with_name("launcher")


@pytest.fixture
def state_dir(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    monkeypatch.setenv("LAUNCHER_STATE_DIR", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return folder


@pytest.fixture(scope="session")
def fake_engine():
    folder = make_fake_engine()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def make_fake_engine() -> Path:
    """A venv-like folder whose vllm and ray are the fakes; its path works on every host."""
    folder = ROOT / ".testbed-engine"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tests/fakes/engine", folder)
    # The system's Python, which every user of the machine may run; the fakes need nothing else.
    system = Path("/usr/bin/python3")
    (folder / "python").write_text(str(system) if system.exists() else sys.executable)
    for program in (folder / "bin").iterdir():
        program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return folder


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "num_attention_heads": 8}'
    )
    return folder


@pytest.fixture
def fleet_name():
    """Unique, so that ports and job names of concurrent tests differ."""
    return f"t-{uuid.uuid4().hex[:8]}"


class Cli:
    """The real command line in a process of its own."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment = environment
        self.folder = folder

    def __call__(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(LAUNCHER), *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(LAUNCHER), *arguments],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
            # A test run in the background ignores Ctrl-C, and its children would, too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


@pytest.fixture
def cli(state_dir, tmp_path):
    return Cli(dict(os.environ), tmp_path)


@pytest.fixture(scope="session")
def cluster():
    """The testbed with four hosts: kept if it is there, made if not, never skipped in CI."""
    from tests.cluster import bed

    why = bed.missing()
    if why and os.environ.get("CI"):
        pytest.fail(f"CI must run the testbed, but {why}")
    if why:
        pytest.skip(why)
    bed.up(4)
    bed.clear()
    bed.repair()
    return bed


@pytest.fixture(scope="session")
def bootstrapped(cluster):
    """The agent is on every host, put there by the product itself."""
    result = subprocess.run(
        [str(LAUNCHER), "bootstrap", "-f", str(ROOT / "examples/ssh.yaml")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def shared_dir(cluster, request):
    """A folder that every host sees (the hosts' /tmp is their own)."""
    folder = ROOT / ".testbed/tmp" / uuid.uuid4().hex[:8]
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def shared_model(shared_dir):
    folder = shared_dir / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 4, "num_attention_heads": 8}')
    return folder


@pytest.fixture
def shared_cli(shared_dir, monkeypatch):
    environment = {**os.environ, "LAUNCHER_STATE_DIR": str(shared_dir / "state")}
    return Cli(environment, shared_dir)
