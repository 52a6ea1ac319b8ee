"""A parked process without a real vLLM: what it becomes, and all the ways in which it does not."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher import render
from launcher.agent import handover, memory, parking, processes, waiting
from launcher.agent.parking import Adopted, Parking
from launcher.agent.processes import Reaper
from launcher.agent.surroundings import Surroundings
from launcher.agent.waiting import Start
from launcher.cli.screens import fleet_screen
from launcher.documents import Park, Parked
from launcher.layout import ModelFacts, choose_layout
from launcher.spec import FleetSpec
from launcher.status import NodeStatus, ReplicaStatus
from tests.launcher import worlds
from tests.launcher.fleets import (
    FleetUnderTest,
    engine_processes,
    eventually,
    fake_spec,
    is_parked,
)

GIB = memory.GIB
MAIN = """
import os, sys, time

def main():
    import vllm.late
    print("env", os.environ.get("VLLM_PORT"), os.environ.get("LAUNCHER_MARK"), flush=True)
    print("argv", *sys.argv[1:], flush=True)
    print("here", os.getcwd(), sys.modules["__main__"].__file__, flush=True)
    print("early", sys.modules["vllm"].EARLY, os.environ.get("LAUNCHER_PARK"), flush=True)
    print("caches", sys.modules["vllm"].CACHES, flush=True)
    time.sleep(60)
"""


class Ground:
    """A node with a `vllm` that is a Python script, a parking lot, and an engine to be started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "lib/vllm"
        self.package.mkdir(parents=True)
        self.write(
            "__init__.py",
            "import os\nEARLY = os.environ.get('EARLY')\nCACHES = os.environ['VLLM_CACHE_ROOT']\n",
        )
        self.write("cli.py", MAIN)
        self.write("late.py", "")
        self.script(f"#!{sys.executable}\nimport sys\nfrom vllm.cli import main\nmain()\n")
        self.env: dict[str, str] = {}
        self.free = 100 * GIB
        self.claimed: list[Path] = []
        self.reaper = Reaper()
        self.parking = Parking(self.reaper, self.around, lambda: self.free)
        self.spec = FleetSpec.model_validate(
            {"name": "chat", "model": str(folder), "executor": "mp", "nodes": 1}
        )

    def write(self, name: str, text: str) -> None:
        (self.package / name).write_text(text)

    def script(self, text: str) -> None:
        file = self.folder / "bin/vllm"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def around(self) -> Surroundings:
        logs = self.folder / "node/logs"
        logs.mkdir(parents=True, exist_ok=True)
        path = f"{self.folder}/bin:{Path(sys.executable).parent}:/usr/bin:/bin"
        return Surroundings(
            node="n1",
            base=self.folder,
            logs=logs,
            evidence=logs,
            cache=self.folder / "cache",
            mark=f"test-{os.getpid()}/n1",
            environment={"PATH": path, "PYTHONPATH": str(self.package.parent), **self.env},
            secrets={"hf": "a secret"},
        )

    def scripts(self) -> dict[str, str]:
        layout = choose_layout(self.spec, 1, ModelFacts())
        return render.engine_scripts(self.spec, layout)

    def park(self, until="ready", timeout_s=20.0) -> Parked:
        self.parking.want(Park(script=self.scripts()["park.sh"], secret_environment={"HF": "hf"}))

        def there() -> bool:
            self.parking.turn(time.monotonic(), idle=True, serving=False)
            return self.parking.parked is not None and self.parking.parked.state == until

        assert eventually(there, timeout_s), self.parking.parked
        return self.parking.parked

    def wanted(self, scratch: Path, wait_s=5.0) -> Start:
        script = self.folder / "serve.sh"
        script.write_text(self.scripts()["serve-mp.sh"])
        around = self.around()
        ports = {"NODE_ADDRESS": "127.0.0.2", "NODE_RANK": "0", "NODES": "1", "PORT_API": "1"}
        environment = {
            **around.environment_in(scratch),
            **around.secrets_of({"HF": "hf"}),
            **{f"LAUNCHER_{name}": value for name, value in ports.items()},
            "LAUNCHER_PORT_VLLM_FIRST": "7001",
        }
        return Start(script, environment, self.folder / "serve.log", scratch, wait_s)

    def start(self, wait_s=5.0) -> Adopted | str:
        scratch = self.parking.claim() or self.folder
        self.claimed.append(scratch)
        start = self.wanted(scratch, wait_s)
        deadline = time.monotonic() + 20
        while (found := self.parking.start(start, time.monotonic())) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found

    def left(self) -> list[psutil.Process]:
        return processes.marked(f"test-{os.getpid()}", below=True)

    def log(self) -> str:
        file = self.folder / "serve.log"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def ground(tmp_path):
    made = Ground(tmp_path)
    yield made
    made.parking.end()
    made.parking.release()  # what an engine claimed is the engine's to clear away
    processes.kill_all(made.left())
    for folder in made.claimed:
        shutil.rmtree(folder, ignore_errors=True)
    assert eventually(lambda: made.left() == [], 5)
    mine = f"test-{os.getpid()}/"
    assert not [f for f in processes.scratch_root().glob("fl-*/.mark") if mine in f.read_text()]


