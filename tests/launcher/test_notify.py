"""Who is told what when a fleet does not serve as it should."""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from launcher import delivery, secretstore
from launcher.errors import SpecError
from launcher.files import make_private, write_document
from launcher.herald import Herald
from launcher.journal import Journal
from launcher.journal import read as read_journal
from launcher.notices import Notice, dated, notices
from launcher.paths import FleetPaths
from launcher.spec import FleetSpec
from launcher.specfile import load
from launcher.status import CordonStatus, ReplicaStatus, Status, StatusError
from tests.launcher.fleets import eventually
from tests.launcher.test_gateway_of_a_fleet import Fleet

TROUBLE = StatusError(code="engine", message="serve was killed by signal 9", where="node n2")
ASKED = "restarted because a person asked for it"


def status(phase, *replicas, at=100.0, **more) -> Status:
    """`replicas` are phases; a fleet of two serves unless they say otherwise."""
    phases = replicas or ("serving", "serving")
    values = {
        "fleet": "chat",
        "run": 1,
        "desired": "up",
        "phase": phase,
        "endpoint": "http://h:1/v1",
        "api_key_file": "/k",
        "model": "m",
        "backend": "local",
        "replicas": [
            ReplicaStatus(name=f"r{n}", generation=1, phase=one, endpoint=None, nodes=[])
            for n, one in enumerate(phases, 1)
        ],
        "waiting_for": [],
        "updated_at": at,
        **more,
    }
    return Status(**values)


def told(*statuses) -> list[Notice]:
    """Everything that is told while these follow each other."""
    found, before = [], None
    for one in statuses:
        now = dated(before, one)
        found += notices(before, now)
        before = now
    return found


def test_a_fleet_that_comes_up_tells_nothing():
    assert not told(
        status("starting", "pending", "pending"),
        status("degraded", "serving", "joining"),  # the first one is there before the second
        status("serving"),
        status("serving", at=200.0),
    )


def test_a_replica_that_dies_and_comes_back_is_told_twice_with_how_long_it_took():
    bad, good = told(
        status("serving"),
        status("degraded", "serving", "joining", at=110.0, error=TROUBLE),
        status("degraded", "serving", "joining", at=120.0, error=TROUBLE),
        status("serving", at=158.5),
        status("serving", at=160.0),
    )
    assert bad.model_dump() == {
        "version": 1,
        "fleet": "chat",
        "at": 110.0,
        "event": "degraded",
        "phase": "degraded",
        "message": "1/2 replicas serve: serve was killed by signal 9",
        "where": "node n2",
        "replica": "r2",
    }
    assert (good.event, good.replica, good.at) == ("serving", "r2", 158.5)
    assert good.message == "2/2 replicas serve again, after 48.5 s"


def test_a_fleet_that_fails_is_told_also_when_it_never_served():
    (failed,) = told(
        status("starting", "joining"),
        status("failed", "failed", at=130.0, error=TROUBLE),
        status("failed", "failed", at=131.0, error=TROUBLE, finished=True),
    )
    assert (failed.event, failed.replica) == ("failed", "r1")
    events = [
        one.event
        for one in told(
            status("serving"),
            status("degraded", "failed", "serving", error=TROUBLE),
            status("failed", "failed", "failed", error=TROUBLE),
            status("degraded", "joining", "failed", error=TROUBLE),
            status("serving"),
        )
    ]
    assert events == ["degraded", "failed", "degraded", "serving"]


def test_a_replica_that_never_comes_up_beside_one_that_serves_is_told_once():
    (bad,) = told(
        status("degraded", "serving", "joining"),
        status("degraded", "serving", "failed", at=130.0, error=TROUBLE),
        status("degraded", "serving", "failed", at=140.0, error=TROUBLE),
    )
    assert (bad.event, bad.replica, bad.at) == ("degraded", "r2", 130.0)


def test_a_gateway_that_is_away_is_named_and_a_restart_says_that_a_person_asked():
    bad, good = told(
        status("serving"),
        status("degraded", at=110.0, waiting_for=["the gateway: port 8080 in use"]),
        status("serving", at=112.0),
    )
    assert (bad.where, bad.replica) == ("gateway", "")
    assert bad.message == "2/2 replicas serve: the gateway: port 8080 in use"
    assert good.where == "gateway"
    down = status("degraded", "draining", "serving", at=110.0)
    r1 = down.replicas[0].model_copy(update={"story": ["serves again", ASKED]})
    (bad,) = told(
        status("serving"), down.model_copy(update={"replicas": [r1, *down.replicas[1:]]})
    )
    assert bad.message == f"1/2 replicas serve: {ASKED}"


