"""The whole gateway: supervisor, real HAProxy, the tier's processes, and the door to them."""

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from launcher.errors import BackendError, UsageError
from launcher.gateway import haproxy, keyring
from launcher.gateway.documents import Owner, Settings
from launcher.gateway.door import Gateway
from launcher.gateway.members import in_flight
from launcher.gateway.places import GatewayPaths, RunFolder
from launcher.gateway.processes import is_alive
from tests.gateway.conftest import InBackground, chat
from tests.gateway.engines import free_port
from tests.launcher.fleets import eventually

SECRET = "sk-the-first"


class GatewayUnderTest(Gateway):
    def __init__(self, root: Path, **settings) -> None:
        self.paths = GatewayPaths(root)
        super().__init__(self.paths)
        self.port = settings.pop("port", None) or free_port()
        drain_s = settings.pop("drain_s", 5.0)
        self.settings = Settings(
            fleet="t", host="127.0.0.1", port=self.port, drain_s=drain_s, **settings
        )
        self.configure(self.settings)
        self.change_keys(lambda keys: keyring.added(keys, "first", SECRET, time.time()))

    def up(self) -> "GatewayUnderTest":
        self.start()
        self.wait_until_up()
        return self

    @property
    def holder(self) -> Owner:
        found = self.owner()
        assert found is not None
        return found

    def client(self, secret: str = SECRET, scheme: str = "http", **more) -> httpx.Client:
        return httpx.Client(
            base_url=f"{scheme}://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            **{"timeout": 30.0, **more},
        )

    def processes(self) -> list[int]:
        owner = self.holder
        found = [owner.supervisor, owner.front, *owner.tier]
        return [one.pid for one in found if one is not None and is_alive(one)]

    def end(self) -> None:
        owner = self.owner()
        if owner is None:
            return
        pids = [one for one in (owner.front, *owner.tier) if one is not None]
        assert self.stop(20) == ""
        assert eventually(lambda: not any(is_alive(one) for one in pids), 5)
        assert not Path(owner.run_folder).exists()


@pytest.fixture
def gateway(tmp_path):
    made: list[GatewayUnderTest] = []

    def make(name: str = "gateway", **settings) -> GatewayUnderTest:
        made.append(GatewayUnderTest(tmp_path / name, **settings))
        return made[-1]

    yield make
    for one in made:
        one.end()


@contextmanager
def steady_load(gateway: GatewayUnderTest, clients: int = 4, pause_s: float = 0.01):
    """Requests all the time, streaming and not; at the end nothing may have gone wrong."""
    over = threading.Event()
    wrong: list[str] = []
    counted = [0]

    def ask(number: int) -> None:
        turn = 0
        with gateway.client() as client:
            while not over.is_set():
                turn += 1
                stream = (turn + number) % 2 == 0
                try:
                    answer = chat(client, stream=stream, max_tokens=4)
                except httpx.HTTPError as error:
                    wrong.append(repr(error))
                    continue
                if answer.status != 200:
                    wrong.append(f"{answer.status} {answer.lines[:2]}")
                elif stream and (answer.error or not answer.is_done):
                    wrong.append(f"stream: {answer.lines[-3:]}")
                counted[0] += 1
                time.sleep(pause_s)

    threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield counted
    finally:
        over.set()
        for thread in threads:
            thread.join(20)
    assert wrong == []
    assert counted[0] > 10


