"""Simulated hardware of a host: eight GPUs for NVML, InfiniBand and NVMe in sysfs, a kernel log.

Each host sees its own tree, mounted privately by init.sh where the real things would be. A tree
without a state file is a machine without GPUs; that is how hosts boot.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.hosts import BED, ROOT

GPUS = 8
LINKS = 18
SOURCE = ROOT / "tests/nvml/stand_in.c"
LIBRARY = "libnvidia-ml.so.1"
MIB = 1024**2
# What differs between the kinds that a host can play.
PROFILES = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "memory": 81559, "links": 18, "watts": 700},
    "a100": {"name": "NVIDIA A100-SXM4-80GB", "memory": 81920, "links": 12, "watts": 400},
    "b200": {"name": "NVIDIA B200", "memory": 183359, "links": 18, "watts": 1000},
}
RAILS = 4


def tree(host: str) -> Path:
    return BED / "sim" / host


def build_library(folder: Path) -> Path:
    """The stand-in for NVML, compiled when its source is newer."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        scratch = folder / "scratch.so"
        subprocess.run(
            ["gcc", "-O1", "-shared", "-fPIC", "-o", str(scratch), str(SOURCE)], check=True
        )
        scratch.replace(library)
    return library


def prepare(hosts: list[str]) -> None:
    """Empty trees for these hosts, the library, and a loader cache that knows it."""
    (BED / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    library = build_library(BED / "nvml")
    conf = BED / "ld.so.conf"
    conf.write_text(f"include /etc/ld.so.conf\n{library.parent}\n")
    subprocess.run(
        ["/sbin/ldconfig", "-C", str(BED / "ld.so.cache"), "-f", str(conf)],
        check=True,
        capture_output=True,
    )
    for name in ("infiniband", "nvme"):
        (BED / "sim/class" / name).mkdir(parents=True, exist_ok=True)
    for host in hosts:
        for name in ("nvml", "pci", "infiniband", "nvme", "module/nvidia_peermem"):
            (tree(host) / name).mkdir(parents=True, exist_ok=True)
        (tree(host) / "kmsg").touch()
        (tree(host) / "preload").touch()


def clear(host: str) -> None:
    """A machine without GPUs and InfiniBand, with an empty kernel log."""
    clear_tree(tree(host))


def clear_tree(root: Path) -> None:
    stop_ticking(root)
    for name in ("nvml", "pci", "infiniband", "nvme"):
        for entry in (root / name).iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (root / "kmsg").write_text("")


def play(host: str, profile: str = "h100") -> None:
    """Make this host a healthy node of that kind."""
    play_tree(tree(host), profile, host)


def play_tree(root: Path, profile: str, host: str) -> None:
    clear_tree(root)
    write_state(root, healthy(profile, host))
    for index in range(GPUS):
        device = root / f"pci/0000:{index + 1:02x}:00.0"
        device.mkdir()
        (device / "vendor").write_text("0x10de\n")
        (device / "class").write_text("0x030200\n")
    for rail in range(RAILS):
        make_port(root, f"mlx5_{rail}")
    drive = root / "nvme/nvme0"
    drive.mkdir()
    (drive / "state").write_text("live\n")
    (drive / "model").write_text("SIMULATED 3.8TB\n")


def healthy(profile: str, host: str = "h1") -> dict[str, str]:
    """The state of eight healthy GPUs, as the stand-in reads it."""
    kind = PROFILES[profile]
    state = {"gpus": str(GPUS), "driver": "570.172.08", "cuda": "12080"}
    for index in range(GPUS):
        values: dict[str, object] = {
            "uuid": f"GPU-{host}-{index}",
            "name": kind["name"],
            "serial": f"16500{index}",
            "vbios": "96.00.89.00.01",
            "bus_id": f"00000000:{index + 1:02X}:00.0",
            "ecc": 1,
            "ecc_pending": 1,
            "ecc_corrected_volatile": 0,
            "ecc_uncorrected_volatile": 0,
            "ecc_uncorrected_aggregate": 0,
            "sram_exceeded": 0,
            "remap_corrected": 0,
            "remap_uncorrected": 0,
            "remap_pending": 0,
            "remap_failed": 0,
            "repair_pending": 0,
            "fabric_state": 3,
            "fabric_health": 1,
            "clock_events": 1,
            "thermal_margin": 40,
            "temperature": 34,
            "power_limit_mw": kind["watts"] * 1000,
            "power_limit_default_mw": kind["watts"] * 1000,
            "pcie_width": 16,
            "pcie_width_max": 16,
            "pcie_generation_max": 5,
            "pcie_replay": 0,
            "mig": 0,
            "mig_pending": 0,
            "compute_mode": 0,
            "persistence": 1,
            "memory_total": kind["memory"] * MIB,
            "memory_used": 520 * MIB,
            "field.230": 0,
            "field.194": -2,
        }
        values |= {f"nvlink.{link}": 1 for link in range(int(str(kind["links"])))}
        state |= {f"gpu.{index}.{name}": str(value) for name, value in values.items()}
    return state


def read_state(root: Path) -> dict[str, str]:
    rows = (root / "nvml/state").read_text().splitlines()
    return dict(row.split(" ", 1) for row in rows)


def write_state(root: Path, state: dict[str, str]) -> None:
    scratch = root / "nvml/.state"
    scratch.write_text("".join(f"{key} {value}\n" for key, value in state.items()))
    scratch.replace(root / "nvml/state")


def make_port(root: Path, device: str, *, layer: str = "InfiniBand") -> Path:
    """An active 400 Gb/s port with all its files."""
    port = root / "infiniband" / device / "ports/1"
    for folder in ("counters", "hw_counters", "gids", "gid_attrs/types", "gid_attrs/ndevs"):
        (port / folder).mkdir(parents=True)
    (root / "infiniband" / device / "device/net" / f"net_{device}").mkdir(parents=True)
    files = {
        "state": "4: ACTIVE",
        "phys_state": "5: LinkUp",
        "rate": "400 Gb/sec (4X NDR)",
        "link_layer": layer,
        "../../fw_ver": "28.43.1014",
        "../../board_id": "MT_0000000838",
        "../../device/numa_node": "0",
        "gids/0": "fe80:0000:0000:0000:a288:c203:00ab:c0de",
        "gid_attrs/types/0": "IB/RoCE v1",
        "gid_attrs/ndevs/0": f"net_{device}",
        "gids/3": "0000:0000:0000:0000:0000:ffff:0a4d:000b",
        "gid_attrs/types/3": "RoCE v2",
        "gid_attrs/ndevs/3": f"net_{device}",
        "counters/link_downed": "0",
        "counters/link_error_recovery": "0",
        "counters/symbol_error": "12",
        "counters/port_rcv_errors": "0",
        "counters/local_link_integrity_errors": "0",
        "counters/excessive_buffer_overrun_errors": "0",
        "hw_counters/rnr_nak_retry_err": "0",
    }
    for name, text in files.items():
        (port / name).write_text(text + "\n")
    return port


def say_to_kernel(root: Path, text: str) -> None:
    """A line in this host's kernel log, now."""
    micros = int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1e6)
    with (root / "kmsg").open("a") as log:
        log.write(f"3,{micros % 100000},{micros},-;{text}\n")


def send_xid(root: Path, index: int, code: int) -> None:
    """An XID both ways: an NVML event and the driver's line in the kernel log."""
    with (root / "nvml/events").open("a") as events:
        events.write(f"{index} {code}\n")
    say_to_kernel(root, f"NVRM: Xid (PCI:0000:{index + 1:02x}:00): {code}, pid='<unknown>'")


def start_ticking(root: Path, kind: str, index: int, file: str, step: int) -> None:
    """Let a counter grow in the background (tests/cluster/ticking.py), until `stop_ticking`."""
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.cluster.ticking"),
            *(str(root), kind, str(index), file, str(step)),
        ],
        start_new_session=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with (root / "ticking").open("a") as pids:
        pids.write(f"{child.pid}\n")


def stop_ticking(root: Path) -> None:
    file = root / "ticking"
    if not file.exists():
        return
    for pid in file.read_text().split():
        try:
            if b"tests.cluster.ticking" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            continue
    file.unlink()


def library_path() -> str:
    """For processes outside the hosts (unit tests): where the stand-in lies."""
    return os.fspath(build_library(ROOT / ".testbed-nvml").parent)
