"""Rules that matter, as tests with their reasons."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "health", "inventory")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
PURE = [
    *("inventory/nodeset.py", "inventory/model.py", "health/report.py", "health/engine.py"),
    *("launcher/spec.py", "launcher/layout.py", "launcher/attribution.py", "launcher/check.py"),
    *("launcher/verdicts.py", "launcher/status.py", "launcher/snapshot.py", "launcher/record.py"),
    *("launcher/documents.py", "launcher/ports.py", "launcher/addresses.py"),
    *("launcher/steps.py", "launcher/fitness.py", "launcher/rehearsal.py"),
    *("launcher/meeting.py", "inventory/ledger.py", "health/evidence.py", "health/judge.py"),
    *("health/parity.py", "health/settle.py", "health/clock.py", "health/deep.py"),
    *("health/xids.py", "health/thresholds.py", "health/collective/rounds.py"),
    *("health/checks/base.py", "health/checks/gpu.py", "health/checks/network.py"),
    *("health/checks/node.py", "launcher/heartbeat.py", "launcher/quoting.py"),
    *("launcher/agent/lastwords.py", "launcher/agent/progress.py", "launcher/agent/handover.py"),
    *("launcher/figures.py", "launcher/notices.py", "launcher/succession.py"),
    *("launcher/drilling.py", "launcher/phases.py", "launcher/backends/ssh_lines.py"),
    *("launcher/gateway/documents.py", "launcher/gateway/choose.py", "launcher/gateway/tally.py"),
    *("launcher/gateway/events.py", "launcher/gateway/refusal.py", "launcher/gateway/members.py"),
    *("launcher/gateway/feed.py", "launcher/gateway/front.py", "launcher/gateway/metrics.py"),
    *(f"launcher/planning/{file.name}" for file in (ROOT / "launcher/planning").glob("*.py")),
    *("launcher/gateway/keyring.py", "launcher/gateway/continuation.py"),
]


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    """launcher → health → inventory, so that a probe does not need the control plane."""
    package = file.relative_to(ROOT).parts[0]
    forbidden = {"inventory": ("health", "launcher"), "health": ("launcher",), "launcher": ()}
    roots = {name.split(".")[0] for name in imports(ast.parse(file.read_text()))}
    assert not roots & set(forbidden[package])
    assert "tests" not in roots


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_no_io_and_read_no_clock(name):
    """Time, randomness and the world come in as arguments, so that decisions can be replayed."""
    tree = ast.parse((ROOT / name).read_text())
    roots = {module.split(".")[0] for module in imports(tree)}
    assert not roots & {"time", "random", "secrets", "subprocess", "socket", "os", "threading"}
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"open", "print", "input"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nobody_but_the_quoting_module_makes_shell(file):
    """One place to get quoting right, and one to look at when it was wrong."""
    tree = ast.parse(file.read_text())
    if file.name != "quoting.py":
        assert "shlex" not in imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "shell":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_stay_small(file):
    """Beyond 600 lines a module rarely has one reason to change."""
    assert len(file.read_text().splitlines()) <= 600


def test_vllm_ray_and_torch_are_launched_and_never_imported():
    for file in FILES:
        if file.name in ("worker.py", "burn.py"):
            continue  # runs in the engine's own environment; nothing of ours imports it
        roots = {name.split(".")[0] for name in imports(ast.parse(file.read_text()))}
        assert not roots & {"vllm", "ray", "torch"}, file


def test_no_shell_tool_ends_processes_by_name():
    """`ray stop` and pkill end other people's work on shared nodes."""
    for file in [*FILES, *(ROOT / "sbatch_templates").iterdir()]:
        if file.suffix in (".py", ".sh", ".sbatch"):
            code = "\n".join(
                line for line in file.read_text().splitlines() if not line.strip().startswith("#")
            )
            assert "pkill" not in code and "killall" not in code, file
            assert '"stop"' not in code or "ray" not in code.split('"stop"')[0][-20:], file


def test_every_package_is_in_the_wheel():
    """What is forgotten there works from a checkout, and nowhere else."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in FILES
        if file.parent.relative_to(ROOT).parts
    }
    assert found <= set(listed)
