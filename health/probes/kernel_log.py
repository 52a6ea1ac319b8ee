"""The kernel's log: what the NVIDIA driver, network cards and disks complained about. I/O.

Where an ordinary user may not read it, that is said: silence would look like health.
"""

import contextlib
import os
import re
import time
from pathlib import Path

from health.evidence import Asked, KernelLine, KernelLog, Xid
from health.probes.gpu import is_ours

LOOKBACK_S = 24 * 3600.0
LINES_MAX = 100
_READ_BYTES = 8192
_RECORD = re.compile(r"\d+,\d+,(\d+),[^;]*;(.*)")
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)(?:, pid=.?(\d+))?")
# Kinds and wording: gpud and NVSentinel (research/health, a3 and a4).
KINDS = {
    "mlx5_dead": re.compile(r"mlx5.*(command resource|miss count|unrecoverable hardware error)"),
    "mlx5_warning": re.compile(r"mlx5.*(insufficient power|High Temperature|ACCESS_REG)"),
    "nvme_dead": re.compile(
        r"nvme.*(Disabling device after reset failure|no available path|Removing after probe)"
    ),
    "nvme_timeout": re.compile(r"nvme.*(timeout|controller is down)"),
    "filesystem": re.compile(r"(Remounting filesystem read-only|Buffer I/O error on dev)"),
    "hung_task": re.compile(r"task .* blocked for more than \d+ seconds"),
    "out_of_memory": re.compile(r"Out of memory: Killed process"),
    "nfs": re.compile(r"nfs: server .* not responding"),
    "pcie": re.compile(r"PCIe Bus Error: severity=Uncorrected"),
}


def read_kernel_log(asked: Asked) -> KernelLog:
    """Everything of the last day that one of our patterns knows. Raises PermissionError."""
    booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    xids, lines = [], []
    for record in _records(Path(asked.kernel_log)):
        found = _RECORD.match(record)
        if not found:
            continue
        at, text = booted_at + int(found.group(1)) / 1e6, found.group(2)
        if time.time() - at > LOOKBACK_S:
            continue
        if xid := _XID.search(text):
            pid = int(xid.group(3)) if xid.group(3) else None
            xids.append(
                Xid(
                    at=at,
                    code=int(xid.group(2)),
                    gpu=xid.group(1),
                    pid=pid,
                    ours=pid is not None and is_ours(pid, asked.mark),
                    text=text[:300],
                )
            )
            continue
        for kind, pattern in KINDS.items():
            if pattern.search(text):
                lines.append(KernelLine(at=at, kind=kind, text=text[:300]))
                break
    return KernelLog(xids=tuple(xids[-LINES_MAX:]), lines=tuple(lines[-LINES_MAX:]))


def _records(path: Path) -> list[str]:
    """All records now in the log: /dev/kmsg gives one for each read and then would block."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    chunks = []
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    chunk = os.read(handle, _READ_BYTES)
                except BrokenPipeError:
                    continue  # a record was overwritten while we read; go on with the next
                if not chunk:
                    break
                chunks.append(chunk)
    finally:
        os.close(handle)
    return b"".join(chunks).decode(errors="replace").splitlines()