def test_a_parked_process_becomes_what_the_start_script_would_have_started(ground):
    parked = ground.park()
    assert parked.took_s > 0
    assert [p.name() for p in ground.left()] == ["engine-parked"]
    found = ground.start()
    assert isinstance(found, Adopted)
    assert found.parked is not None
    assert found.parked.took_s
    assert eventually(lambda: "early" in ground.log()), ground.log()
    said = dict(line.split(" ", 1) for line in ground.log().splitlines())
    assert said["env"] == f"7001 test-{os.getpid()}/n1"
    assert said["argv"].startswith(
        f"serve {ground.folder} --distributed-executor-backend mp --host"
    )
    assert said["here"].endswith(f" {ground.folder}/bin/vllm")
    assert said["early"] == "None None"
    process = psutil.Process(found.child.pid)
    assert process.name() == "vllm"
    assert os.getpgid(found.child.pid) == found.child.pid, "a group of its own, like a plain one"
    assert {Path(c.path).name for c in process.open_files()} == {"serve.log"}
    found.child.send_signal(signal.SIGTERM)
    assert found.child.wait(5) == -signal.SIGTERM
    assert ground.parking.parked.state == "none"


def test_a_parked_process_has_the_compile_caches_of_a_plain_start(ground):
    ground.park()
    assert isinstance(ground.start(), Adopted)
    plain = ground.wanted(ground.folder)
    ground.reaper.start(
        ["/bin/bash", str(plain.script)], plain.environment, plain.log, plain.folder
    )
    assert eventually(lambda: ground.log().count("caches ") == 2), ground.log()
    parked, started = (row for row in ground.log().splitlines() if row.startswith("caches "))
    assert parked == started
    assert parked.startswith(f"caches {ground.folder}/cache/engines/vllm-unknown-torch-unknown-")


def test_a_process_that_was_parked_for_another_model_is_not_used(ground):
    ground.park()
    ground.spec = ground.spec.model_copy(update={"model": "other/model"})
    assert ground.start() == "LAUNCHER_MODEL changed since it was parked"


def test_a_start_that_comes_during_the_imports_waits_for_them(ground):
    ground.write("late.py", "import time\ntime.sleep(1)\n")
    ground.park(until="importing")
    assert isinstance(ground.start(wait_s=10), Adopted)


def test_a_parked_process_that_stands_still_is_not_waited_for(ground, monkeypatch):
    monkeypatch.setattr(parking, "TAKE_WITHIN_S", 1.0)
    ground.park()
    ground.left()[0].suspend()
    assert ground.start() == "it did not take its order"
    assert ground.left() == []


def test_a_start_does_not_wait_for_ever(ground):
    ground.write("late.py", "import time\ntime.sleep(60)\n")
    ground.park(until="importing")
    assert "imports were not done 1 s after the order" in ground.start(wait_s=1)
    assert ground.left() == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/bash\necho fake\n", "is no script of Python"),
        ("\x7fELF", "is no script of Python"),
        ("#!/nowhere/bin/python3\n", "is run by /nowhere/bin/python3: No such file"),
    ],
)
def test_what_is_no_script_of_python_is_not_parked(ground, script, reason):
    ground.script(script)
    assert reason in ground.park(until="none").reason
    assert reason in ground.start()


