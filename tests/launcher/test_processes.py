import os
import socket
import threading
import time

from launcher.agent import processes
from launcher.agent.engine import Engine
from launcher.agent.surroundings import Surroundings
from launcher.documents import Command
from tests.launcher.fleets import eventually, lone_engine
from tests.launcher.worlds import lone_member


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


def test_a_command_waits_until_its_leader_has_listened_for_as_long_as_it_says(tmp_path):
    with socket.socket() as leader:
        leader.bind(("127.0.0.1", 0))
        port = leader.getsockname()[1]
        command = Command(name="ray-worker", script="sleep 60", after_port=port, after_s=0.3)
        engine = lone_engine(tmp_path, command, slot=7)
        engine.start()
        assert engine.starts
        leader.listen()
        engine.poll()
        heard_at = time.monotonic()
        assert eventually(lambda: engine.poll() or not engine.starts, 5)
        assert time.monotonic() - heard_at >= 0.29
        assert list(engine.pids) == ["ray-worker"]
        engine.stop(0.0)
        assert eventually(lambda: engine.poll() or engine.gone, 10)


def test_a_folder_that_cannot_be_made_ends_the_start_and_not_the_agent(tmp_path):
    engine = lone_engine(tmp_path, slot=7)
    engine.scratch.write_text("a file of somebody else's")
    try:
        engine.start()
        assert "cannot prepare its folder" in engine.evidence.message
        assert eventually(lambda: engine.poll() or engine.gone, 10)
    finally:
        engine.scratch.unlink(missing_ok=True)
