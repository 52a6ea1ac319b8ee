"""What a node has of the weights: real files, the real page cache, a file system that hangs."""

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from launcher.agent import processes, weighing, weights
from launcher.agent.processes import Reaper
from launcher.agent.weights import WeightsWatch
from launcher.cli.screens import fleet_screen
from launcher.context import model_place
from launcher.documents import ModelPlace, Weights
from launcher.spec import FleetSpec
from launcher.status import NodeStatus, ReplicaStatus, SpareStatus
from tests.launcher import worlds
from tests.launcher.fleets import eventually

MIB = 1024**2
SYSTEM_PYTHON = "/usr/bin/python3"
in_memory = weighing.file_system_of(tempfile.gettempdir()) in ("tmpfs", "ramfs")
on_disk = pytest.mark.skipif(in_memory, reason="files here are nowhere but in memory")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def write(path: Path, size: int = 4 * MIB) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
    return path


def forget(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def read(path: Path, size: int) -> None:
    """The first bytes and, as the kernel is told, no more."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    assert len(os.read(handle, size)) == size
    os.close(handle)


def seen(folder: Path, **question) -> dict:
    """The last word of the program, as an agent runs it."""
    asked = json.dumps({"model": str(folder), **question})
    words = [sys.executable, "-I", "-S", weighing.__file__]
    result = subprocess.run(words, input=asked, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@on_disk
def test_weights_that_were_forgotten_are_not_cached_and_those_that_were_read_are(tmp_path):
    files = [write(tmp_path / f"model-0000{n}-of-00002.safetensors") for n in (1, 2)]
    for file in files:
        forget(file)
    cold = seen(tmp_path)
    assert (cold["total_bytes"], cold["page_cache_bytes"]) == (8 * MIB, 0)
    assert cold["disk_bytes"] == 8 * MIB
    assert cold["file_system"]
    assert not cold["missing"]
    for file in files:
        file.read_bytes()
    assert seen(tmp_path)["page_cache_bytes"] == 8 * MIB


@on_disk
def test_to_look_reads_nothing(tmp_path):
    file = write(tmp_path / "model.safetensors")
    forget(file)
    assert seen(tmp_path)["page_cache_bytes"] == 0
    assert seen(tmp_path)["page_cache_bytes"] == 0


@on_disk
def test_the_old_way_and_the_new_one_count_the_same_pages(tmp_path):
    file = write(tmp_path / "model.safetensors", 4 * MIB + 5)
    forget(file)
    read(file, MIB)
    handle = os.open(file, os.O_RDONLY)
    pages = weighing._by_mincore(handle, file.stat().st_size)
    newer = weighing._by_cachestat(handle)
    os.close(handle)
    assert MIB // mmap.PAGESIZE <= pages < 4 * MIB // mmap.PAGESIZE
    assert newer in (None, pages)


def test_the_last_page_counts_no_further_than_the_file(tmp_path):
    write(tmp_path / "model.safetensors", MIB + 5).read_bytes()
    assert seen(tmp_path)["page_cache_bytes"] == MIB + 5


@on_disk
@as_root
def test_who_is_not_told_the_truth_says_that_it_is_not_known():
    """mincore tells strangers that every page is there (since Linux 5.2)."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o755)
        program = shutil.copy(weighing.__file__, folder / "weighing.py")
        forget(write(folder / "model.safetensors"))
        result = subprocess.run(
            [SYSTEM_PYTHON, "-I", "-S", program],
            input=json.dumps({"model": str(folder)}),
            capture_output=True,
            text=True,
            user=65534,
            group=65534,
            extra_groups=[],
        )
    finally:
        shutil.rmtree(folder)
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["total_bytes"] == 4 * MIB
    # A kernel of 2023 and 2024 tells the truth to strangers as well, by cachestat.
    assert answer.get("page_cache_bytes") in (None, 0)
    if "page_cache_bytes" not in answer:
        assert "owns" in answer["reason"]


@on_disk
@as_root
def test_what_lies_below_an_overlay_is_counted(tmp_path):
    """cachestat says of a file of an overlay that nothing of it is cached."""
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    write(lower / "model.safetensors").read_bytes()
    for folder in (upper, tmp_path / "work", tmp_path / "all"):
        folder.mkdir()
    mount = (
        f"mount -t overlay overlay -o lowerdir={lower},upperdir={upper},workdir={tmp_path}/work "
        f"{tmp_path}/all && exec {sys.executable} -I -S {weighing.__file__}"
    )
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount],
        input=json.dumps({"model": str(tmp_path / "all")}),
        capture_output=True,
        text=True,
    )
    if result.stderr.startswith(("mount:", "unshare:")):
        pytest.skip(f"no overlay can be mounted here: {result.stderr}")
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["file_system"] == "overlay"
    assert answer["page_cache_bytes"] == 4 * MIB


