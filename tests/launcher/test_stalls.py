"""What a stall leaves behind: who stands still, the bundle of evidence, who is named."""

import http.server
import os
import signal
import subprocess
import threading
import time

import pytest

from launcher.agent import bundle, processes
from launcher.agent.bundle import Bundle, Subject
from launcher.agent.canary import StallWatch
from launcher.agent.probe import Api, Failed
from launcher.agent.suspects import Suspects, name_and_state
from launcher.documents import Evidence
from launcher.verdicts import first_failure
from tests.launcher.fleets import eventually
from tests.launcher.worlds import NOW, make_context, member, ranked, replica, report, view

SECRET = "s3cr3t-of-the-engine"


@pytest.fixture
def child():
    """A process that says its secret in its command line, stopped."""
    started = subprocess.Popen(["sleep", "60"], preexec_fn=os.setsid)
    started.send_signal(signal.SIGSTOP)
    assert eventually(lambda: name_and_state(started.pid)[2] == "T")
    yield started
    started.kill()
    started.wait()


def test_a_stopped_process_is_suspect_at_once_and_one_in_the_kernel_after_a_while(child):
    suspects = Suspects()
    suspects.look(0.0, [child.pid, os.getpid(), 2**22 + 1])
    assert suspects.found == (f"process {child.pid} (sleep) is stopped (SIGSTOP?)",)
    waits = [(7, "VLLM::Worker", "D"), (8, "python3", "t")]
    suspects.take(5.0, waits)
    assert suspects.found == ()
    assert suspects.hanging == {7}
    suspects.take(10.0, [(7, "VLLM::Worker", "S"), waits[1]])
    suspects.take(15.0, waits)
    assert suspects.found == ("process 8 (python3) is held by a debugger",)
    suspects.take(25.0, waits)
    assert suspects.found[0] == "process 7 (VLLM::Worker) hangs in the kernel (state D)"


def test_a_bundle_shows_states_logs_and_stacks_and_no_secret(child, tmp_path, monkeypatch):
    spy = tmp_path / "bin/py-spy"
    spy.parent.mkdir()
    spy.write_text("#!/bin/sh\n")
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
    log = tmp_path / "g1.serve.log"
    asked = 'INFO: 127.0.0.1:1 - "GET /metrics HTTP/1.1" 200 OK\n'
    log.write_text("first\n" + f"key is {SECRET}\n" + "x\n" * 198 + asked * 300)
    ran = []

    def run(arguments, timeout_s):
        ran.append((arguments, timeout_s))
        return 0, f"Thread 1 (idle)\n  all_reduce {SECRET}"

    folder = tmp_path / "evidence/g7"
    for old in range(1, 9):
        (folder.parent / f"old{old}").mkdir(parents=True)
    made = Bundle(
        Subject(
            folder,
            f"stalled: no token for 21 s ({SECRET})",
            (child.pid, os.getpid()),
            (log,),
            '{"gpus": 8}',
            {"engine_key": SECRET, "short": "x"},
            run,
        )
    )
    made.start()
    assert eventually(lambda: made.is_over, bundle.WITHIN_S)
    texts = {file.name: file.read_text() for file in folder.iterdir()}
    assert not made.problem
    assert set(texts) == {
        *("about.txt", "processes.txt", "commands.txt", "log-g1.serve.txt"),
        *("health.json", "stacks.txt"),
    }
    assert SECRET not in "".join(texts.values())
    assert f"process {child.pid} (sleep), state T" in texts["processes.txt"]
    assert f"{child.pid} sleep 60" in texts["commands.txt"]
    assert "GET /metrics" not in texts["log-g1.serve.txt"]
    assert texts["log-g1.serve.txt"].startswith("first\nkey is <secret engine_key>\nx")
    assert "all_reduce" in texts["stacks.txt"]
    assert ran[0][0] == [str(spy), "dump", "--nonblocking", "--pid", str(os.getpid())]
    assert ran[0][1] <= bundle.WITHIN_S
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir())
    assert len(list(folder.parent.iterdir())) == bundle.KEPT


def test_a_bundle_of_processes_that_are_gone_says_so_and_a_folder_that_cannot_be_is_told(tmp_path):
    made = Bundle(Subject(tmp_path / "evidence/g1", "n1 ended its part", ()))
    made.start()
    assert eventually(lambda: made.is_over)
    said = (tmp_path / "evidence/g1/about.txt").read_text()
    assert "none was there any more" in said
    assert "being ended already" in said
    (tmp_path / "file").write_text("")
    bad = Bundle(Subject(tmp_path / "file/g1", "why", ()))
    bad.start()
    assert eventually(lambda: bad.is_over)
    assert "cannot be made" in bad.problem


