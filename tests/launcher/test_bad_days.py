"""What a fleet is asked while something beside it is broken: Slurm, sshd, the disk, the clock."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import bed
from tests.conftest import Cli
from tests.launcher.fleets import (
    Asking,
    engine_processes,
    engines,
    eventually,
    kill_controller,
    nodes_of,
    replica_of,
    serves_again,
    spares,
)

pytestmark = pytest.mark.cluster
FULL = pytest.mark.acceptance  # they wait for minutes; CI meets the others
AWAY_S = 60.0


@pytest.fixture
def fleet(request, on_whole_hosts):
    """Two hosts serve, one is their spare."""
    made = on_whole_hosts(request.param)
    made.spec["spares"] = 1
    return made


def serving(fleet) -> Asking:
    """It serves, has its spare, and is asked all the time."""
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert eventually(lambda: len(spares(fleet)) == 1, 30)
    asking = Asking(document)
    asking.start()
    return asking


def serves_as(fleet, generation: int) -> bool:
    return replica_of(fleet)["generation"] == generation


def waits(fleet) -> str:
    return "; ".join(fleet.status()[1]["waiting_for"])


@FULL
@pytest.mark.parametrize("fleet", ["slurm"], indirect=True)
def test_while_slurms_controller_is_away_a_spare_takes_over_and_afterwards_all_is_well(fleet):
    asking = serving(fleet)
    victim, spare = nodes_of(fleet)[1], spares(fleet)[0]
    bed.stop_slurmctld()
    away_since = time.monotonic()
    assert eventually(lambda: "the backend: " in waits(fleet), 40.0), fleet.status()
    assert replica_of(fleet)["phase"] == "serving"
    bed.kill(victim)
    assert eventually(lambda: serves_again(fleet, 2), 50.0), fleet.status()
    assert spare in nodes_of(fleet)
    time.sleep(max(0.0, AWAY_S - (time.monotonic() - away_since)))
    bed.start_slurmctld()
    bed.start(victim)
    assert eventually(lambda: len(spares(fleet)) == 1, 90.0), fleet.status()
    asking.stop()
    assert asking.failed == []
    assert replica_of(fleet)["generation"] == 2, "it was disturbed once, by the loss"
    assert fleet.status()[0] == 0


@FULL
@pytest.mark.parametrize("fleet", ["ssh"], indirect=True)
def test_a_host_whose_sshd_hangs_goes_on_serving_and_the_status_names_it(fleet):
    asking = serving(fleet)
    victim = nodes_of(fleet)[1]
    bed.stop_sshd(victim, hang=True)
    try:
        kill_controller(fleet)  # its session lives on; the next one gets none, and never saw it
        assert eventually(lambda: f"{victim}: " in waits(fleet), 60.0), fleet.status()
        assert not eventually(lambda: not serves_as(fleet, 1), 20.0), "it is not taken for lost"
    finally:
        bed.stop_sshd(victim, hang=False)
    asking.stop()
    assert asking.failed == []
    assert eventually(lambda: fleet.status()[0] == 0, 60.0), fleet.status()


@pytest.fixture
def small_disk(shared_dir):
    """The state folder is a file system of its own, of 16 MiB."""
    state = shared_dir / "state"
    state.mkdir(mode=0o700)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "small", str(state)], check=True
    )
    yield state
    subprocess.run(["umount", "-l", str(state)], check=False)


@pytest.mark.parametrize("fleet", ["ssh"], indirect=True)
def test_with_a_full_state_folder_it_serves_and_acts_when_there_is_room_again(small_disk, fleet):
    asking = serving(fleet)
    filler = small_disk / "filler"
    filled = subprocess.run(["dd", "if=/dev/zero", f"of={filler}"], stderr=subprocess.DEVNULL)
    assert filled.returncode != 0, "there was no end to it"
    victim = nodes_of(fleet)[1]
    bed.kill(victim)
    assert eventually(lambda: fleet.status()[1]["controller"] != "running", 60.0)
    assert "is full" in waits(fleet)
    assert victim not in engines(fleet)
    filler.unlink()
    assert eventually(lambda: serves_again(fleet, 2), 60.0), fleet.status()
    asking.stop()
    assert asking.failed == [], "they were held"


@FULL
@pytest.mark.parametrize("fleet", ["ssh"], indirect=True)
def test_a_fleet_whose_state_folder_was_removed_comes_up_anew_and_the_old_one_is_gone(fleet):
    code, document = fleet.up()
    assert code == 0, document["error"]
    old = set(engine_processes(fleet.name))
    folder = Path(fleet.cli.environment["LAUNCHER_STATE_DIR"]) / fleet.name
    owner = json.loads((folder / "gateway/owner.json").read_text())
    for pid in (owner["supervisor"]["pid"], owner["front"]["pid"], _driver(folder)["pid"]):
        os.kill(pid, 9)
    for one in owner["tier"]:
        os.kill(one["pid"], 9)
    shutil.rmtree(folder)
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert not old & set(engine_processes(fleet.name))


@pytest.mark.parametrize("fleet", ["ssh"], indirect=True)
def test_of_two_controllers_only_one_drives_from_this_host_or_another(fleet):
    asking = serving(fleet)
    folder = Path(fleet.cli.environment["LAUNCHER_STATE_DIR"]) / fleet.name
    driver = json.loads((folder / "controller.json").read_text())
    command = [sys.executable, "-m", "launcher.controller", str(folder)]
    elsewhere = ["unshare", "-u", "sh", "-c", 'hostname login2; exec "$@"', "sh", *command]
    for other in (command, elsewhere):
        ended = subprocess.run(
            other, env=fleet.cli.environment, capture_output=True, text=True, timeout=60
        )
        assert (ended.returncode, "another controller drives" in ended.stderr) == (0, True)
    both = [fleet.cli.start("up", "-f", fleet.file) for _ in range(2)]
    assert [one.wait(60) for one in both] == [0, 0]
    assert json.loads((folder / "controller.json").read_text())["pid"] == driver["pid"]
    # The first one's host is gone: another login node with the same folder adopts the fleet.
    os.kill(driver["pid"], 9)
    taken = subprocess.Popen(elsewhere, env=fleet.cli.environment, start_new_session=True)
    try:
        assert eventually(lambda: _driver(folder)["host"] == "login2", 30.0)
        assert eventually(lambda: fleet.status()[0] == 0, 30.0)
        assert replica_of(fleet)["generation"] == 1
        asking.stop()
        assert asking.failed == []
    finally:
        os.killpg(taken.pid, 9)
        taken.wait()


def _driver(folder: Path) -> dict:
    return json.loads((folder / "controller.json").read_text())


@FULL
@pytest.mark.parametrize("fleet", ["ssh"], indirect=True)
def test_a_controller_whose_clock_jumps_an_hour_disturbs_nobody_and_does_its_work(fleet):
    shift = fleet.folder / "clock"
    shift.write_text("0\n")
    honest = fleet.cli
    fleet.cli = Cli(
        {
            **honest.environment,
            "LD_PRELOAD": str(bed.clock_library()),
            "SHIFTED_CLOCK": str(shift),
        },
        fleet.folder,
    )
    asking = serving(fleet)
    for seconds in (3600, 0, -3600, 3600):
        shift.write_text(f"{seconds}\n")
        assert not eventually(lambda: fleet.status()[0] != 0, 8.0), (seconds, fleet.status())
    fleet.cli = honest  # whoever looks has the right time
    assert fleet.status()[0] == 0
    victim = nodes_of(fleet)[1]
    bed.kill(victim)
    assert eventually(lambda: serves_again(fleet, 2), 60.0), fleet.status()
    # The next controller has the right time, an hour before what the record holds.
    shift.write_text("0\n")
    kill_controller(fleet)
    bed.start(victim)
    assert eventually(lambda: len(spares(fleet)) == 1, 90.0), fleet.status()
    asking.stop()
    assert asking.failed == []
    assert replica_of(fleet)["generation"] == 2
