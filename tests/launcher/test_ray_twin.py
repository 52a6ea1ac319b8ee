"""Ray's workers forked from the twin of a parked process, without a real Ray."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.agent import handover, processes
from launcher.agent.parking import Adopted
from launcher.agent.waiting import Start
from launcher.documents import Park
from tests.launcher.fleets import eventually
from tests.launcher.test_parking import Ground

# What a raylet does, as far as we see it: it starts interpreters, and notes how they end.
RAY = """
import json, os, subprocess, sys, time
order = json.loads(open(os.environ["RAY_ORDER"]).read())
environment = {**os.environ, "RAY_JOB_ID": "01000000", **order["env"]}
with open(order["out"], "wb") as out:
    words = [sys.executable, *order["words"], order["option"]]
    child = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=out,
                             cwd=order["folder"])
    open(order["out"] + ".pid", "w").write(str(child.pid))
    while order["ends_input"] and not os.path.getsize(order["out"]) and child.poll() is None:
        time.sleep(0.05)
    if order["ends_input"]:
        child.stdin.close()
    code = child.wait()
open(order["out"] + ".code", "w").write(str(code))
child.wait()
time.sleep(60)
"""
WORKER = """
import json, os, sys, time
known = "vllm.late" in sys.modules
print(json.dumps({
    "known": known, "argv": sys.argv, "pid": os.getpid(), "folder": os.getcwd(),
    "env": dict(os.environ), "path": sys.path, "main": __name__,
    "job": os.environ.get("RAY_JOB_ID"), "seen": getattr(sys.modules.get("ray"), "SEEN", None),
    "custom": getattr(sys.modules.get("sitecustomize"), "OTHER", None),
}), flush=True)
until = os.environ.get("RAY_UNTIL", "")
if until == "its input ends":
    sys.exit(len(sys.stdin.read()))
if until == "ever":
    time.sleep(60)