def test_it_serves_through_the_front_and_leaves_nothing_behind(gateway, engines):
    one = gateway().up()
    one.add("r1", engines().url)
    with one.client() as client:
        assert chat(client, max_tokens=2).status == 200
        assert chat(client, stream=True, max_tokens=2).tokens == 2
    assert eventually(lambda: sent(one.state(), "r1") == 2)
    state = one.state()
    assert (state.front, len(state.processes)) == ("up", 2)
    folder = Path(one.holder.run_folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(f.stat().st_mode & 0o077 == 0 for f in folder.iterdir() if f.is_file())


def sent(state, name):
    return sum(p.members[name].sent for p in state.processes if name in p.members)


@pytest.mark.parametrize(
    ("path", "status", "cause"),
    [
        ("/metrics", 404, "path"),
        ("/invocations", 404, "path"),
        ("/v1/../invocations", 404, "path"),
        ("/v1/%2e%2e/invocations", 404, "path"),
        ("/v1//models", 404, "path"),
        ("/v1/x%2f..%2fmetrics", 404, "path"),
        ("/v1/load_lora_adapter", 404, "path"),
        ("/-/alive", 404, "path"),
    ],
)
def test_only_v1_is_served(gateway_of_module, path, status, cause):
    answer = gateway_of_module.raw(f"GET {path} HTTP/1.1")
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert gateway_of_module.logged(f"refused={cause} status={status}")


@pytest.fixture(scope="module")
def gateway_of_module(tmp_path_factory):
    from tests.gateway.engines import Engine

    class Shared(GatewayUnderTest):
        def raw(self, head: str, *headers: str, body: bytes = b"", key: str | None = SECRET):
            lines = [head, "Host: x", *headers]
            if key:
                lines.append(f"Authorization: Bearer {key}")
            return self.bytes("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

        def bytes(self, data: bytes, wait_s: float = 1.0) -> bytes:
            with socket.create_connection(("127.0.0.1", self.port)) as line:
                line.settimeout(wait_s)
                answer = b""
                try:
                    line.sendall(data)
                    while chunk := line.recv(65536):
                        answer += chunk
                except OSError:
                    pass
                return answer

        def logged(self, *words: str) -> bool:
            """Whether the front has told all of it in its newest line."""

            def is_there() -> bool:
                lines = self.paths.front_log.read_text().splitlines()
                return bool(lines) and all(word in lines[-1] for word in words)

            return eventually(is_there, 5)

    engine = Engine()
    one = Shared(tmp_path_factory.mktemp("shared") / "gateway", body_max_bytes=2_000_000)
    one.up()
    one.add("r1", engine.url)
    yield one
    with one.client() as client:  # whatever was tried, the others are unharmed
        assert chat(client).status == 200
    one.end()
    engine.kill()


@pytest.mark.parametrize("key", [None, "", "sk-wrong", "sk-the-first ", "sk-the-first\tx"])
def test_without_a_valid_key_nothing_is_served(gateway_of_module, key):
    answer = gateway_of_module.raw("GET /v1/models HTTP/1.1", key=key)
    if key == "sk-the-first ":  # blanks around a header's value are not part of it
        assert answer.startswith(b"HTTP/1.1 200")
    else:
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"www-authenticate: Bearer" in answer
        assert gateway_of_module.logged("refused=key status=401")


def test_a_client_cannot_name_itself_or_speak_as_the_tier(gateway_of_module):
    answer = gateway_of_module.raw("GET /v1/models HTTP/1.1", "X-Launcher-Key: other")
    assert answer.startswith(b"HTTP/1.1 200")
    assert all(set(p.by_key) <= {"first"} for p in gateway_of_module.state().processes)


SMUGGLED = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: +5"],
        ["Content-Length: 5, 6"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
        ["Transfer-Encoding : chunked"],
        ["X-A: b\rX-B: c"],
        ["X-A: \0"],
        [" folded: header"],
    ],
)
def test_a_request_whose_length_can_be_read_in_two_ways_is_refused(gateway_of_module, headers):
    body = f"0\r\n\r\n{SMUGGLED}".encode()
    answer = gateway_of_module.raw("POST /v1/completions HTTP/1.1", *headers, body=body)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    assert gateway_of_module.logged("status=400", "<BADREQ>")


@pytest.mark.parametrize("size", ["0x5", "-1", "fffffffffffffffff", "5;\n", ""])
def test_odd_chunk_sizes_are_refused(gateway_of_module, size):
    body = f"{size}\r\nabcde\r\n0\r\n\r\n{SMUGGLED}".encode()
    answer = gateway_of_module.raw(
        "POST /v1/completions HTTP/1.1", "Transfer-Encoding: chunked", body=body
    )
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 502")
    assert b"200 OK" not in answer


def test_both_length_headers_never_make_two_requests_of_one(gateway_of_module):
    """RFC 9112 lets the length be ignored and the connection be closed; HAProxy does both."""
    answer = gateway_of_module.raw(
        "POST /v1/completions HTTP/1.1",
        "Content-Length: 5",
        "Transfer-Encoding: chunked",
        body=f"0\r\n\r\n{SMUGGLED}".encode(),
    )
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer.lower()


def test_endless_headers_and_large_bodies_are_refused(gateway_of_module):
    answer = gateway_of_module.raw("GET /v1/models HTTP/1.1", "X-Big: " + "a" * 1_000_000)
    assert answer[:12] in (b"HTTP/1.1 400", b"")  # refused while we were still sending
    assert gateway_of_module.logged("status=400", "<BADREQ>")
    with gateway_of_module.client() as client:
        assert client.post("/v1/completions", content=b"x" * 3_000_000).status_code == 413
    begun = b"x" * 40_000  # of a gigabyte: it is refused long before the rest has come
    answer = gateway_of_module.raw(
        "POST /v1/completions HTTP/1.1", "Content-Length: 1000000000", body=begun
    )
    assert answer.startswith(b"HTTP/1.1 413")
    assert gateway_of_module.logged("refused=body_size status=413")


def test_a_body_that_a_model_can_take_passes(gateway_of_module):
    """128 thousand tokens are half a megabyte; two images are more."""
    with gateway_of_module.client() as client:
        big = {"messages": [{"role": "user", "content": "x" * 1_900_000}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=big).status_code == 200


def test_slow_headers_are_cut_off_and_harm_nobody(gateway_of_module):
    lines = [socket.create_connection(("127.0.0.1", gateway_of_module.port)) for _ in range(50)]
    for line in lines:
        line.sendall(b"GET /v1/models HTTP/1.1\r\nX-A: ")
    began = time.monotonic()
    with gateway_of_module.client() as client:
        assert chat(client).status == 200
        assert time.monotonic() - began < 2
    lines[0].settimeout(15)
    assert lines[0].recv(100).startswith((b"HTTP/1.1 408", b"HTTP/1.0 408"))
    for line in lines:
        line.close()


def test_keys_come_and_go_at_run_time_and_only_their_hashes_are_kept(gateway, engines):
    one = gateway().up()
    one.add("r1", engines().url)
    with one.client("sk-second") as second, one.client() as first:
        assert second.get("/v1/models").status_code == 401
        one.change_keys(lambda k: keyring.added(k, "second", "sk-second", time.time()))
        assert eventually(lambda: second.get("/v1/models").status_code == 200)
        one.change_keys(lambda keys: keyring.revoked(keys, "first"))
        assert eventually(lambda: first.get("/v1/models").status_code == 401)
        assert second.get("/v1/models").status_code == 200
    for folder in (one.paths.root, Path(one.holder.run_folder)):
        for file in (f for f in folder.iterdir() if f.is_file()):
            assert b"sk-second" not in file.read_bytes(), file
    with pytest.raises(UsageError, match="no key named first"):
        keyring.revoked(one.keys(), "first")
    with pytest.raises(UsageError, match="no name for a key"):
        keyring.added(one.keys(), "a b\n", "x", 0)


@pytest.mark.parametrize("victim", ["tier", "front", "supervisor"])
def test_a_process_of_ours_that_dies_is_replaced(gateway, engines, victim):
    one = gateway().up()
    one.add("r1", engines().url)
    owner = one.holder
    chosen = {"tier": owner.tier[0], "front": owner.front, "supervisor": owner.supervisor}[victim]
    os.kill(chosen.pid, signal.SIGKILL)
    if victim == "supervisor":
        with one.client() as client:
            assert chat(client).status == 200
            assert eventually(lambda: not one.is_supervised())
            one.dead("r1")
            assert client.post("/v1/completions", json={}).status_code == 503
            one.add("r1", one.orders().members[0].url)
            one.start()
            assert eventually(one.is_supervised)
        assert eventually(lambda: one.holder.supervisor.pid != chosen.pid)
        assert {p.pid for p in one.holder.tier} == {p.pid for p in owner.tier}
        assert one.holder.front == owner.front
    assert eventually(lambda: len(one.processes()) == 4 and chosen.pid not in one.processes())
    with one.client() as client:
        assert eventually(lambda: _status(client) == 200)


def _status(client: httpx.Client) -> int:
    try:
        return chat(client).status
    except httpx.HTTPError:
        return 0


def test_a_request_without_a_byte_survives_its_tier_process(gateway, engines):
    one = gateway().up()
    engine = engines(ttft_s=1.5)
    one.add("r1", engine.url)
    with one.client() as client:
        asked = [InBackground(lambda: chat(client, stream=True)) for _ in range(6)]
        assert eventually(lambda: engine.counts()["running"] == 6)
        busy = max(one.holder.tier, key=lambda p: _in_flight_of(one, p.pid))
        os.kill(busy.pid, signal.SIGKILL)
        answers = [a.result() for a in asked]
    assert [(a.status, a.error) for a in answers] == [(200, None)] * 6
    assert eventually(lambda: in_flight(one.state(), "r1") == 0)


def _in_flight_of(gateway, pid):
    return sum(p.in_flight for p in gateway.state().processes if p.pid == pid)


def test_a_restart_to_a_new_version_drops_nothing(gateway, engines):
    one = gateway().up()
    for name in ("r1", "r2"):
        one.add(name, engines(gap_s=0.05, ttft_s=0.05).url)
    before = {p.pid for p in one.holder.tier}
    with steady_load(one) as counted:
        assert eventually(lambda: counted[0] > 20)
        one.renew()
        assert eventually(lambda: not before & {p.pid for p in one.holder.tier}, 30)
        supervisor = one.holder.supervisor.pid
    assert one.holder.supervisor.pid == supervisor
    assert len(one.holder.tier) == 2


def test_a_supervisor_killed_in_a_restart_leaves_no_process_unknown(gateway, engines):
    one = gateway().up()
    one.add("r1", engines(ttft_s=0.02).url)
    with steady_load(one):
        for pause_s in (0.05, 0.4, 0.9):
            one.renew()
            time.sleep(pause_s)
            os.kill(one.holder.supervisor.pid, signal.SIGKILL)
            assert eventually(lambda: not one.is_supervised())
            one.start()
            assert eventually(one.is_supervised)
            assert eventually(lambda: len(tiers_of(one)) == len(one.holder.tier) == 2, 15)
    assert one.stop(15) == ""
    assert tiers_of(one) == []


def tiers_of(gateway) -> list[int]:
    """Every process of the tier that there is, whoever knows it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "launcher.gateway.tier" in words and str(gateway.paths.root) in words:
                found.append(process.pid)
    return found


def test_changed_settings_and_a_new_certificate_are_taken_without_a_drop(
    gateway, engines, tmp_path
):
    certificate, key = make_certificate(tmp_path, "first.example")
    one = gateway(certificate=certificate, certificate_key=key).up()
    one.add("r1", engines().url)
    with one.client(scheme="https", verify=False) as client:
        assert chat(client).status == 200
        assert served_name(one.port) == "first.example"
        make_certificate(tmp_path, "second.example")
        assert eventually(lambda: served_name(one.port) == "second.example")
        assert chat(client).status == 200
        (tmp_path / "cert.pem").write_text("no certificate")
        assert eventually(lambda: "certificate" in one.state().problem.lower())
        assert served_name(one.port) == "second.example"
        make_certificate(tmp_path, "third.example")
        assert eventually(lambda: served_name(one.port) == "third.example")
        assert eventually(lambda: one.state().problem == "")
        assert chat(client).status == 200


def make_certificate(folder: Path, name: str) -> tuple[str, str]:
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return str(certificate), str(key)


def served_name(port: int) -> str:
    pem = ssl.get_server_certificate(("127.0.0.1", port))
    told = subprocess.run(
        ["openssl", "x509", "-noout", "-subject"],
        input=pem,
        text=True,
        capture_output=True,
        check=True,
    )
    return told.stdout.strip().rpartition("CN")[2].strip(" =")


def test_a_second_gateway_on_the_port_is_refused_with_the_owners_name(gateway, engines):
    one = gateway().up()
    one.add("r1", engines().url)
    second = GatewayUnderTest(one.paths.root.with_name("second"), port=one.port)
    second.start()
    with pytest.raises(BackendError, match=r"held by the gateway of fleet t \(root, pid"):
        second.wait_until_up()
    os.kill(one.holder.supervisor.pid, signal.SIGKILL)  # the gateway itself goes on
    assert eventually(lambda: not one.is_supervised())
    second.start()
    with pytest.raises(BackendError, match="held by the gateway of fleet t"):
        second.wait_until_up()
    with one.client() as client:
        assert chat(client).status == 200


def test_a_port_of_another_program_is_refused(gateway):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        one = gateway(port=other.getsockname()[1])
        one.start()
        with pytest.raises(BackendError, match="is in use"):
            one.wait_until_up()


def test_the_end_waits_for_what_is_under_way_and_takes_no_more(gateway, engines):
    one = gateway().up()
    engine = engines(ttft_s=1.5)
    one.add("r1", engine.url)
    with one.client() as client:
        asked = InBackground(lambda: chat(client, stream=True))
        assert eventually(lambda: engine.counts()["running"] == 1)
        one.give(one.orders().model_copy(update={"open": False}))
        with one.client() as second:
            refused = chat(second)
            assert (refused.status, refused.headers["retry-after"]) == (503, "30")
        threading.Thread(target=one.stop, args=(15,)).start()
        assert asked.result().is_done
    assert eventually(lambda: not Path(one.paths.owner).exists(), 10)


def test_members_come_and_go_under_load_without_an_error(gateway, engines):
    """Twenty seconds of the churn of benchmarks/gateway.py, which goes on for five minutes."""
    one = gateway().up()
    made = [engines(ttft_s=0.01, gap_s=0.01) for _ in range(4)]
    one.add("m0", made[0].url)
    deadline = time.monotonic() + 20
    turn = 0
    with steady_load(one, clients=6, pause_s=0.02) as counted:
        while time.monotonic() < deadline:
            turn += 1
            one.add(f"m{turn}", made[turn % 4].url)
            leaving = f"m{turn - 1}"
            one.drain(leaving)
            assert eventually(lambda name=leaving: _has_left(one, name), 10)
            one.remove(leaving)
            time.sleep(max(0.0, 1 - time.monotonic() % 1))
    assert turn >= 10
    assert counted[0] > 500


def _has_left(gateway, name):
    state, revision = gateway.state(), gateway.orders().revision
    known = all(p.orders_revision == revision for p in state.processes)
    return known and in_flight(state, name) == 0


def test_metrics_are_on_loopback_and_tell_who_did_what(gateway, engines):
    one = gateway().up()
    one.add("r1", engines().url, where="job 7, h[1-2]")
    with one.client() as client:
        chat(client)
        chat(client, stream=True)
    with one.client("sk-wrong") as client:
        client.get("/v1/models")
    assert eventually(lambda: sent(one.state(), "r1") == 2)
    state = one.state()
    text = httpx.get(f"http://127.0.0.1:{state.metrics_port}/metrics").text
    assert 'where="job 7, h[1-2]"' in text
    assert "launcher_gateway_first_token_seconds_bucket" in text
    assert 'launcher_front_responses_total{class="4xx"} 1.0' in text
    with socket.socket() as probe:
        assert probe.connect_ex((_own_address(), state.metrics_port)) != 0


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.2"
        return str(probe.getsockname()[0])


def test_haproxy_is_asked_before_its_configuration_counts(tmp_path):
    broken = tmp_path / "haproxy.cfg"
    broken.write_text("frontend x\n  bind :nonsense\n")
    with pytest.raises(BackendError, match="refuses its configuration"):
        haproxy.check(haproxy.find_binary(), broken)
    with pytest.raises(BackendError, match="does not answer"):
        haproxy.ask(RunFolder(tmp_path).front_socket, "show info")
