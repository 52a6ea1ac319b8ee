"""The controller's own Slurm job: what is submitted, when, who goes on. Slurm is a stand-in."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from launcher import controller_job, driving, fleets, freshness, succession
from launcher.controller_job import Heir
from launcher.controller_supervisor import Supervisor
from launcher.errors import BackendError, DeadlineError, SlurmError, SpecError
from launcher.files import read_document, write_document
from launcher.gateway.documents import Owner, Process, Settings
from launcher.gateway.door import Gateway
from launcher.paths import FleetPaths
from launcher.slurm_tools import jobs, runner
from launcher.slurm_tools.jobs import Job
from launcher.spec import FleetSpec
from launcher.status import Status
from launcher.wish import Driver, is_driven, take_the_wheel, write_wish


def job(identity="1", state="running", host="h1", **more) -> Job:
    fields = {
        "identity": identity,
        "state": state,
        "slurm_state": state.upper(),
        "nodes": (host,) if state == "running" else (),
        "ends_at": None,
        "starts_at": None,
        "batch_host": host,
        "name": "chat.controller",
        "reason": "Resources",
        "comment": "",
    }
    return Job(**{**fields, **more})


class StandIn:
    """Slurm's commands as far as a job of this kind needs them."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, str]] = {}
        self.away = False
        self.loses_answers = False
        self.refuses = ""
        self.partitions = "h1|idle|(null)|1-00:00:00|cpu|none\n"

    def run(self, command, *, text=None, environment=None):
        if self.away:
            raise SlurmError("Unable to contact slurm controller", unreachable=True)
        return getattr(self, command[0])(command)

    def sbatch(self, command):
        if self.refuses:
            raise SlurmError(f"sbatch: {self.refuses}")
        script = Path(command[-1]).read_text()
        options = dict(
            line.removeprefix("#SBATCH --").partition("=")[::2]
            for line in script.splitlines()
            if line.startswith("#SBATCH --")
        )
        identity = str(len(self.jobs) + 1)
        self.jobs[identity] = {"state": "PENDING", "host": "n/a", **options}
        if self.loses_answers:
            raise SlurmError("sbatch: Socket timed out", unreachable=True)
        return f"{identity}\n"

    def squeue(self, command):
        wanted = command[command.index("-j") + 1] if "-j" in command else None
        if wanted and wanted not in self.jobs:
            raise SlurmError("squeue: slurm_load_jobs error: Invalid job id specified")
        rows = ""
        for identity, one in self.jobs.items():
            if wanted in (None, identity):
                nodes = one["host"] if one["state"] == "RUNNING" else ""
                rows += f"{identity}|{one['state']}|{nodes}|N/A|N/A|{one['host']}|"
                rows += f"{one['job-name']}|Resources|{one['comment']}\n"
        return rows

    def scancel(self, command):
        self.jobs[command[1]]["state"] = "CANCELLED"
        return ""

    def sinfo(self, command):
        return "cpu*\n" if "%P" in command else self.partitions

    def play(self, identity, state, host="h1"):
        self.jobs[identity] |= {"state": state, "host": host}

    @property
    def states(self) -> list[str]:
        return [one["state"] for one in self.jobs.values()]


@pytest.fixture
def slurm(monkeypatch):
    made = StandIn()
    monkeypatch.setattr(runner, "run", made.run)
    for name in ("SLURM_JOB_ID", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    return made


def spec_of(**slurm) -> FleetSpec:
    return FleetSpec.model_validate(
        {
            "name": "chat",
            "model": "org/model",
            "backend": {"slurm": {"partition": "gpu", "account": "nlp"}},
            "controller": {"slurm": slurm},
        }
    )


@pytest.fixture
def paths(state_dir):
    made = FleetPaths.of("chat")
    made.run(1).root.mkdir(parents=True)
    write_document(made.run(1).spec, spec_of())
    write_wish(made, 1, "up")
    return made


@pytest.fixture
def started(monkeypatch):
    """Commands that would have been started in the background."""
    seen = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: seen.append(command))
    return seen


def wish_of(paths, desired="up"):
    return write_wish(paths, 1, desired)


# Submitting