def test_a_quarantine_is_told_once_and_an_old_one_never():
    def held(node, at, kind="quarantine"):
        return CordonStatus(node=node, kind=kind, reason="GPU 3: row remap failed", at=at)

    old, new, by_hand = held("h1", 50.0), held("h2", 105.0), held("h3", 106.0, "cordon")
    (notice,) = told(
        status("serving", cordoned=[old]),
        status("serving", cordoned=[old, new, by_hand]),
        status("serving", cordoned=[old, new, by_hand]),
    )
    assert (notice.event, notice.where) == ("quarantined", "node h2")
    assert notice.message == "h2 takes no new work: GPU 3: row remap failed"


def test_down_tells_nothing():
    assert not told(
        status("serving"),
        status("stopping", "draining", "draining", desired="down"),
        status("stopped", "stopped", "stopped", desired="down", error=TROUBLE),
    )


# The spec


def spec_of(tmp_path, notify):
    file = tmp_path / "fleet.yaml"
    file.write_text(f"name: chat\nmodel: org/model\nnotify: {json.dumps(notify)}\n")
    return load(file, {}).spec


def test_receivers_are_written_shortly_and_paths_become_absolute(tmp_path, state_dir):
    notify = spec_of(tmp_path, {"command": ["./tell.sh", "./x"], "webhook": "https://h/a"}).notify
    assert notify.command == (str(tmp_path / "tell.sh"), "./x")
    assert notify.webhook.url == "https://h/a"
    assert spec_of(tmp_path, {"command": ["mail", "me"]}).notify.command[0] == "mail"
    named = spec_of(tmp_path, {"webhook": {"file": "url"}}).notify.webhook.source
    assert named.file == str(tmp_path / "url")


@pytest.mark.parametrize(
    ("notify", "words"),
    [
        ({}, "write a command, a webhook, or both"),
        ({"webhook": "https://h/a?token=abc"}, "may hold a secret"),
        ({"webhook": "https://user:abc@h/a"}, "may hold a secret"),
        ({"webhook": "ftp://h/abc"}, "notify.webhook"),
        ({"webhook": {"env": "A", "file": "b"}}, "exactly one"),
        ({"webhook": {"evn": "A"}}, "unknown key notify.webhook.evn"),
        ({"command": "mail me"}, "notify.command"),
        ({"command": [""]}, "a program's name"),
    ],
)
def test_what_cannot_be_a_receiver_is_refused_and_no_secret_is_shown(
    tmp_path, state_dir, notify, words
):
    with pytest.raises(SpecError) as caught:
        spec_of(tmp_path, notify)
    assert words in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_webhook_that_is_a_secret_is_kept_like_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOOK", "https://hooks.example/T0/abc")
    base = {"name": "chat", "model": "org/model"}
    spec = FleetSpec.model_validate({**base, "notify": {"webhook": {"env": "HOOK"}}})
    secretstore.provide(spec, tmp_path / "secrets")
    kept = tmp_path / "secrets" / secretstore.WEBHOOK_FILE
    assert kept.read_text().strip() == "https://hooks.example/T0/abc"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert "abc" not in spec.model_dump_json()
    monkeypatch.setenv("HOOK", "abc")
    with pytest.raises(SpecError) as caught:
        secretstore.provide_changed(spec, tmp_path / "secrets")
    assert "abc" not in str(caught.value)
    secretstore.provide_changed(FleetSpec.model_validate(base), tmp_path / "secrets")
    assert not kept.exists()


# Telling


class Receiver:
    """A webhook that answers with these codes, the last one for ever."""

    def __init__(self, *codes) -> None:
        self.codes = list(codes)
        self.got: list[dict] = []
        self.paths: list[str] = []


@contextmanager
def webhook(*codes):
    receiver = Receiver(*codes)

    class Api(BaseHTTPRequestHandler):
        def log_message(self, *rest):
            return

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.paths.append(self.path)
            receiver.got.append(json.loads(body))
            many = len(receiver.codes) > 1
            self.send_response(receiver.codes.pop(0) if many else receiver.codes[0])
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    receiver.url = f"http://127.0.0.1:{server.server_port}/T0/secret-part"
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tell(tmp_path):
    """A herald for this `notify`, with the fleet's folder around it."""
    made = []

    def make(notify, pauses_s=(0.0, 0.0)):
        paths = FleetPaths(tmp_path / "state/chat")
        make_private(paths.run(1).root)
        make_private(paths.secrets)
        spec = FleetSpec.model_validate({"name": "chat", "model": "org/model", "notify": notify})
        write_document(paths.run(1).spec, spec)
        herald = Herald(paths, 1, Journal(paths.run(1).journal), pauses_s)
        herald.paths = paths
        made.append(herald)
        return herald

    yield make
    for herald in made:
        herald.close(0.0)


def journal_of(herald):
    return read_journal(herald.paths.run(1).journal)


NOTICE = Notice(fleet="chat", at=1.5, event="degraded", phase="degraded", message='it\'s "bad"\n$')


def test_a_webhook_gets_it_at_the_third_try(tell):
    with webhook(500, 503, 204) as hook:
        herald = tell({"webhook": hook.url})
        herald.tell(NOTICE)
        herald.close()
        assert hook.got == [NOTICE.model_dump()] * 3
    assert [row["event"] for row in journal_of(herald)] == ["told"]