def test_an_environment_without_vllm_is_not_parked(ground):
    (ground.folder / "bin/vllm").unlink()
    assert "no vllm in the engine's PATH" in ground.park(until="none").reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('libcuda.so.1 is missing')", "cannot import vllm: OSError: libcuda.so.1"),
        ("import os; os._exit(3)", "it ended with code 3"),
        ("import os, sys; sys.exit('no licence')", "cannot import vllm: SystemExit: no licence"),
    ],
)
def test_an_import_that_fails_is_told(ground, code, reason):
    ground.write("__init__.py", code)
    assert reason in ground.park(until="none").reason
    assert ground.left() == []


def test_an_import_that_hangs_is_ended_at_its_deadline(ground, monkeypatch):
    monkeypatch.setattr(parking, "READY_WITHIN_S", 1.0)
    ground.write("__init__.py", "import time\ntime.sleep(60)\n")
    assert "its imports took longer than 1 s" in ground.park(until="none").reason
    assert ground.left() == []
    ground.parking.turn(time.monotonic() + parking.LATER_S / 2, idle=True, serving=False)
    assert ground.left() == [], "what hung a moment ago hangs again"
    ground.parking.turn(time.monotonic() + parking.LATER_S * 2, idle=True, serving=False)
    assert ground.left() != [], "a file system that was slow is not slow for ever"


@pytest.mark.parametrize("installed", ["a checkout that is edited", "a package that is added"])
def test_what_was_installed_meanwhile_is_not_mixed_with_what_was_imported_before(
    ground, installed
):
    packages = ground.folder / "site-packages"
    packages.mkdir()
    ground.env["PYTHONPATH"] = f"{packages}:{ground.package.parent}"
    ground.park()
    if installed == "a checkout that is edited":
        ground.write("late.py", "NEW = True\n")
    else:
        (packages / "vllm-9.dist-info").mkdir()
    changed = packages if installed == "a package that is added" else ground.package / "late.py"
    assert ground.start() == f"{changed} changed since it was parked"
    assert ground.park().state == "ready", "the next one has what is installed now"
    assert isinstance(ground.start(), Adopted)


def test_a_start_script_that_leaves_its_output_to_a_daemon_is_not_waited_for(ground, monkeypatch):
    monkeypatch.setattr(waiting, "TELL_WITHIN_S", 1.0)
    ground.park()
    scratch = ground.parking.claim()
    ground.claimed.append(scratch)
    wanted = ground.wanted(scratch)
    pid = ground.folder / "daemon.pid"
    wanted.script.write_text(f"setsid sh -c 'echo $$ >{pid}; exec sleep 60' &\nsleep 60\n")
    assert eventually(lambda: ground.parking.start(wanted, time.monotonic()), 10)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert "its start script ended with code 124" in ground.parking.parked.reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; kept = os.open('/dev/shm', os.O_RDONLY)", "an import opened /dev/shm"),
        ("import socket; kept = socket.socket()", "an import opened socket:"),
        ("import subprocess; subprocess.Popen(['sleep', '60'])", "an import left a process"),
    ],
)
def test_an_import_that_opens_something_makes_it_unfit(ground, code, reason):
    ground.write("late.py", code)
    assert reason in ground.park(until="none").reason


def test_a_late_import_that_starts_a_thread_makes_it_unfit(ground):
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    for name in ("entrypoints", "entrypoints/cli"):
        (ground.package / name).mkdir()
        ground.write(f"{name}/__init__.py", "")
    ground.write("entrypoints/cli/serve.py", code)
    reason = ground.park(until="none").reason
    assert reason == "vllm.entrypoints.cli.serve started 1 thread(s) when it was imported"


def test_another_python_than_ours_is_used_where_the_script_says_so(ground, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "python3").symlink_to(Path(sys.executable).resolve())
    ground.script(f"#!{other}/python3\nfrom vllm.cli import main\nmain()\n")
    ground.park()
    (process,) = ground.left()
    assert process.cmdline()[0] == f"{other}/python3"
    assert isinstance(ground.start(), Adopted)


def test_an_environment_that_was_read_already_is_a_reason_to_start_plainly(ground):
    ground.env = {"EARLY": "yes"}
    ground.park()
    ground.env = {"EARLY": "no"}
    assert ground.start() == "EARLY changed since it was parked"
    assert ground.left() == []
    assert ground.log() == ""