def test_a_file_of_holes_is_on_no_disk_and_costs_no_time(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(64 * 1024**3)
    began = time.monotonic()
    answer = seen(tmp_path)
    assert answer["total_bytes"] == 64 * 1024**3
    assert answer["disk_bytes"] == 0
    assert answer["page_cache_bytes"] == 0
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "name",
    [b"two words.safetensors", b"two\nlines.safetensors", b"\xff\xfe.safetensors"],
)
def test_a_name_may_hold_anything(tmp_path, name):
    write(tmp_path / os.fsdecode(name), 1000)
    (tmp_path / os.fsdecode(b"lost\n\xff.safetensors")).symlink_to("nowhere")
    answer = seen(tmp_path)
    assert answer["total_bytes"] == 1000
    assert answer["missing"].endswith("lost??.safetensors: No such file or directory")


def test_what_is_not_there_is_said(tmp_path):
    assert seen(tmp_path / "none")["reason"] == f"{tmp_path}/none: No such file or directory"
    assert seen(tmp_path)["reason"] == f"no weights in {tmp_path}"
    write(tmp_path / "model-00001-of-00003.safetensors", 10)
    assert seen(tmp_path)["missing"] == "2 of 3 files are missing"


def test_a_pipe_in_the_place_of_a_file_is_no_file_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert seen(tmp_path)["reason"] == f"no weights in {tmp_path}"


def test_one_file_with_two_names_counts_once(tmp_path):
    first = write(tmp_path / "a.safetensors", 1000)
    (tmp_path / "b.safetensors").symlink_to(first)
    assert seen(tmp_path)["total_bytes"] == 1000


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["a.safetensors", "pytorch_model.bin", "config.json"], ["a.safetensors"]),
        (["consolidated.safetensors", "model.safetensors"], ["consolidated.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["q4.gguf", "README.md"], ["q4.gguf"]),
        (["config.json"], []),
    ],
)
def test_of_several_kinds_only_what_an_engine_would_read_counts(names, taken):
    assert weighing.weight_names(names) == (taken, "")


def test_a_folder_with_too_many_files_is_looked_at_in_part():
    names = [f"{n}.safetensors" for n in range(weighing.FILES_MAX + 1)]
    taken, missing = weighing.weight_names(names)
    assert len(taken) == weighing.FILES_MAX
    assert "only the first" in missing


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", ""])
def test_a_hub_id_is_found_where_the_hub_keeps_it(tmp_path, monkeypatch, variable):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    hub = tmp_path / ".cache/huggingface/hub"
    if variable == "HF_HOME":
        hub = tmp_path / "here/hub"
        monkeypatch.setenv(variable, "~/here")
    elif variable:
        hub = tmp_path / "here"
        monkeypatch.setenv(variable, "$HOME/here")
    repository = hub / "models--org--model"
    for commit, size in (("abc", 1000), ("def", 3000)):
        write(repository / f"blobs/{commit}", size)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{commit}")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    assert list(weighing.weigh("org/model"))[-1]["total_bytes"] == 1000
    assert list(weighing.weigh("org/model", "def"))[-1]["total_bytes"] == 3000
    assert list(weighing.weigh("org/model", "", str(hub)))[-1]["total_bytes"] == 1000
    with pytest.raises(weighing.UnknownError, match=f"no snapshot of revision x in {repository}"):
        list(weighing.weigh("org/model", "x"))


