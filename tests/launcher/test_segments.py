"""What a killed engine leaves in shared memory is removed, by whoever is left to do it."""

import os
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from launcher.agent import processes, segments
from launcher.agent.sweep import sweep

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


def there(names: list[str]) -> list[str]:
    return [name for name in names if (segments.FOLDER / name).exists()]


@pytest.fixture
def engine():
    """A process with a segment and a semaphore; whatever is left of them goes in the end."""
    child, names = start("m/a")
    child.names = names
    yield child
    end(child)
    for name in there(names):
        (segments.FOLDER / name).unlink()


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    child.stdout.close()


def test_what_a_killed_process_leaves_in_shared_memory_is_removed_semaphores_too(engine):
    inodes = segments.mapped_by([psutil.Process(engine.pid)])
    assert segments.remove(inodes) == [], "while somebody maps them they stay"
    end(engine)
    assert there(engine.names) == engine.names
    assert sorted(segments.remove(inodes)) == sorted(engine.names)


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
        assert there(our_names) == []
        assert there(other_names) == other_names
    finally:
        assert sweep("mark10") >= 1  # its resource tracker may still be there
        other.wait(5)
        for child in (ours, other):
            child.stdout.close()


def test_own_segments_that_are_not_recorded_are_left_alone():
    segment = shared_memory.SharedMemory(create=True, size=64)
    try:
        assert segments.remove({1, 2, 3}) == []
        assert there([segment.name])
    finally:
        segment.close()
        segment.unlink()
