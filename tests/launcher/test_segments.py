"""What a killed engine leaves in shared memory is removed, by whoever is left to do it."""

import json
import os
import shlex
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from launcher.agent import processes, segments
from launcher.agent.engine import YOUNG_SCAN_S, Engine
from launcher.agent.segments import Segments
from launcher.agent.sweep import sweep
from launcher.documents import Command
from launcher.paths import NodePaths
from tests.launcher.fleets import eventually, lone_engine

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


FOR_EVER = """
import os, time
from multiprocessing import resource_tracker, shared_memory
made = []
for number in range(3000):
    name = f"psm_test{os.getpid()}-{number}"
    made.append(shared_memory.SharedMemory(name, create=True, size=4096))
    resource_tracker.unregister(made[-1]._name, "shared_memory")
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


@pytest.fixture
def node(tmp_path, engine):
    """The folder of a node whose agent has looked at the engine."""
    made = NodePaths(tmp_path)
    Segments(made.segments).look([psutil.Process(engine.pid)])
    return made


def test_what_an_agent_noted_is_swept_when_it_was_killed_and_nobody_maps_it(node, engine):
    sweep("another mark", [node])
    assert there(engine.names) == engine.names, "somebody maps them"
    end(engine)
    sweep("another mark")
    assert there(engine.names) == engine.names, "nobody noted them"
    sweep("another mark", [node])
    assert there(engine.names) == []


@pytest.mark.parametrize("change", ["boot", "file", "name", "nonsense"])
def test_a_note_that_does_not_mean_what_is_there_removes_nothing(node, engine, change):
    end(engine)
    note = json.loads(node.segments.read_text())
    inodes = note["inodes"]
    if change == "boot":
        note["boot_id"] = "another"
    elif change == "file":
        note["inodes"] = {name: inode + 1 for name, inode in inodes.items()}
    elif change == "name":
        note["inodes"] = {f"../shm/{name}": inode for name, inode in inodes.items()}
    node.segments.write_text("{" if change == "nonsense" else json.dumps(note))
    sweep("another mark", [node])
    assert there(engine.names) == engine.names


def test_what_belongs_to_another_user_is_left_alone(node, engine, monkeypatch):
    end(engine)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert segments.remove(segments.noted(node.segments)) == []
    assert there(engine.names) == engine.names


def test_a_note_is_written_when_there_is_more_to_tell_and_when_there_is_room_again(
    tmp_path, engine
):
    node = NodePaths(tmp_path / "n1")
    seen, process = Segments(node.segments), psutil.Process(engine.pid)
    seen.look([process])
    assert not node.segments.exists(), "there is no folder to write to"
    node.root.mkdir()
    seen.look([process])
    written = node.segments.stat()
    assert segments.noted(node.segments) == segments.mapped_by([process])
    seen.look([process])
    assert node.segments.stat() == written
    end(engine)
    seen.remove()
    assert there(engine.names) == []
    assert not node.segments.exists()


def young_engine(folder: Path, program: str) -> Engine:
    words = shlex.join([sys.executable, "-c", program])
    return lone_engine(folder, Command(name="headless", script=f"{words}; sleep 60"), slot=8)


def test_an_engine_that_ends_soon_after_its_start_leaves_no_segment(tmp_path):
    """Whoever mapped it is gone by then, and cannot be asked."""
    lives_s = 2.5 * YOUNG_SCAN_S
    ends = FOR_EVER.replace("range(3000)", "range(3)").replace("sleep(60)", f"sleep({lives_s})")
    engine = young_engine(tmp_path, f"{ends}\nos.kill(os.getppid(), 9)\nos._exit(1)")
    engine.start()
    assert eventually(lambda: engine.poll() or engine.gone, 20)
    assert engine.evidence is not None
    assert list(segments.FOLDER.glob("psm_test*")) == []


def test_an_engine_that_makes_segments_until_it_is_killed_leaves_none(tmp_path):
    engine = young_engine(tmp_path, FOR_EVER)
    engine.start()
    assert eventually(lambda: len(list(segments.FOLDER.glob("psm_test*"))) > 20, 10)
    engine.stop(0.0)
    assert eventually(lambda: engine.poll() or engine.gone, 10)
    assert list(segments.FOLDER.glob("psm_test*")) == []
