import os
import time

from launcher.files import write_document
from launcher.paths import FleetPaths
from launcher.wish import Driver, is_driven, next_run, take_the_wheel, write_wish


def test_only_one_controller_holds_the_wheel(tmp_path):
    paths = FleetPaths(tmp_path / "fleet")
    first = take_the_wheel(paths)
    assert first is not None
    assert take_the_wheel(paths) is None
    assert is_driven(paths)
    os.close(first)
    assert not is_driven(paths)
    again = take_the_wheel(paths)
    assert again is not None
    os.close(again)


def test_a_controller_on_another_host_that_stopped_beating_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.wish.DRIVER_STALE_S", 1.0)
    paths = FleetPaths(tmp_path / "fleet")
    paths.root.mkdir()
    write_document(
        paths.controller, Driver(host="elsewhere", pid=1, run=1, beat=7, started_at=time.time())
    )
    handle = take_the_wheel(paths)
    assert handle is not None
    os.close(handle)


def test_runs_are_numbered_after_any_that_left_a_trace(tmp_path):
    paths = FleetPaths(tmp_path / "fleet")
    assert next_run(paths) == 1
    (paths.root / "runs/7").mkdir(parents=True)
    assert next_run(paths) == 8
    write_wish(paths, 9, "up")
    assert next_run(paths) == 10