sys.exit(int(until or 0))
"""


class RayGround(Ground):
    """A node whose parked process may become `ray start`, on a follower."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        ray = folder / "lib/ray"
        (ray / "_private/workers").mkdir(parents=True)
        (ray / "__init__.py").write_text("import os\nSEEN = os.environ.get('RAY_JOB_ID')\n")
        self.worker = ray / "_private/workers/default_worker.py"
        self.agent = ray / "dashboard/agent.py"
        self.client = ray / "util/client/server"
        for program in (self.worker, self.agent, self.client / "__main__.py"):
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text(WORKER)
        self.words = [str(self.worker)]
        self.ends_input = False
        self.option = "--worker-id=a b"
        self.write("__init__.py", "import os, ray, vllm.late\nos.environ['MADE'] = 'by import'\n")
        self.program(f"#!{sys.executable}\n{RAY}")
        self.order = folder / "order.json"
        self.out = folder / "worker.out"
        self.env["RAY_ORDER"] = str(self.order)
        self.spec = self.spec.model_copy(update={"executor": "ray", "nodes": 2})

    def program(self, text: str) -> None:
        file = self.folder / "bin/ray"
        file.write_text(text)
        file.chmod(0o755)

    def ray_start(self, **env: str) -> Adopted | str:
        """What a follower does: its parked process becomes `ray start`."""
        start = self.make_start("ray-worker.sh", env)
        deadline = time.monotonic() + 20
        while (found := self.parking.start(start, time.monotonic())) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if isinstance(found, str):
            self.plain(start)
        return found

    def head_start(self, **env: str) -> subprocess.Popen[bytes]:
        """What the leader does before it serves."""
        return self.plain(self.make_start("ray-head.sh", env))

    def plain(self, start: Start) -> subprocess.Popen[bytes]:
        words = ["/bin/bash", str(start.script)]
        return self.reaper.start(words, start.environment, start.log, start.folder)

    def make_start(self, name: str, env: dict[str, str]) -> Start:
        scratch = self.parking.claim() or self.folder
        self.claimed.append(scratch)
        order = {"words": self.words, "folder": str(self.folder), "out": str(self.out)}
        order |= {"ends_input": self.ends_input, "option": self.option, "env": env}
        self.order.write_text(json.dumps(order))
        script = self.folder / name
        script.write_text(self.scripts()[name])
        environment = {
            **self.around().environment_in(scratch),
            **self.around().secrets_of({"HF": "hf"}),
            **{f"LAUNCHER_PORT_{name}": "1" for name in PORTS},
            "LAUNCHER_NODE_ADDRESS": "127.0.0.3",
            "LAUNCHER_LEADER_ADDRESS": "127.0.0.2",
            "LAUNCHER_LEADER_PORT_RENDEZVOUS": "1",
            "LAUNCHER_RANKS_PER_NODE": "1",
        }
        return Start(script, environment, self.folder / "ray.log", scratch, 10.0)

    def another_worker(self) -> subprocess.Popen[bytes]:
        """As Ray would start it beside the first."""
        environment = psutil.Process(self.hook()).environ()
        with self.out.open("wb") as out:
            words = [sys.executable, str(self.worker), "--worker-id=2"]
            return subprocess.Popen(words, env=environment, stdout=out, stderr=out)

    def said(self) -> dict:
        assert eventually(lambda: self.out.exists() and "\n" in self.out.read_text(), 10), (
            self.log_of("ray.log")
        )
        return json.loads(self.out.read_text().splitlines()[0])

    def workers(self) -> str:
        return handover.workers((self.claimed[-1] / "ray/workers").read_text())

    def code(self) -> int:
        file = Path(f"{self.out}.code")
        assert eventually(lambda: file.exists() and file.read_text(), 10), self.log_of("ray.log")
        return int(file.read_text())

    def hook(self) -> int:
        return int(Path(f"{self.out}.pid").read_text())

    def log_of(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""


PORTS = (
    *("VLLM_FIRST", "NODE_MANAGER", "OBJECT_MANAGER", "RUNTIME_ENV_AGENT", "METRICS"),
    *("RENDEZVOUS", "RAY_CLIENT", "DASHBOARD"),
    *("DASHBOARD_AGENT_HTTP", "DASHBOARD_AGENT_GRPC", "WORKER_FIRST", "WORKER_LAST"),
)


@pytest.fixture
def ground(tmp_path):
    made = RayGround(tmp_path)
    yield made
    made.parking.end()
    made.parking.release()
    processes.kill_all(made.left())
    for folder in made.claimed:
        shutil.rmtree(folder, ignore_errors=True)
    assert eventually(lambda: made.left() == [], 5)


def a_library() -> str:
    """Some shared object that can be loaded."""
    maps = Path("/proc/self/maps").read_text().split()
    return next(word for word in maps if "/libc.so" in word or "/libc-" in word)


def is_over(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_worker_of_ray_is_forked_with_everything_imported(ground):
    ground.park()
    assert isinstance(ground.ray_start(RAY_UNTIL="3"), Adopted)
    said = ground.said()
    assert said["known"], ground.workers()
    assert said["argv"] == [str(ground.worker), "--worker-id=a b"]
    assert (said["folder"], said["main"], said["job"]) == (
        str(ground.folder),
        "__main__",
        "01000000",
    )
    assert said["path"][0] == str(ground.worker.parent), "as Python itself has it"
    assert said["env"]["MADE"] == "by import", "what an import sets is there without the import"
    assert said["seen"] == "01000000", "Ray's library reads its job once, when it is imported"
    assert said["pid"] != ground.hook()
    assert ground.code() == 3, "whoever started it sees how it ended"
    assert ground.workers() == "1 parked"


def test_a_ray_head_is_forked_too_and_is_sent_the_signals_of_who_stands_for_it(ground):
    ground.park()
    head = ground.head_start(RAY_UNTIL="ever")
    said = ground.said()
    assert said["known"]
    ray = psutil.Process(ground.hook()).parent()
    assert ray.parent().name() == "ray-twin"
    assert ray.pid != head.pid
    head.send_signal(signal.SIGTERM)
    assert head.wait(10) == 128 + signal.SIGTERM
    assert is_over(ray.pid)


def test_what_was_parked_at_low_priority_makes_processes_of_the_usual_one(ground):
    ground.parking.want(Park(script=ground.scripts()["park.sh"], secret_environment={"HF": "hf"}))

    def is_ready() -> bool:
        ground.parking.turn(time.monotonic(), idle=False, serving=True)
        return ground.parking.parked is not None and ground.parking.parked.state == "ready"

    assert eventually(is_ready)
    ground.head_start(RAY_UNTIL="ever")
    worker = psutil.Process(ground.said()["pid"])
    assert worker.nice() == psutil.Process().nice()


def test_without_a_parked_process_ray_starts_its_workers_itself(ground):
    assert ground.ray_start(RAY_UNTIL="3") == "no process was parked"
    said = ground.said()
    assert (said["known"], said["pid"]) == (False, ground.hook())
    assert ground.code() == 3


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"CUDA_HOME": "/opt/cuda"}, "CUDA_HOME changed since it was parked"),
        ({"LD_PRELOAD": "libm.so.6"}, "LD_PRELOAD changed since it was parked"),
        ({"RAY_JOB_ID": "02000000"}, "RAY_JOB_ID changed since it was parked"),
    ],
)
def test_a_worker_whose_environment_imports_did_not_see_starts_plainly(ground, env, why):
    ground.park()
    ground.ray_start(**env)
    said = ground.said()
    assert (said["known"], said["pid"]) == (False, ground.hook())
    assert ground.workers() == f"1 plain: {why}"