def test_too_little_memory_is_a_reason_and_is_looked_at_again(ground):
    ground.free = 4 * GIB
    assert ground.park(until="none").reason == "too little memory: 4.0 GiB left, 5.0 GiB needed"
    ground.free = 8 * GIB
    ground.parking.turn(time.monotonic() + 61, idle=True, serving=False)
    assert ground.parking.parked.state == "importing"


def test_under_pressure_it_goes_away(ground):
    ground.park()
    ground.free = GIB
    ground.parking.turn(time.monotonic() + 10, idle=False, serving=True)
    assert ground.parking.parked.reason == "the node is short of memory (1.0 GiB left)"
    assert ground.left() == []


def test_it_is_spared_when_an_engine_ends_and_goes_with_its_order(ground):
    ground.park()
    (process,) = ground.left()
    assert process.pid not in [one.pid for one in ground.reaper.descendants()]
    assert process.pid not in [one.pid for one in processes.marked(f"test-{os.getpid()}/n1")]
    ground.parking.want(None)
    assert ground.parking.parked is None
    assert eventually(lambda: ground.left() == [], 2)


def test_it_ends_when_nobody_holds_its_pipe(ground):
    ground.park()
    ground.parking._process.child.stdin.close()
    assert eventually(lambda: ground.left() == [], 5)
    ground.parking.turn(time.monotonic(), idle=False, serving=False)
    assert ground.parking.parked.reason == "it ended with code 0"


def test_while_an_engine_serves_it_takes_what_others_leave(ground):
    ground.write("late.py", "import time\ntime.sleep(1)\n")
    ground.parking.want(Park(script=ground.scripts()["park.sh"]))
    ground.parking.turn(time.monotonic(), idle=False, serving=False)
    assert ground.left() == [], "while an engine starts nothing else is made"
    ground.parking.turn(time.monotonic(), idle=False, serving=True)
    assert eventually(lambda: [p.name() for p in ground.left()] == ["engine-parked"])
    if os.getuid() == 0:
        assert eventually(lambda: ground.left()[0].nice() == 19)
    ground.park()
    found = ground.start()
    assert psutil.Process(found.child.pid).nice() == 0


@pytest.fixture
def python_engine(tmp_path, fake_engine):
    """The fake engine as a script of Python, which can be parked."""
    folder = tmp_path / "engine"
    shutil.copytree(fake_engine, folder)
    package = folder / "lib/vllm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    fake = folder / "lib/fake_vllm.py"
    run = f"import runpy\n\ndef main():\n    runpy.run_path({str(fake)!r}, run_name='__main__')\n"
    (package / "cli.py").write_text(run)
    python = (folder / "python").read_text()
    (folder / "bin/vllm").write_text(f"#!{python}\nfrom vllm.cli import main\nmain()\n")
    return folder


def test_a_fleet_starts_from_parked_processes_and_comes_again_from_the_next(
    tmp_path, cli, python_engine, model_folder, fleet_name, state_dir
):
    spec = fake_spec("local", model_folder, python_engine)
    spec["env"] = {"PYTHONPATH": str(python_engine / "lib")}
    spec["limits"] = {"drain": "5s", "start": "60s"}
    spec["preflight"] = "passive"
    spec["spares"] = 1
    fleet = FleetUnderTest(tmp_path, cli, fleet_name, spec)

    def waiting() -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if is_parked(Path(f"/proc/{p.pid}"), state_dir)]

    def nodes() -> list[dict]:
        return fleet.status()[1]["replicas"][0]["nodes"]

    def parks(phases: list[dict]) -> list[str]:
        """Whose engine came from a process whose imports were over after some time."""
        return sorted(one["node"] for one in phases if one["name"] == "park" and one["took_s"])

    def is_ready() -> bool:
        both = [*nodes(), *fleet.status()[1]["spares"]]
        return len(both) == 3 and all((n["parked"] or {}).get("state") == "ready" for n in both)

    try:
        code, document = fleet.up()
        assert code == 0, document["error"]
        assert [n["started"] for n in document["replicas"][0]["nodes"]] == ["parked"] * 2
        assert parks(document["replicas"][0]["phases"]) == ["n1", "n2"]
        assert eventually(is_ready), nodes()
        text = fleet.cli("status", "--fleet", fleet_name).stdout
        assert "parked on n[1-3]" in text
        assert len(waiting()) == 3
        engines = engine_processes(fleet_name)
        assert not {one.pid for one in waiting()} & set(engines), "not counted as engines"
        os.kill(next(pid for pid, node in engines.items() if node == "n2"), signal.SIGKILL)

        def is_back() -> bool:
            code, document = fleet.status()
            return code == 0 and document["replicas"][0]["generation"] == 2

        assert eventually(is_back, 60), fleet.status()
        assert [n["started"] for n in nodes()] == ["parked"] * 2
        again = fleet.status()[1]["replicas"][0]["phases"]
        assert parks(again) == sorted(node["node"] for node in nodes())
        begun = {phase["name"]: phase["began_s"] for phase in again}
        assert begun["park"] < 0 == begun["allocation"], "parked beside the generation before"
    finally:
        assert fleet.down() == 0
    assert waiting() == []
    assert engine_processes(fleet_name) == {}