def test_a_webhook_that_refuses_is_in_the_journal_once_and_its_address_nowhere(tell):
    with webhook(302) as hook:
        herald = tell({"webhook": {"file": "x"}})
        secret = herald.paths.secrets / secretstore.WEBHOOK_FILE
        secret.write_text(hook.url + "\n")
        for _ in range(3):
            herald.tell(NOTICE)
        herald.close()
        assert len(hook.got) == 9, "three tries each, and no redirect was followed"
        assert set(hook.paths) == {"/T0/secret-part"}
        secret.write_text("http://127.0.0.1:9/T0/secret-part")
        herald = tell({"webhook": {"file": "x"}})
        herald.tell(NOTICE)
        herald.close()
    rows = journal_of(herald)
    assert [(row["event"], row["error"]) for row in rows] == [
        ("failed", "answered 302"),
        ("failed", "cannot be asked (ClientConnectorError)"),
    ]
    assert "secret-part" not in json.dumps(rows)


def test_a_command_gets_the_notice_on_stdin_and_as_variables_and_sees_no_shell(tell, tmp_path):
    got = tmp_path / "got"
    code = "import os, sys, json; json.dump([sys.argv[1:], sys.stdin.read(), dict(os.environ)]"
    command = [sys.executable, "-c", f"{code}, open({str(got)!r}, 'w'))", "$HOME; `id`"]
    herald = tell({"command": command})
    herald.tell(NOTICE)
    herald.close()
    words, stdin, environment = json.loads(got.read_text())
    assert words == ["$HOME; `id`"]
    assert json.loads(stdin) == NOTICE.model_dump()
    assert environment["LAUNCHER_MESSAGE"] == NOTICE.message
    assert (environment["LAUNCHER_FLEET"], environment["LAUNCHER_EVENT"]) == ("chat", "degraded")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["/nowhere/at-all"], "cannot be started: No such file or directory"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "exited with code 3"),
        ([sys.executable, "-c", "import time; time.sleep(600)"], "did not end within 1 s"),
    ],
)
def test_a_command_that_fails_or_hangs_says_so_and_is_gone(command, why, monkeypatch):
    monkeypatch.setattr(delivery, "DEADLINE_S", 1.0)
    assert delivery.run_command(tuple(command), NOTICE) == why


def test_a_receiver_that_hangs_delays_nobody_and_the_queue_is_bounded(tell, monkeypatch):
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def hang(command, notice):
        begun.set()
        go_on.wait(20)
        seen.append(notice.at)
        return ""

    monkeypatch.setattr(delivery, "run_command", hang)
    herald = tell({"command": ["x"]})
    for number in range(200):
        herald.tell(NOTICE.model_copy(update={"at": float(number)}))
        assert begun.wait(10)
    go_on.set()
    herald.close()
    assert seen == [0.0, *map(float, range(136, 200))], "the oldest gave way"


def test_what_the_last_controller_told_is_not_told_again(tell):
    with webhook(200) as hook:
        herald = tell({"webhook": hook.url})
        herald.look(status("serving"))
        left = herald.look(status("degraded", "serving", "joining", at=110.0, error=TROUBLE))
        herald.close()
        write_document(herald.paths.status, left)
        again = tell({"webhook": hook.url})
        again.look(status("degraded", "serving", "joining", at=111.0, error=TROUBLE))
        again.look(status("serving", at=130.0))
        again.close()
        assert [one["event"] for one in hook.got] == ["degraded", "serving"]
        assert hook.got[1]["message"].endswith("after 20.0 s")


def test_a_fleet_whose_engine_is_killed_tells_its_command(
    tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir
):
    fleet = Fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir)
    got = tmp_path / "got it's"
    script = tmp_path / "tell.sh"
    script.write_text(f'#!/bin/bash\ncat >> "{got}"\n[ "$LAUNCHER_FLEET" ]\n')
    script.chmod(0o700)
    fleet.spec["replicas"] = 1
    fleet.spec["limits"]["restarts"] = 3
    fleet.spec["notify"] = {"command": [str(script)]}
    try:
        assert fleet.up() == 0
        assert not got.exists()
        fleet.engines()[0].kill()

        def rows() -> list[dict]:
            return [json.loads(line) for line in got.read_text().splitlines()]

        assert eventually(lambda: got.exists() and len(rows()) == 2)
        bad, good = rows()
        assert (bad["event"], bad["replica"], bad["where"]) == ("degraded", "r1", "node n1")
        assert "killed by signal 9" in bad["message"]
        assert (good["event"], good["phase"]) == ("serving", "serving")
        assert good["message"].startswith("1/1 replicas serve again, after ")
        assert "the command was told: degraded" in cli("events", "--fleet", fleet_name).stdout
    finally:
        cli("down", "--fleet", fleet_name)
    assert len(rows()) == 2
