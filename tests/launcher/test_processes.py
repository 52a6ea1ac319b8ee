import os
import threading

from launcher.agent import processes
from launcher.agent.engine import Engine
from launcher.agent.surroundings import Surroundings
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