def test_the_newest_mount_above_a_file_is_its_file_system(tmp_path):
    mounts = tmp_path / "mountinfo"
    rows = [
        "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
        "23 22 0:40 / /mnt rw shared:1 master:2 - autofs none rw",
        "24 23 0:41 / /mnt rw - nfs4 server:/ rw",
        "25 24 0:42 / /mnt/two\\040words rw - lustre l rw",
    ]
    mounts.write_text("\n".join(rows) + "\n")
    found = {
        path: weighing.file_system_of(path, mounts)
        for path in ("/etc/x", "/mnt/x", "/mnt/two words/x", "/mnt/two wordsx/x")
    }
    assert list(found.values()) == ["ext4", "nfs4", "lustre", "nfs4"]
    assert weighing.file_system_of("/mnt", tmp_path / "none") == ""


class Node:
    """A watch as an agent holds it, and what it has started."""

    def __init__(self, place: ModelPlace, **environment: str) -> None:
        self.mark = f"weights-{os.getpid()}"
        self.reaper = Reaper()
        self.watch = WeightsWatch(self.reaper, place, {**os.environ, **environment}, self.mark)

    def look(self, stage: weights.Stage, now: float = 0.0) -> Weights:
        self.watch.turn(now, stage)
        assert eventually(lambda: not self.watch.is_looking)
        assert self.watch.found is not None
        return self.watch.found

    def left(self) -> list[psutil.Process]:
        return processes.marked(self.mark, below=True)


def test_it_looks_at_first_then_after_minutes_and_when_an_engine_begins_to_serve(tmp_path):
    node = Node(ModelPlace(model=str(tmp_path)))
    write(tmp_path / "1.safetensors", 1000)
    first = node.look("idle", 0.0)
    assert first.total_bytes == 1000
    assert first.over_network is False
    write(tmp_path / "2.safetensors", 1000)
    assert node.look("idle", weights.EVERY_S - 1) == first
    assert node.look("idle", 2 * weights.EVERY_S).total_bytes == 2000
    write(tmp_path / "3.safetensors", 1000)
    assert node.look("starting", 9999.0).total_bytes == 2000
    assert node.look("serving", 9999.0).total_bytes == 3000
    assert not node.left()


@on_disk
def test_what_an_engine_reads_is_not_known_until_the_next_look(tmp_path):
    node = Node(ModelPlace(model=str(tmp_path)))
    file = write(tmp_path / "model.safetensors")
    forget(file)
    assert node.look("idle").page_cache_bytes == 0
    starting = node.look("starting", 1.0)
    assert starting.page_cache_bytes is None
    assert starting.total_bytes == 4 * MIB
    file.read_bytes()
    assert node.look("serving", 2.0).is_all_cached


@pytest.fixture
def hanging(tmp_path) -> tuple[Node, Path]:
    """A hub's cache whose revision is a pipe: whoever reads it waits until somebody writes."""
    refs = tmp_path / "models--org--model/refs"
    refs.mkdir(parents=True)
    os.mkfifo(refs / "main")
    forget(write(refs.parent / "snapshots/abc/model.safetensors"))
    return Node(ModelPlace(model="org/model"), HF_HUB_CACHE=str(tmp_path)), refs / "main"


def test_a_file_system_that_hangs_costs_a_look_and_nothing_else(hanging, monkeypatch):
    monkeypatch.setattr(weights, "WITHIN_S", 0.5)
    node, _ = hanging
    began = time.monotonic()
    node.watch.turn(0.0, "idle")
    assert time.monotonic() - began < 0.4
    found = node.look("idle")
    assert found.reason == "no answer within 0.5 s"
    assert found.total_bytes is None
    assert eventually(lambda: not node.left())