def test_what_is_told_is_found_among_other_output():
    output = b"module: loaded\nLAUNCHER-TELL\x002\0vllm\0\0A=1\0B=x=y\nz\0LAUNCHER-TOLD\0{}\n"
    told, rest = handover.split_told(output)
    assert told.words == ("vllm", "")
    assert told.environment == {"A": "1", "B": "x=y\nz"}
    assert rest == b"{}\n"
    assert handover.split_told(output[:-10]) is None
    assert handover.split_told(b"") is None


def test_only_what_is_read_late_may_differ():
    parked = {"PATH": "/a", "LAUNCHER_TMP": "/t", "OLD": "1", "SHLVL": "1", "VLLM_PORT": "1"}
    wanted = {"PATH": "/a", "LAUNCHER_TMP": "/u", "SHLVL": "2", "VLLM_HOST_IP": "10.0.0.1"}
    found = handover.change(parked, wanted)
    assert found.put == {"LAUNCHER_TMP": "/u", "VLLM_HOST_IP": "10.0.0.1"}
    assert found.removed == ("VLLM_PORT",)
    assert found.refused == ("OLD",)
    many = handover.change({}, dict.fromkeys("ABCDE", "secret"))
    assert handover.refusal(many) == "A, B, C and 2 more changed since it was parked"


def test_the_limit_of_a_group_counts_and_its_file_cache_does_not(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    step = tmp_path / "root/job/step"
    step.mkdir(parents=True)
    for folder, limit, used in ((step, "max", 3), (step.parent, str(10 * GIB), 8 * GIB)):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(used))
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    assert memory._left_in_groups(own, tmp_path / "root") == [3 * GIB]
    own.write_text("4:cpu,memory:/job\n0::/\n")
    older = tmp_path / "root/memory/job"
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text(str(6 * GIB))
    (older / "memory.usage_in_bytes").write_text(str(2 * GIB))
    assert memory._left_in_groups(own, tmp_path / "root") == [4 * GIB]
    assert memory.available_bytes() > 0


@pytest.mark.parametrize(
    ("executor", "warm", "parked"), [("mp", "auto", True), ("mp", False, False)]
)
def test_the_spec_says_whether_anything_is_parked(executor, warm, parked):
    spec = FleetSpec.model_validate(
        {"name": "chat", "model": "/m", "executor": executor, "warm": warm}
    )
    layout = choose_layout(spec, 1, ModelFacts())
    scripts = render.engine_scripts(spec, layout)
    assert ("park.sh" in scripts) is parked
    (command,) = render.commands_of(0, layout, {}, scripts)
    assert command.parkable is parked


def test_the_screen_names_who_has_something_parked_and_why_others_have_not():
    def node(name: str, state: str, reason: str = "") -> NodeStatus:
        parked = Parked(state=state, since=0.0, reason=reason)
        return NodeStatus(node=name, rank=0, phase="serving", parked=parked)

    nodes = [node("n1", "ready"), node("n2", "ready"), node("n3", "none", "too little memory")]
    replica = ReplicaStatus(name="r1", generation=1, phase="serving", endpoint=None, nodes=nodes)
    lines = fleet_screen(worlds.make_status(replica), 0.0).splitlines()
    assert "parked on n[1-2]" in lines
    assert "nothing parked on n3: too little memory" in lines
