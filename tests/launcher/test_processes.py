import os
import subprocess
import sys
import threading
from multiprocessing import shared_memory
from pathlib import Path

import psutil

from launcher.agent import processes
from launcher.agent.engine import Engine
from launcher.agent.surroundings import Surroundings
from launcher.agent.sweep import sweep
from tests.launcher.worlds import lone_member

CHILD = """
import multiprocessing, sys, time
from multiprocessing import resource_tracker, shared_memory
lock = multiprocessing.get_context("spawn").Lock()
segment = shared_memory.SharedMemory(create=True, size=4096)
for name, kind in ((segment._name, "shared_memory"), (lock._semlock.name, "semaphore")):
    resource_tracker.unregister(name, kind)
print(segment.name, lock._semlock.name.strip("/"), flush=True)
time.sleep(60)
"""


def start(mark: str) -> tuple[subprocess.Popen[str], list[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, processes.MARK_VARIABLE: mark},
    )
    segment, semaphore = child.stdout.readline().split()
    return child, [segment, f"sem.{semaphore}"]


def test_what_a_killed_process_leaves_in_shared_memory_is_removed_semaphores_too():
    child, names = start("m/a")
    inodes = processes.segments_of([psutil.Process(child.pid)])
    assert processes.remove_segments(inodes) == [], "while somebody maps them they stay"
    child.kill()
    child.wait()
    child.stdout.close()
    assert all((Path("/dev/shm") / name).exists() for name in names)
    assert sorted(processes.remove_segments(inodes)) == sorted(names)


def test_a_sweep_ends_what_carries_the_mark_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp")
    ours, our_names = start("mark1/n1")
    other, other_names = start("mark10/n1")
    scratch = Path(f"/tmp/fl-{os.getuid()}-test{os.getpid()}")
    scratch.mkdir()
    (scratch / processes.SCRATCH_MARK).write_text("mark1/n1")
    try:
        assert sweep("mark1") >= 1
        ours.wait(5)
        assert other.poll() is None
        assert not scratch.exists()
        assert not any((Path("/dev/shm") / name).exists() for name in our_names)
        assert all((Path("/dev/shm") / name).exists() for name in other_names)
    finally:
        assert sweep("mark10") >= 1  # its resource tracker may still be there
        other.wait(5)
        for child in (ours, other):
            child.stdout.close()


def test_own_segments_that_are_not_recorded_are_left_alone():
    segment = shared_memory.SharedMemory(create=True, size=64)
    try:
        assert processes.remove_segments({1, 2, 3}) == []
        assert (Path("/dev/shm") / segment.name).exists()
    finally:
        segment.close()
        segment.unlink()


def test_the_timer_of_a_fence_leaves_the_next_generation_alone(tmp_path):
    """A replica that is back before the timer rings must not be killed by it."""
    around = Surroundings("n1", tmp_path, tmp_path, tmp_path, tmp_path, "test-fence/n1", {}, {})
    reaper = processes.Reaper()
    engine = Engine(lone_member(), around, reaper)
    before = set(threading.enumerate())
    engine.fence()
    (timer,) = set(threading.enumerate()) - before
    timer.cancel()
    engine.gone = True
    child = reaper.converse(["cat"], {**os.environ})
    timer.function()
    assert child.communicate(b"alive")[0] == b"alive"
