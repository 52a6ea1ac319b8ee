"""Folders of compile caches that nobody uses any more, and those that stay."""

import os
import time
from pathlib import Path

import pytest

from launcher.agent import caches, upkeep

DAY = 24 * 3600.0


class Shelf:
    """A cache folder with the folders of several engines, used some days ago."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cache"
        self.now = time.time()

    def add(self, name: str, days: float, *, stamped=True) -> Path:
        made = self.root / caches.ENGINES / name
        (made / "vllm").mkdir(parents=True)
        (made / "vllm/graph").write_text("x")
        if stamped:
            (made / caches.STAMP).write_text("x")
            at = self.now - days * DAY
            os.utime(made / caches.STAMP, (at, at))
        return made

    def clear(self, days=0.0) -> list[Path]:
        return upkeep.remove_old(self.root, self.now + days * DAY)


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)


def test_what_nobody_used_for_a_month_goes_and_nothing_else(shelf, tmp_path):
    old = shelf.add("vllm-1/h100/a", 31)
    kept = [shelf.add("vllm-1/a100/a", 29), shelf.add("vllm-2/h100/a", 0)]
    kept.append(shelf.add("vllm-2/h100/notes", 400, stamped=False))
    kept.append(shelf.add("vllm-2/h100/b/deeper", 400))
    outside = shelf.root / "other"
    outside.mkdir()
    assert shelf.clear() == [old]
    assert not old.parent.exists(), "an empty folder goes with it"
    assert all((folder / "vllm/graph").exists() for folder in kept)
    assert outside.exists()


def test_no_link_is_followed(shelf, tmp_path):
    away = Shelf(tmp_path / "away")
    elsewhere = away.add("vllm-1/h100/a", 400)
    inside = shelf.add("vllm-1/h100/b", 400)
    (inside / "link").symlink_to(elsewhere / "vllm")
    (inside.parent / "c").symlink_to(elsewhere)
    (shelf.root / caches.ENGINES / "vllm-2").symlink_to(elsewhere.parent.parent)
    stamp = shelf.add("vllm-1/h100/d", 0, stamped=False) / caches.STAMP
    stamp.symlink_to(elsewhere / caches.STAMP)
    os.utime(stamp, (0, 0), follow_symlinks=False)
    assert shelf.clear() == [inside]
    assert (elsewhere / "vllm/graph").exists()
    assert stamp.parent.exists()
    whole = Shelf(tmp_path / "whole")
    whole.root.mkdir(parents=True)
    (whole.root / caches.ENGINES).symlink_to(away.root / caches.ENGINES)
    assert whole.clear() == []
    assert elsewhere.exists()


def test_it_is_looked_for_once_a_day_and_a_removal_that_was_cut_short_is_finished(shelf):
    shelf.add("vllm-1/h100/a", 31)
    assert len(shelf.clear()) == 1
    late = shelf.add("vllm-1/h100/b", 31)
    cut_short = shelf.add("vllm-1/h100/.gone-1", 0, stamped=False)
    assert shelf.clear(days=0.9) == []
    assert shelf.clear(days=1.1) == [late]
    assert not cut_short.exists()


def test_a_folder_that_an_engine_takes_while_it_is_removed_comes_back(shelf):
    taken = shelf.add("vllm-1/h100/a", 0)
    assert not upkeep._remove(taken, shelf.now - 30 * DAY)
    assert (taken / "vllm/graph").exists()
    assert [file.name for file in taken.parent.iterdir()] == ["a"]


def test_the_folder_of_an_engine_that_runs_for_months_stays(shelf, tmp_path):
    used = shelf.add("vllm-1/h100/a", 100)
    (tmp_path / caches.NOTE).write_text(str(used))
    keeper = upkeep.Upkeep(shelf.root, lambda: [tmp_path, tmp_path / "none"])
    keeper.stop()
    keeper._run()
    assert (used / "vllm/graph").exists()
    assert used.stat().st_mtime >= shelf.now - DAY
