"""One question for all jobs, beside the loop: what counts as an answer, and who waits for one."""

import stat
import time

import pytest

from launcher.errors import SlurmError
from launcher.slurm_tools import queue
from launcher.slurm_tools.queue import Queue
from tests.launcher.fleets import eventually

ROW = "{id}|{state}|h[1-2]|2026-11-22T13:00:00|2026-11-22T12:00:00|h1|{name}|None|mark"


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A squeue that says what lies in a file, after a pause, and counts its calls."""
    script = tmp_path / "bin/squeue"
    script.parent.mkdir()
    script.write_text(
        f"#!/bin/bash\necho call >>{tmp_path}/calls\nsleep $(cat {tmp_path}/pause)\n"
        f'[ -e {tmp_path}/away ] && {{ echo "Unable to contact slurm controller" >&2; exit 1; }}\n'
        f"cat {tmp_path}/rows\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    (tmp_path / "pause").write_text("0")
    (tmp_path / "rows").write_text(ROW.format(id=1, state="RUNNING", name="f.r1.a1") + "\n")
    return tmp_path


@pytest.fixture
def asked(squeue):
    made = Queue()
    yield made
    made.close()


def calls(folder) -> int:
    return len((folder / "calls").read_text().splitlines())


def test_many_looks_are_one_question(squeue, asked):
    assert [job.identity for job in asked.look("f.r1.a1")] == ["1"]
    before = calls(squeue)
    for _ in range(200):
        asked.look("f.r1.a1")
    assert calls(squeue) <= before + 1
    assert asked.look("f.r2.a1") == [], "a new name is asked for at once"


def test_after_a_job_was_submitted_an_older_answer_says_nothing(squeue, asked):
    assert asked.look("f.r2.a1") == []
    rows = (squeue / "rows").read_text() + ROW.format(id=2, state="PENDING", name="f.r2.a1")
    (squeue / "rows").write_text(rows)
    asked.outdated()
    assert [job.state for job in asked.look("f.r2.a1")] == ["pending"]


def test_slurm_that_is_away_is_unknown_at_once_and_known_again_soon(squeue, asked):
    asked.look("f.r1.a1")
    (squeue / "away").touch()
    asked.outdated()
    with pytest.raises(SlurmError) as told:
        asked.look("f.r1.a1")
    assert told.value.unreachable
    began = time.monotonic()
    for act in (lambda: asked.look("f.r1.a1"), asked.check_reachable):
        with pytest.raises(SlurmError):
            act()
    assert time.monotonic() - began < 0.5, "nobody waits twice for who is away"
    (squeue / "away").unlink()

    def is_back() -> bool:
        try:
            asked.check_reachable()
        except SlurmError:
            return False
        return True

    assert eventually(is_back, 5.0)
    assert len(asked.look("f.r1.a1")) == 1


def test_a_slow_slurm_delays_nobody_while_its_last_answer_counts(squeue, asked, monkeypatch):
    asked.look("f.r1.a1")
    (squeue / "pause").write_text("4")
    monkeypatch.setattr(queue, "CALM_S", 0.0)
    began = time.monotonic()
    while time.monotonic() - began < 5.0:
        look = time.monotonic()
        assert len(asked.look("f.r1.a1")) == 1
        assert time.monotonic() - look < 0.5
        time.sleep(0.2)
    asked.check_reachable()  # slow is not away