@pytest.mark.parametrize(("watched_by", "forked"), [("1", True), ("0", False)])
def test_an_agent_that_knows_by_its_input_when_to_end_is_forked(ground, watched_by, forked):
    ground.park()
    ground.words, ground.ends_input = ["-u", str(ground.agent)], True
    by_input = {"RAY_enable_pipe_based_agent_to_parent_health_check": watched_by}
    ground.ray_start(**by_input, RAY_UNTIL="its input ends")
    said = ground.said()
    assert (said["known"], said["pid"] != ground.hook()) == (forked, forked)
    assert ground.code() == 0


def test_a_helper_that_is_run_as_a_module_is_forked(ground):
    ground.park()
    ground.words = ["-m", "ray.util.client.server"]
    ground.ray_start()
    said = ground.said()
    assert said["known"]
    assert said["argv"] == [str(ground.client / "__main__.py"), "--worker-id=a b"]
    assert ground.code() == 0


def test_the_allocator_that_ray_loads_into_its_helpers_is_no_reason_to_start_plainly(ground):
    ground.park()
    allocator = ground.folder / "lib/ray/core/libjemalloc.so"
    allocator.parent.mkdir()
    allocator.symlink_to(a_library())
    ground.ray_start(LD_PRELOAD=str(allocator))
    assert ground.said()["known"]


def test_when_whoever_ray_started_is_killed_the_worker_ends(ground):
    ground.park()
    ground.ray_start(RAY_UNTIL="ever")
    worker = ground.said()["pid"]
    os.kill(ground.hook(), signal.SIGKILL)
    assert eventually(lambda: is_over(worker), 10)
    assert ground.code() == -signal.SIGKILL


def test_a_killed_worker_is_seen_by_whoever_started_it(ground):
    ground.park()
    ground.ray_start(RAY_UNTIL="ever")
    os.kill(ground.said()["pid"], signal.SIGKILL)
    assert ground.code() == 128 + signal.SIGKILL


def test_twin_and_workers_end_with_the_engine_that_they_belong_to(ground):
    ground.park()
    adopted = ground.ray_start(RAY_UNTIL="ever")
    worker = psutil.Process(ground.said()["pid"])
    twin = worker.parent()
    assert (twin.name(), twin.ppid()) == ("ray-twin", adopted.child.pid)
    adopted.child.kill()
    adopted.child.wait(5)
    assert eventually(lambda: is_over(worker.pid) and is_over(twin.pid), 5)
    assert eventually(lambda: is_over(ground.hook()), 5)