def test_it_is_submitted_once_whatever_its_state(paths, slurm, started):
    for state in ("PENDING", "RUNNING"):
        driving.start(paths, wish_of(paths))
        slurm.play("1", state)
        driving.start(paths, wish_of(paths))
        assert len(slurm.jobs) == 1
    slurm.play("1", "COMPLETED")
    driving.start(paths, wish_of(paths))
    assert slurm.states == ["COMPLETED", "PENDING"]
    assert started == []


def test_nothing_is_submitted_while_slurm_does_not_answer(paths, slurm, started):
    slurm.away = True
    with pytest.raises(SlurmError):
        driving.start(paths, wish_of(paths))
    slurm.away = False
    assert (slurm.jobs, started) == ({}, [])
    assert freshness.read_status(paths) is None, "the run is not over: nothing is known"


def test_a_job_whose_answer_was_lost_is_known_by_its_mark(paths, slurm):
    slurm.loses_answers = True
    driving.start(paths, wish_of(paths))
    driving.start(paths, wish_of(paths))
    assert len(slurm.jobs) == 1
    assert controller_job.is_known(paths)


def test_a_job_of_the_same_name_that_is_not_ours_is_left_alone(paths, slurm):
    slurm.jobs["1"] = {
        "state": "PENDING",
        "host": "n/a",
        "job-name": "chat.controller",
        "comment": "x",
    }
    driving.start(paths, wish_of(paths))
    assert slurm.states == ["PENDING", "PENDING"]
    controller_job.end(paths)
    assert slurm.states == ["PENDING", "CANCELLED"]


def test_a_waiting_job_is_asked_for_again_where_the_spec_says_otherwise_now(paths, slurm):
    driving.start(paths, wish_of(paths))
    write_document(paths.run(1).spec, spec_of(partition="cpu"))
    driving.start(paths, wish_of(paths))
    assert slurm.states == ["CANCELLED", "PENDING"]
    assert slurm.jobs["2"]["partition"] == "cpu"
    slurm.play("2", "RUNNING")
    write_document(paths.run(1).spec, spec_of(partition="other"))
    driving.start(paths, wish_of(paths))
    assert slurm.states == ["CANCELLED", "RUNNING"], "what runs is not touched"


def test_what_slurm_refuses_ends_a_run_that_has_not_begun(paths, slurm):
    slurm.refuses = "error: Invalid account or account/partition combination specified"
    with pytest.raises(SlurmError, match="Invalid account"):
        driving.start(paths, wish_of(paths))
    status = freshness.read_status(paths)
    assert status is not None
    assert (status.finished, status.phase) == (True, "failed")
    assert not fleets.is_up(paths)


def test_who_goes_down_waits_in_no_queue(paths, slurm, started):
    driving.start(paths, wish_of(paths))
    assert fleets.end(paths) is not None
    assert slurm.states == ["CANCELLED"]
    assert [command[2] for command in started] == ["launcher.controller"]
    assert driving.end(paths) == ""
    assert not controller_job.is_known(paths)


def test_down_says_what_it_could_not_look_at(paths, slurm, started):
    driving.start(paths, wish_of(paths))
    slurm.away = True
    assert fleets.end(paths) is not None
    assert "ends by itself" in driving.end(paths)
    slurm.away = False
    assert controller_job.is_known(paths), "the next `down` looks again"


def test_a_job_that_does_not_end_with_its_run_is_cancelled(paths, slurm):
    driving.start(paths, wish_of(paths))
    slurm.play("1", "RUNNING")
    assert controller_job.end(paths, within_s=0.0) == ""
    assert slurm.states == ["CANCELLED"]


@pytest.mark.parametrize(
    ("block", "where"),
    [
        ({}, "controller.slurm.partition"),
        ({"partition": "cpu", "walltime": "2d"}, "controller.slurm.walltime"),
    ],
)
def test_what_could_never_start_is_refused_before_anything_begins(slurm, block, where):
    with pytest.raises(SpecError) as caught:
        controller_job.check(spec_of(**block))
    assert caught.value.where == where


# Being told


def test_status_says_that_it_is_pending_and_why(paths, slurm):
    driving.start(paths, wish_of(paths))
    status = freshness.current_status(paths)
    assert status is not None
    assert status.waiting_for == ["controller job 1 to start (PENDING: Resources)"]
    assert (status.phase, status.finished, status.exit_code) == ("starting", False, 1)
    slurm.play("1", "RUNNING", "h3")
    status = freshness.current_status(paths)
    assert status is not None
    assert status.waiting_for == ["the controller in job 1 (h3)"]
    slurm.away = True
    status = freshness.current_status(paths)
    assert status is not None
    assert "Slurm to say" in status.waiting_for[0]


