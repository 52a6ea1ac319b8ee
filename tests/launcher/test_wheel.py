"""Who drives, and when it lets go: also while it only waits to try again."""

import os
import signal
import subprocess
import sys

import pytest

from launcher.files import make_private, read_document, write_document
from launcher.paths import FleetPaths
from launcher.wheel import LostWheelError, Wheel
from launcher.wish import Driver, write_wish
from tests.launcher.fleets import eventually


@pytest.fixture
def paths(tmp_path):
    made = FleetPaths(tmp_path / "chat")
    make_private(made.root)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def driver(paths) -> Driver:
    return read_document(paths.controller, Driver)


def test_its_beat_grows_and_only_its_end_says_so(paths):
    wheel = Wheel(paths, run=1)
    wheel.hold()
    wheel.hold()
    assert (driver(paths).beat, driver(paths).ended) == (2, False)
    wheel.leave()
    assert driver(paths).ended


def test_who_was_silent_for_too_long_does_not_take_the_wheel_back(paths):
    wheel = Wheel(paths, run=1)
    wheel.hold()
    other = driver(paths).model_copy(update={"host": "login2", "pid": 7, "beat": 1})
    write_document(paths.controller, other)
    with pytest.raises(LostWheelError, match="pid 7 on login2"):
        wheel.hold()
    wheel.leave()
    assert driver(paths) == other, "nor does it end the other one's"


def test_an_order_to_end_counts_while_a_controller_waits_to_try_again(paths):
    make_private(paths.run(1).root)
    paths.run(1).spec.write_text("{")  # cannot be read now; it is tried again
    write_wish(paths, 1, "up")
    made = subprocess.Popen(
        [sys.executable, "-m", "launcher.controller", str(paths.root)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    seen = made.stderr.readline()
    assert "spec.json" in seen
    made.send_signal(signal.SIGTERM)
    assert eventually(lambda: made.poll() is not None, 5.0)
    made.stderr.close()
    assert made.returncode == 0