def test_the_end_of_an_engine_does_not_end_a_look(hanging):
    node, pipe = hanging
    node.watch.turn(0.0, "idle")
    assert eventually(lambda: bool(node.reaper.reserved))
    assert node.left()
    assert not {one.pid for one in node.left()} & {one.pid for one in node.reaper.descendants()}
    pipe.write_text("abc")
    assert node.look("idle").total_bytes == 4 * MIB
    assert not node.reaper.reserved


@on_disk
def test_a_look_that_an_engine_overtakes_does_not_say_what_is_cached(hanging):
    node, pipe = hanging
    node.watch.turn(0.0, "idle")
    node.watch.turn(1.0, "starting")
    pipe.write_text("abc")
    found = node.look("starting", 2.0)
    assert found.total_bytes == 4 * MIB
    assert found.page_cache_bytes is None


def test_a_cache_inside_a_container_is_not_looked_for():
    found = Node(ModelPlace(model="org/model", in_container=True)).look("idle")
    assert found.total_bytes is None
    assert "container" in found.reason


def test_the_spec_says_where_the_engine_keeps_its_weights():
    spec = FleetSpec.model_validate(
        {
            "name": "chat",
            "model": "org/model",
            "revision": "v2",
            "env": {"HF_HOME": "/shared/hf", "OTHER": "x"},
            "engine": {"args": {"download_dir": "/nvme/hf"}},
            "runtime": {"pyxis": {"image": "vllm"}},
        }
    )
    assert model_place(spec) == ModelPlace(
        model="org/model",
        revision="v2",
        download_folder="/nvme/hf",
        environment={"HF_HOME": "/shared/hf"},
        in_container=True,
    )


GIB = 1024**3


def kept(cached: int | None, **more) -> Weights:
    values = {"total_bytes": 10 * GIB, "disk_bytes": 10 * GIB, "file_system": "ext4"}
    return Weights(at=0.0, page_cache_bytes=cached, over_network=False, **{**values, **more})


def screen(by_node: dict[str, Weights | None], phase="serving", spare: Weights | None = None):
    nodes = [
        NodeStatus(node=name, rank=0, phase="serving", weights=found)
        for name, found in by_node.items()
    ]
    replica = ReplicaStatus(name="r1", generation=1, phase="serving", endpoint=None, nodes=nodes)
    spares = [SpareStatus(name="s1", node="n9", phase="warm", weights=spare)]
    status = worlds.make_status(replica, phase=phase, spares=spares)
    return [row for row in fleet_screen(status, 0.0).splitlines() if row.startswith("weights")]


def test_nodes_that_have_the_same_share_a_line():
    all_of_it = kept(10 * GIB)
    assert screen({"n1": all_of_it, "n2": all_of_it}, spare=all_of_it) == [
        "weights of n[1-2,9]: 10.0 GiB on disk (ext4), all of it in page cache"
    ]
    assert screen({"n1": kept(2 * GIB), "n2": kept(3 * GIB)}, spare=kept(0)) == [
        "weights of n9: 10.0 GiB on disk (ext4), none of it in page cache",
        "weights of n[1-2]: 10.0 GiB on disk (ext4), 2.0 GiB to 3.0 GiB of it in page cache",
    ]


def test_what_is_not_known_is_not_said_and_what_is_missing_is():
    remote = kept(None, file_system="nfs4", reason="the kernel does not tell")
    assert screen({"n1": remote.model_copy(update={"over_network": True})}) == [
        "weights of n1: 10.0 GiB over the network (nfs4)"
    ]
    assert screen({"n1": kept(None, disk_bytes=GIB, missing="2 of 3 files are missing")}) == [
        "weights of n1: 1.0 GiB of 10.0 GiB on disk (ext4) (2 of 3 files are missing)"
    ]
    nothing = kept(None, total_bytes=None, disk_bytes=None, reason="no weights in /m")
    assert screen({"n1": nothing}) == ["weights of n1: not known: no weights in /m"]


def test_nothing_is_said_before_the_first_look_and_after_the_end():
    assert screen({"n1": None}) == []
    assert screen({"n1": kept(0)}, phase="stopped") == []
