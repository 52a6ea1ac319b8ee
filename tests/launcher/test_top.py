"""`launcher top`: figures from engines and gateway, on a screen, as lines, as JSON."""

import json
import signal
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from launcher import figures
from launcher.cli import screens
from launcher.cli.meters import Meters
from launcher.figures import Figures, Load, Reading
from launcher.gateway.documents import MemberTally, Orders, State, TierState
from launcher.status import NodeStatus, ReplicaStatus, Status
from tests.launcher.fleets import eventually
from tests.launcher.terminal import Terminal
from tests.launcher.test_gateway_of_a_fleet import Fleet

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="chat"} 3.0
vllm:num_requests_running{engine="1",model_name="a \\"b\\" {c} 9"} 2.0
vllm:num_requests_waiting{engine="0",model_name="chat"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 70.0
vllm:generation_tokens_created{engine="0",model_name="chat"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="chat"} 1.5e+03 1700000000000
vllm:generation_tokens_total{engine="1",model_name="chat"} 500
process_open_fds 32.0
"""


def test_metrics_are_summed_over_their_labels_and_nothing_else_is_counted():
    assert figures.read_engine(VLLM, 7.0) == Reading(7.0, running=5.0, waiting=1.0, tokens=2000.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>502 Bad Gateway</html>",
        "vllm:num_requests_running",
        'vllm:num_requests_running{engine="0',
        'vllm:num_requests_running{engine="0"} NaN',
        "vllm:num_requests_running many",
        "vllm:num_requests_running_later 4",
    ],
)
def test_what_is_no_metric_is_unknown_and_not_zero(text):
    assert figures.read_engine(text, 7.0) == Reading(7.0)


def test_two_looks_make_a_rate_unless_the_engine_began_anew():
    def at(second, tokens):
        return Reading(second, tokens=tokens)

    assert figures.tokens_per_s(at(1.0, 100.0), at(3.0, 700.0)) == 300.0
    assert figures.tokens_per_s(at(1.0, 100.0), at(3.0, 20.0)) is None
    assert figures.tokens_per_s(at(1.0, 100.0), at(1.0, 200.0)) is None
    assert figures.tokens_per_s(None, at(3.0, 20.0)) is None
    assert figures.tokens_per_s(at(1.0, 1.0), at(3.0, None)) is None


def state(**in_flight) -> State:
    members = {name: MemberTally(in_flight=n) for name, n in in_flight.items()}
    tier = [
        TierState(pid=number, index=number, row=number, holding=2, members=members)
        for number in range(2)
    ]
    return State(
        fleet="chat",
        address="http://h:1",
        host="h",
        supervisor_pid=1,
        front="up",
        processes=tier,
        orders=Orders(),
        metrics_port=None,
        at=0.0,
    )


def test_an_engine_that_does_not_tell_is_known_by_the_gateway():
    looks = {"r1": (Reading(1.0, tokens=0.0), Reading(2.0, 4.0, 1.0, 50.0))}
    found = figures.load({"r1": "r1", "r2": "r2"}, state(r1=9, r2=3), looks)
    assert found.of("r1") == Figures(50.0, 4, 1)
    assert found.of("r2") == Figures(None, 6, None)
    assert found.of("r3") == Figures()
    assert (found.held, found.metered) == (4, True)
    assert figures.load({"r1": "r1"}, None).of("r1") == Figures()


def status() -> Status:
    def one(name, nodes):
        return ReplicaStatus(
            name=name,
            generation=3,
            phase="serving",
            endpoint=None,
            nodes=[NodeStatus(node=node, rank=0, phase="serving") for node in nodes],
            since=940.0,
            story=["serves again"],
        )

    return Status(
        fleet="chat",
        run=1,
        desired="up",
        phase="serving",
        endpoint="http://h:1/v1",
        api_key_file="/k",
        model="m",
        backend="local",
        replicas=[one("r1", ["a1", "a2"]), one("r2", ["a3"])],
        waiting_for=[],
        updated_at=1000.0,
    )


def test_the_screen_has_its_figures_where_the_design_puts_them():
    load = Load({"r1": Figures(2310.4, 41, 0)}, held=1, metered=True)
    rows = screens.fleet_screen(status(), 1000.0, load, with_story=False).splitlines()
    assert rows[1:4] == [
        "REPLICA  GEN  PHASE    NODES   TOK/S  RUN/WAIT  SINCE",
        "r1       3    serving  a[1-2]   2310      41/0  1m00s",
        "r2       3    serving  a3          -         -  1m00s",
    ]
    assert rows[4] == "1 request is held until a replica comes"
    plain = screens.fleet_screen(status(), 1000.0, Load({"r1": Figures(running=4)}))
    assert "TOK/S" not in plain
    assert "4/-" in plain
    assert "RUN/WAIT" not in screens.fleet_screen(status(), 1000.0)


@contextmanager
def engine(answer):
    """An engine whose /metrics is `answer()`."""

    class Api(BaseHTTPRequestHandler):
        def log_message(self, *rest):
            return

        def do_GET(self):
            body = answer().encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_an_engine_that_does_not_answer_holds_up_nobody():
    tokens = iter(range(0, 100_000, 100))
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        engine(lambda: f"vllm:generation_tokens_total {next(tokens)}\n") as url,
    ):
        meters = Meters()
        both = {"r1.g1": url, "r2.g1": f"http://127.0.0.1:{silent.getsockname()[1]}/v1"}

        def has_a_rate() -> bool:
            began = time.monotonic()
            meters.ask(both)
            assert time.monotonic() - began < 0.5
            before, now = meters.looks().get("r1.g1", (None, None))
            return (figures.tokens_per_s(before, now) or 0) > 0

        assert eventually(has_a_rate, 5)
        assert "r2.g1" not in meters.looks()
        meters.ask({})
        assert meters.looks() == {}


@pytest.fixture
def fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir):
    made = Fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir)
    made.spec["replicas"] = 1
    yield made
    made.cli("down", "--fleet", fleet_name)


def test_top_as_json_as_lines_and_on_a_terminal(fleet):
    assert fleet.up() == 0
    shown = fleet.cli("status", "--fleet", fleet.name).stdout
    assert "RUN/WAIT" in shown
    assert "TOK/S" not in shown

    stream = fleet.cli.start("top", "--fleet", fleet.name, "--json")
    looks = [json.loads(stream.stdout.readline()) for _ in range(2)]
    stream.send_signal(signal.SIGINT)
    stream.communicate(timeout=10)
    assert stream.returncode == 130
    assert looks[1]["at"] - looks[0]["at"] > 0.9
    assert looks[0]["status"]["fleet"] == fleet.name
    assert looks[0]["gateway"]["up"] is True
    assert looks[0]["load"]["r1"]["running"] == 0

    lines = fleet.cli.start("top", "--fleet", fleet.name)
    assert "r1 serving" in lines.stdout.readline()
    screen = Terminal(fleet, "top", "--fleet", fleet.name)
    screen.show("TOK/S", "the address is")
    assert screen.interrupt() == 130
    fleet.cli("down", "--fleet", fleet.name)
    rest, said = lines.communicate(timeout=20)
    assert "the run is over" in said
    assert "r1 stopped" in rest
