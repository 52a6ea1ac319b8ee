"""Faults of a host that are no fault of its GPUs, each through the real channel, each undone."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import bed, hardware
from tests.cluster.hosts import BED, ROOT


@dataclass(frozen=True)
class HostFault:
    """One fault: how to give it to a host for a while, and the finding that it must cause."""

    words: str
    given: Callable[[str], AbstractContextManager[None]]
    check: str
    device: str = ""
    level: str = "passive"
    message: str = ""


def _on(host: str, *command: str) -> None:
    subprocess.run(bed.on(host, *command), check=True, capture_output=True)


@contextlib.contextmanager
def small_shared_memory(host: str) -> Iterator[None]:
    _on(host, "mount", "-o", "remount,size=64m", "/dev/shm")
    try:
        yield
    finally:
        _on(host, "mount", "-o", "remount,size=2g", "/dev/shm")


@contextlib.contextmanager
def full_nvme(host: str) -> Iterator[None]:
    _on(host, "fallocate", "-l", "1020m", "/nvme0/full")
    try:
        yield
    finally:
        _on(host, "rm", "/nvme0/full")


@contextlib.contextmanager
def hung_mount(host: str) -> Iterator[None]:
    script = Path(__file__).with_name("hungmount.py")
    folder = BED / "hung"
    folder.mkdir(exist_ok=True)
    child = subprocess.Popen(
        bed.on(host, "/usr/bin/python3", str(script), str(folder)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline().strip() == "mounted"
        yield
    finally:
        _on(host, "umount", "-l", str(folder))
        subprocess.run(bed.on(host, "pkill", "-KILL", "-f", script.name), check=False)
        child.wait()
        child.stdout.close()


@contextlib.contextmanager
def clock_ahead(host: str) -> Iterator[None]:
    library = bed.clock_library()
    bed.shift_clock(host, library, 30)
    try:
        yield
    finally:
        bed.shift_clock(host, library, 0)


@contextlib.contextmanager
def hanging_sshd(host: str) -> Iterator[None]:
    bed.stop_sshd(host, hang=True)
    try:
        yield
    finally:
        bed.stop_sshd(host, hang=False)


@contextlib.contextmanager
def other_driver(host: str) -> Iterator[None]:
    root = hardware.tree(host)
    state = hardware.read_state(root)
    hardware.write_state(root, {**state, "driver": "550.54.15"})
    try:
        yield
    finally:
        hardware.write_state(root, state)


@contextlib.contextmanager
def other_nccl(host: str) -> Iterator[None]:
    """Every host has an NCCL in the fake engine's environment; this one has another version."""
    info = ROOT / ".testbed-engine/lib/nvidia_nccl_cu12-2.27.0.dist-info"
    info.mkdir()
    text = "Metadata-Version: 2.1\nName: nvidia-nccl-cu12\nVersion: 2.27.3\n"
    (info / "METADATA").write_text(text)
    other = BED / "other-METADATA"
    other.write_text(text.replace("2.27.3", "2.21.5"))
    _on(host, "mount", "--bind", str(other), str(info / "METADATA"))
    try:
        yield
    finally:
        _on(host, "umount", str(info / "METADATA"))
        (info / "METADATA").unlink()
        info.rmdir()


HOST_FAULTS = {
    "small-shm": HostFault(
        "/dev/shm of 64 MiB", small_shared_memory, "disk.free", "/dev/shm", message="64 MiB free"
    ),
    "full-nvme": HostFault("a full NVMe drive", full_nvme, "disk.free", "/nvme0"),
    "hung-mount": HostFault(
        "a mount whose server is silent",
        hung_mount,
        "mount",
        str(BED / "hung"),
        message="does not answer",
    ),
    "clock": HostFault(
        "a clock 30 s ahead", clock_ahead, "host.clock_offset", message="s ahead of ours"
    ),
    "sshd-hangs": HostFault(
        "sshd takes connections and says nothing",
        hanging_sshd,
        "reach",
        message="could not be looked at",
    ),
    "driver-skew": HostFault(
        "another driver than its peers",
        other_driver,
        "parity.driver",
        message="driver 550.54.15 where the other nodes have 570.172.08",
    ),
    "nccl-skew": HostFault(
        "another NCCL than its peers",
        other_nccl,
        "parity.nccl",
        level="quick",
        message="nccl 2.21.5 where the other nodes have 2.27.3",
    ),
}
