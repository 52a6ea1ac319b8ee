"""A fleet ends by itself when it is old enough or nobody asks; one is driven in front of us."""

import signal
import time
from dataclasses import replace

import pytest
import yaml

from launcher.apply import remember
from launcher.notices import notices
from launcher.snapshot import GatewayView
from launcher.steps import Close
from tests.launcher.fleets import eventually
from tests.launcher.test_gateway_of_a_fleet import Fleet
from tests.launcher.test_notify import status
from tests.launcher.test_plan import plan, serving
from tests.launcher.worlds import NOW, make_context, ranked, snapshot


def decided(limits: dict, *, quiet_s=None, age_s=0.0, served_s=0.0, **changes):
    context = make_context(limits=limits)
    record = ranked(context, serving_at=NOW - served_s, **changes)
    record = record.model_copy(update={"started_at": NOW - age_s})
    seen = replace(
        snapshot(*serving()), gateway=GatewayView(is_up=quiet_s is not None, quiet_s=quiet_s)
    )
    return plan(context, record, seen).steps


@pytest.mark.parametrize(
    ("limits", "facts", "told"),
    [
        ({}, {"quiet_s": 1e5, "age_s": 1e5, "served_s": 1e5}, ""),
        ({"ttl": "2h"}, {"age_s": 7199.0}, ""),
        ({"ttl": "2h"}, {"age_s": 7200.0}, "it came up 2 h ago (limits.ttl)"),
        ({"idle": "30m"}, {"quiet_s": 1799.0, "served_s": 9999.0}, ""),
        (
            {"idle": "30m"},
            {"quiet_s": 1800.0, "served_s": 9999.0},
            "nobody asked it anything for 30 min (limits.idle)",
        ),
        # Nobody could ask before it served, and what the gateway has not told is not known.
        ({"idle": "30m"}, {"quiet_s": 9999.0, "served_s": 60.0}, ""),
        ({"idle": "30m"}, {"quiet_s": None, "served_s": 9999.0}, ""),
    ],
)
def test_it_ends_when_its_time_is_over_or_nobody_asks(limits, facts, told):
    assert decided(limits, **facts) == ((Close(told),) if told else ())


def test_what_was_decided_stands_and_is_told_once():
    record = remember(ranked(make_context()), Close("it is late"), NOW)
    assert record.closed == "it is late"
    before = status("serving")
    after = before.model_copy(update={"closed": "it is late", "desired": "down"})
    assert [one.event for one in notices(before, after)] == ["ending"]
    assert notices(after, after) == []


@pytest.fixture
def fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir):
    made = Fleet(tmp_path, cli, fake_engine, model_folder, fleet_name, state_dir)
    made.spec["replicas"] = 1
    yield made
    assert made.cli("down", "--fleet", fleet_name).returncode == 0
    assert not made.engines()


def test_a_fleet_that_nobody_asks_ends_itself_and_requests_keep_it(fleet):
    fleet.spec["limits"]["idle"] = "4s"
    assert fleet.up() == 0
    began = time.monotonic()
    with fleet.client() as client:
        while time.monotonic() - began < 7.0:
            assert fleet.ask(client).status_code == 200
            time.sleep(0.5)
    assert fleet.status()["phase"] == "serving"
    assert eventually(lambda: fleet.status()["phase"] == "stopped", 30.0)
    found = fleet.status()
    assert (found["finished"], found["error"]) == (True, None)
    assert "limits.idle" in found["closed"]
    assert not fleet.engines()
    screen = fleet.cli("status", "--fleet", fleet.name)
    assert "ended by itself: nobody asked it anything" in screen.stdout
    assert "the fleet ends: nobody asked" in fleet.cli("events", "--fleet", fleet.name).stdout


def test_the_time_of_a_running_fleet_can_be_changed_and_then_it_ends(fleet):
    fleet.spec["limits"]["ttl"] = "1h"
    assert fleet.up() == 0
    assert fleet.status()["ends_at"] - time.time() > 3000
    fleet.spec["limits"]["ttl"] = "1s"
    fleet.up()  # joins the run, which ends under its eyes or just before
    assert eventually(lambda: fleet.status()["phase"] == "stopped", 30.0)
    assert "limits.ttl" in fleet.status()["closed"]
    fleet.spec["limits"]["ttl"] = "1h"
    assert fleet.up() == 0, "a new run begins"
    assert fleet.status()["run"] == 2


def in_front(fleet):
    path = fleet.folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet.spec))
    command = fleet.cli.start("up", "-f", str(path), "--foreground")

    def serves() -> bool:
        return fleet.paths.status.exists() and fleet.status()["phase"] == "serving"

    assert eventually(serves, 60.0)
    fleet.document = fleet.status()
    return command


def test_in_the_foreground_the_command_is_the_controller(fleet):
    command = in_front(fleet)
    assert fleet.driver().pid == command.pid
    second = fleet.cli("up", "-f", str(fleet.folder / "fleet.yaml"), "--foreground")
    assert second.returncode == 2
    assert f"pid {command.pid}" in second.stderr
    assert fleet.cli("down", "--fleet", fleet.name).returncode == 0
    out, err = command.communicate(timeout=30)
    assert command.returncode == 0, err
    assert "r1  serves" in out
    assert "is to end" in out


def test_the_end_of_the_foreground_is_not_the_end_of_the_fleet(fleet):
    command = in_front(fleet)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=30)
    assert command.returncode == 130
    assert "the fleet goes on" in err
    with fleet.client() as client:
        assert fleet.ask(client).status_code == 200
    assert eventually(lambda: fleet.driver().pid != command.pid, 15.0), "its keeper starts another"