def test_status_of_a_cancelled_job_says_so_and_that_its_gateway_is_gone(paths, slurm):
    driving.start(paths, wish_of(paths))
    slurm.play("1", "CANCELLED")
    told = {
        "fleet": "chat",
        "run": 1,
        "desired": "up",
        "phase": "serving",
        "endpoint": "http://x/v1",
    }
    told |= {"api_key_file": "k", "model": "m", "backend": "slurm", "replicas": []}
    write_document(paths.status, Status(**told, waiting_for=[], updated_at=time.time()))
    status = freshness.current_status(paths)
    assert status is not None
    assert "job 1: CANCELLED" in status.controller
    assert status.phase == "degraded"
    assert any("launcher up" in one for one in status.waiting_for)
    driving.start(paths, wish_of(paths))
    status = freshness.current_status(paths)
    assert status is not None
    assert status.waiting_for[0] == "controller job 2 to start (PENDING: Resources)"
    assert status.endpoint == "http://x/v1"


def test_watching_a_job_in_the_queue_starts_nothing_and_has_a_deadline(
    paths, slurm, started, monkeypatch
):
    wish = wish_of(paths)
    driving.start(paths, wish)
    watching = fleets.watch(paths, wish)
    told = [next(watching) for _ in range(4)]
    assert [one.waiting_for for one in told if one] == [
        ["controller job 1 to start (PENDING: Resources)"]
    ] * 3
    assert len(slurm.jobs) == 1
    write_document(paths.controller_job, controller_job.Submitted(job="1", at=0.0))
    with pytest.raises(DeadlineError):
        next(watching)
    assert started == []


# Who goes on


def test_who_is_warned_asks_for_one_successor_and_leaves_when_it_is_there():
    own = job("1")
    assert succession.hand_over([own], "1", "") == "submit"
    assert succession.hand_over([own, job("2", "pending")], "1", "") == "wait"
    assert succession.hand_over([own, job("2")], "1", "") == "wait", (
        "it runs, and is not there yet"
    )
    assert succession.hand_over([own, job("2")], "1", "2") == "leave"
    assert succession.hand_over([own, job("2", "ended")], "1", "2") == "submit"
    assert succession.hand_over([own, job("2", "pending")], "1", "2") == "wait", "it was requeued"


def test_who_comes_back_and_finds_its_successor_is_not_needed():
    assert not succession.is_superfluous([job("9")], "9")
    assert not succession.is_superfluous([job("8"), job("9")], "9"), "a successor waits"
    assert succession.is_superfluous([job("9"), job("10")], "9")
    assert not succession.is_superfluous([job("9"), job("10", "pending")], "9")


def test_a_node_is_left_when_slurm_says_that_the_job_is_over_or_elsewhere(paths, slurm):
    assert jobs.has_left("77", "h1"), "Slurm has forgotten it"
    driving.start(paths, wish_of(paths))
    for state, host, left in (
        ("RUNNING", "h1", False),
        ("COMPLETING", "h1", False),
        ("PENDING", "n/a", True),
        ("RUNNING", "h2", True),
        ("CANCELLED", "h1", True),
    ):
        slurm.play("1", state, host)
        assert jobs.has_left("1", "h1") is left, state
    slurm.away = True
    with pytest.raises(SlurmError):
        jobs.has_left("1", "h1")


def test_a_shell_of_salloc_is_not_inside_its_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert jobs.own_place() is None
    monkeypatch.setenv("SLURMD_NODENAME", "h1")
    assert jobs.own_place() == jobs.Place("5", "h1")


def test_a_controller_that_left_in_order_is_not_watched(tmp_path):
    paths = FleetPaths(tmp_path / "fleet")
    paths.root.mkdir()
    driver = Driver(host="elsewhere", pid=1, run=1, beat=7, started_at=0.0, ended=True)
    write_document(paths.controller, driver)
    began = time.monotonic()
    assert not is_driven(paths)
    handle = take_the_wheel(paths)
    assert handle is not None
    os.close(handle)
    assert time.monotonic() - began < 2.0