def test_arguments_that_are_secret_by_their_name_are_not_shown():
    words = ["vllm", "--api-key", "abc", "--max-num-batched-tokens", "8192", "--hf-token=abc"]
    assert bundle.masked(words) == [
        *("vllm", "--api-key", "<secret>", "--max-num-batched-tokens", "8192"),
        "--hf-token=<secret>",
    ]
    named = {
        "HF_TOKEN": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "PATH": "c",
        "TOKENIZERS_PARALLELISM": "d",
    }
    assert set(bundle.secrets_in(named)) == {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"}


def test_a_stall_names_the_process_on_another_node_that_holds_it_up():
    record = ranked(make_context(), serving_at=NOW)
    stalled = Evidence(
        kind="stall", message="stalled: no token for 21 s", node="h1", at=NOW, process="serve"
    )
    stopped = ("process 7 (python3) is stopped (SIGSTOP?)",)
    leader = report("h1", "failed", evidence=stalled, member=member(0, token=True))
    held = report("h2", "serving", member=member(1).model_copy(update={"suspects": stopped}))
    views = {"h1": view("h1", leader), "h2": view("h2", held)}
    failure = first_failure(replica(record), views, NOW)
    assert (failure.code, failure.exit_code, failure.where) == ("stall", 1, "node h2")
    assert failure.message == f"stalled: no token for 21 s; on h2: {stopped[0]}"


def test_a_compiler_is_seen_wherever_it_runs_below_us(tmp_path):
    assert not processes.compiles()
    compiler = tmp_path / "ptxas"
    compiler.symlink_to("/bin/sleep")
    with subprocess.Popen([str(compiler), "60"]) as running:
        assert eventually(processes.compiles, 5)
        running.kill()
    assert not processes.compiles()


class Server(http.server.ThreadingHTTPServer):
    """An API server whose completions hang while it answers everything else."""

    daemon_threads = True
    asked: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *rest):
        return

    def do_GET(self):
        self.server.asked.append(self.path)
        body = b"# HELP x\npython_info 1\n" * 10 + b'vllm:num_requests_running{engine="0"} 1\n'
        self.send_response(200 if self.path == "/health" else self.server.metrics_status)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.server.asked.append(self.headers.get("X-data-parallel-rank", "any"))
        self.server.hangs.wait()


@pytest.fixture
def server():
    made = Server(("127.0.0.1", 0), Handler)
    made.asked, made.hangs, made.metrics_status = [], threading.Event(), 200
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.hangs.set()
    made.shutdown()
    made.server_close()


def test_only_samples_of_the_engine_are_read_and_a_page_that_is_not_there_is_none(server):
    api = Api("127.0.0.1", server.server_address[1], "m", "k")
    assert api.metrics(5, "vllm:") == ['vllm:num_requests_running{engine="0"} 1\n']
    server.metrics_status = 404
    assert api.metrics(5, "vllm:") == []
    with pytest.raises(Failed):
        api.token(0.2, "1")
    assert server.asked[-1] == "1"


def test_a_canary_that_hangs_stops_neither_the_figures_nor_the_verdict(server, monkeypatch):
    """The real threads, with an eighth of the times."""
    from launcher.agent import canary, progress

    for module, name, value in (
        (progress, "STALL_S", 2.5),
        (progress, "CANARY_DEADLINE_S", 2.5),
        (progress, "CANARY_EVERY_S", 1.0),
        (canary, "FIGURES_EVERY_S", 0.2),
        (canary, "CLOSER_S", 0.5),
        (canary, "CLOSER_EVERY_S", 0.1),
        (canary, "LOOK_S", 0.1),
    ):
        monkeypatch.setattr(module, name, value)
    began = time.monotonic()
    watch = StallWatch(Api("127.0.0.1", server.server_address[1], "m", "k"), lambda: False)
    watch.start()
    assert eventually(lambda: watch.stalled, 10)
    assert time.monotonic() - began >= 2.5
    assert "while 1 request runs; /health answers 200" in watch.stalled
    assert server.asked.count("/metrics") >= 5
    assert server.asked.count("any") == 1
    server.hangs.set()

    def left() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name.startswith("stall-")]

    assert eventually(lambda: left() == [], 5)
