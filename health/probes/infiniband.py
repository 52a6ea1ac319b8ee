"""InfiniBand and RoCE ports from sysfs. I/O, below a root folder so that tests can give their own.

Some counters cannot be read on restricted functions and each try writes to the kernel log: a file
that once refused is not opened again in this process.
"""

import re
import time
from pathlib import Path

from health.evidence import Asked, Gid, Infiniband, Port
from health.probes.files import entries, text

WINDOW_S = 1.0
COUNTERS = (
    "counters/link_downed",
    "counters/link_error_recovery",
    "counters/symbol_error",
    "counters/port_rcv_errors",
    "counters/local_link_integrity_errors",
    "counters/excessive_buffer_overrun_errors",
    "hw_counters/rnr_nak_retry_err",
    "hw_counters/local_ack_timeout_err",
    "hw_counters/roce_slow_restart",
)
GIDS_MAX = 32
_refused: set[Path] = set()


def read_infiniband(asked: Asked) -> Infiniband | None:
    """All ports of this node; None where it has no InfiniBand class at all."""
    root = Path(asked.sysfs)
    folders = [
        folder
        for device in entries(root / "class/infiniband")
        for folder in entries(device / "ports")
        if folder.name.isdecimal()
    ]
    if not folders:
        return None
    before = [_counters(folder) for folder in folders]
    began = time.monotonic()
    ports = [_port(folder) for folder in folders]
    time.sleep(WINDOW_S)
    window_s = time.monotonic() - began
    grown = []
    for port, folder, old in zip(ports, folders, before, strict=True):
        new = _counters(folder)
        growth = {name: new[name] - value for name, value in old.items() if name in new}
        grown.append(port.model_copy(update={"counters": new, "grown": growth}))
    return Infiniband(
        ports=tuple(grown),
        window_s=round(window_s, 3),
        peermem=(root / "module/nvidia_peermem").is_dir(),
        dmabuf=_has_dmabuf(root),
        default_route_netdev=_default_route(),
    )


def _port(folder: Path) -> Port:
    device = folder.parent.parent
    rate = re.match(r"[\d.]+", text(folder / "rate"))
    numa = text(device / "device/numa_node")
    return Port(
        device=device.name,
        port=int(folder.name),
        state=text(folder / "state").partition(": ")[2],
        physical_state=text(folder / "phys_state").partition(": ")[2],
        rate_gbps=float(rate.group()) if rate else None,
        link_layer=text(folder / "link_layer"),
        firmware=text(device / "fw_ver"),
        board=text(device / "board_id"),
        numa_node=int(numa) if re.fullmatch(r"-?\d+", numa) else None,
        netdevs=tuple(entry.name for entry in entries(device / "device/net")),
        gids=_gids(folder),
    )


def _gids(folder: Path) -> tuple[Gid, ...]:
    gids = []
    for index in range(GIDS_MAX):
        gid = text(folder / f"gids/{index}")
        if not gid or not gid.replace(":", "").strip("0"):
            continue
        gids.append(
            Gid(
                index=index,
                type=text(folder / f"gid_attrs/types/{index}"),
                netdev=text(folder / f"gid_attrs/ndevs/{index}"),
                is_ipv4=gid.startswith("0000:0000:0000:0000:0000:ffff:"),
            )
        )
    return tuple(gids)


def _counters(folder: Path) -> dict[str, int]:
    found = {}
    for name in COUNTERS:
        path = folder / name
        if path in _refused:
            continue
        try:
            found[path.name] = int(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            _refused.add(path)
    return found


def _has_dmabuf(root: Path) -> bool | None:
    """The open kernel module with a kernel from 5.12 on exports GPU memory by DMA-BUF."""
    version = text(root / "module/nvidia/version")
    if not version:
        return None
    return "open" in text(Path("/proc/driver/nvidia/version")).lower()


def _default_route() -> str:
    for line in text(Path("/proc/net/route")).splitlines()[1:]:
        words = line.split()
        if len(words) > 2 and words[1] == "00000000":
            return words[0]
    return ""