# The gateway of a job that is no more


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A gateway on another host that says nothing."""
    monkeypatch.setattr("launcher.gateway.door.SILENT_AFTER_S", -1.0)
    paths = FleetPaths(tmp_path / "fleet").gateway
    paths.root.mkdir(parents=True)
    process = Process(pid=1, started_ticks=1, boot_id="x")
    owner = Owner(
        fleet="chat",
        folder=str(paths.root),
        user="me",
        host="elsewhere",
        port=8080,
        run_folder="/tmp/x",
        supervisor=process,
        job="12",
        node="h3",
    )
    write_document(paths.owner, owner)
    write_document(paths.settings, Settings(fleet="chat", host="0.0.0.0", port=8080))
    return paths


def refuse_to_say(*_):
    raise SlurmError("squeue: Unable to contact slurm controller", unreachable=True)


@pytest.mark.parametrize("has_left", [None, lambda *_: False, refuse_to_say])
def test_a_silent_gateway_elsewhere_has_no_successor_unless_slurm_is_certain(
    far, started, has_left
):
    with pytest.raises(BackendError):
        Gateway(far, has_left).start()
    assert started == []
    assert far.owner.exists()


def test_a_gateway_whose_job_is_gone_begins_anew_here(far, started):
    asked = []
    Gateway(far, lambda *words: asked.append(words) or True).start()
    assert asked == [("12", "h3")]
    assert len(started) == 1
    assert not far.owner.exists()


def test_a_gateway_whose_job_is_gone_is_not_waited_for_by_down(far):
    began = time.monotonic()
    assert Gateway(far, lambda *_: True).stop(5.0) == ""
    assert time.monotonic() - began < 2.0
    assert not far.owner.exists()


# Inside the job


@pytest.fixture
def inside(paths, slurm, monkeypatch):
    driving.start(paths, wish_of(paths))
    slurm.play("1", "RUNNING", socket.gethostname())
    monkeypatch.setattr("launcher.controller_supervisor.ASK_EVERY_S", 0.0)
    return Supervisor(paths, "1")


def test_a_warned_job_submits_the_same_script_once_and_leaves_the_wheel_to_it(
    inside, paths, slurm, started
):
    inside._on_warning(0, None)
    inside._controller = object()
    inside._reap = lambda: None
    assert not inside._turn()
    assert not inside._turn()
    assert slurm.states == ["RUNNING", "PENDING"]
    slurm.play("2", "RUNNING")
    assert not inside._turn()
    write_document(paths.heir, Heir(job="2"))
    assert inside._turn()


def test_a_job_without_the_wheel_says_that_it_waits(inside, paths, slurm):
    handle = take_the_wheel(paths)
    assert handle is not None
    assert not inside._turn()
    heir = read_document(paths.heir, Heir)
    assert heir is not None and heir.job == "1"
    os.close(handle)


def test_a_job_whose_run_is_over_ends_and_lets_nobody_follow(inside, paths, slurm, monkeypatch):
    told = {"fleet": "chat", "run": 1, "desired": "down", "phase": "stopped", "endpoint": None}
    told |= {"api_key_file": "k", "model": "m", "backend": "slurm", "replicas": []}
    write_document(
        paths.status, Status(**told, waiting_for=[], updated_at=time.time(), finished=True)
    )
    slurm.jobs["2"] = {**slurm.jobs["1"], "state": "PENDING"}
    monkeypatch.setattr("launcher.controller_supervisor.become_subreaper", lambda: None)
    monkeypatch.setattr("launcher.controller_supervisor.signal.signal", lambda *_: None)
    monkeypatch.setattr(inside, "_end", lambda: None)
    assert inside.run() == 0
    assert slurm.states == ["RUNNING", "CANCELLED"]


def test_nothing_secret_is_in_the_script(paths, slurm):
    (paths.secrets).mkdir()
    (paths.secrets / "api_key").write_text("sk-very-secret")
    driving.start(paths, wish_of(paths))
    script = (paths.run(1).rendered / controller_job.SCRIPT).read_text()
    assert "sk-very-secret" not in script
    assert f"LAUNCHER_STATE_DIR={paths.root.parent}" in script
    assert json.loads(paths.controller_job.read_text())["job"] == "1"