def test_a_twin_that_dies_takes_its_workers_along_and_later_ones_start_plainly(ground):
    ground.park()
    ground.ray_start(RAY_UNTIL="ever")
    worker = psutil.Process(ground.said()["pid"])
    worker.parent().kill()
    assert eventually(lambda: is_over(worker.pid), 5)
    assert ground.code() == 1


def test_a_twin_that_does_not_answer_is_not_waited_for_and_makes_no_second_worker(ground):
    ground.park()
    ground.ray_start(RAY_UNTIL="ever")
    first = psutil.Process(ground.said()["pid"])
    twin = first.parent()
    twin.suspend()
    second = ground.another_worker()
    try:
        assert ground.said()["pid"] == second.pid
        twin.resume()
        assert eventually(lambda: "not answered in time" in ground.workers(), 10)
        assert ground.workers() == "1 parked, 1 plain: it was not answered in time"
        assert twin.children() == [first]
    finally:
        second.kill()
        second.wait()


def test_ray_of_another_python_is_not_parked(ground):
    ground.program("#!/usr/bin/python3\n")
    reason = ground.park(until="none").reason
    assert "/bin/ray is run by /usr/bin/python3, and vllm by " in reason


def test_a_head_lives_on_where_its_twins_parent_does_not_become_the_engine(ground):
    ground.park()
    head = ground.head_start(RAY_UNTIL="ever")
    ray = psutil.Process(psutil.Process(ground.said()["pid"]).ppid())
    assert ray.name() == "ray-twin"
    serve = ground.make_start("ray-worker.sh", {})
    serve.environment["CUDA_HOME"] = "/opt/cuda"
    assert eventually(lambda: ground.parking.start(serve, time.monotonic()), 10)
    assert "CUDA_HOME changed" in ground.parking.parked.reason
    ground.parking.turn(time.monotonic(), idle=False, serving=False)
    assert head.poll() is None
    ground.parking.clear()
    assert head.wait(5) != 0


@pytest.mark.parametrize("end", [b"\n", b""])
def test_an_order_that_cannot_be_followed_costs_the_twin_nothing(ground, end):
    """Of another container, or broken off: whoever sent it goes on by itself."""
    ground.park()
    scratch = ground.parking.scratch
    (twin,) = [one for one in ground.left() if one.name() == "ray-twin"]
    order = {
        "words": [str(ground.worker), "--worker-id=1"],
        "environment": twin.environ(),
        "folder": "/",
        "pids": "pid:[1]",
        "oom_score_adj": "0",
    }
    files = twin.num_fds()
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as hook:
            hook.settimeout(5)
            hook.connect(str(scratch / "ray/twin"))
            socket.send_fds(hook, [json.dumps(order).encode() + end], [0, 1, 2])
            hook.shutdown(socket.SHUT_WR)
            assert hook.recv(1) == b""
    assert eventually(lambda: twin.num_fds() == files, 5)
    assert twin.children() == []
    record = scratch / "ray/workers"
    told = handover.workers(record.read_text()) if record.exists() else ""
    assert told == ("3 plain: its process ids are those of another container" if end else "")


def test_workers_that_draw_their_own_ids_start_plainly(ground):
    """Forks of one process would all draw the same."""
    ground.park()
    ground.words = [str(ground.worker), "--startup-token=1"]
    ground.option = "--id=1"
    ground.ray_start()
    assert ground.said()["pid"] == ground.hook()
    assert "draw their ids" in ground.workers()


def test_a_sitecustomize_of_the_user_is_still_loaded(ground):
    (ground.package.parent / "sitecustomize.py").write_text("OTHER = 'loaded'\n")
    ground.ray_start()
    assert ground.said()["custom"] == "loaded"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("", ""),
        ('{"started": "parked", "reason": ""}\n' * 2, "2 parked"),
        ('{"started": "plain", "reason": "X changed"}\n{"started": "par', "1 plain: X changed"),
    ],
)
def test_what_the_twin_wrote_is_told_in_words(record, words):
    assert handover.workers(record) == words
