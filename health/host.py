"""Probes of the host itself: disk, shared memory, ports. Each returns a Finding, never raises."""

import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from health.report import Finding

GIB = 1024**3
# Logs, sockets and compile caches of one engine; weights are counted by staging.
SCRATCH_NEED_BYTES = 256 * 1024**2
# vLLM's shared-memory broadcast takes 160 to 240 MiB for each engine process (measured on 0.32).
SHM_NEED_BYTES = 512 * 1024**2


def check_disk(folder: Path, need_bytes: int = SCRATCH_NEED_BYTES) -> Finding:
    """Free space where the run writes its logs, and whether it can be written to at all."""
    try:
        free = shutil.disk_usage(folder).free
        inodes = os.statvfs(folder)
    except OSError as error:
        return Finding(check="disk", verdict="unknown", message=f"{folder}: {error.strerror}")
    if free < need_bytes:
        return Finding(
            check="disk",
            verdict="unhealthy",
            message=f"{folder} has {free // 1024**2} MiB free, {need_bytes // 1024**2} are needed",
            hint="Free some space there, or set LAUNCHER_STATE_DIR to another disk.",
        )
    if inodes.f_files and inodes.f_favail == 0:
        return Finding(
            check="disk", verdict="unhealthy", message=f"{folder} has no free inodes left"
        )
    return Finding(check="disk", verdict="healthy", message=f"{folder}: {free / GIB:.1f} GiB free")


def check_shared_memory(need_bytes: int, *, only_warn: bool) -> Finding:
    """/dev/shm carries vLLM's messages between processes; containers often give it 64 MiB."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return Finding(check="shm", verdict="unknown", message=f"/dev/shm: {error.strerror}")
    if free >= need_bytes:
        return Finding(check="shm", verdict="healthy", message=f"{free / GIB:.1f} GiB free")
    return Finding(
        check="shm",
        verdict="degraded" if only_warn else "unhealthy",
        message=f"/dev/shm has {free // 1024**2} MiB free, {need_bytes // 1024**2} are needed",
        hint="Remove stale segments, or enlarge it (container: --shm-size).",
    )


def busy_ports(address: str, ports: Sequence[int]) -> list[int]:
    """Those of the ports that cannot be bound on this address now (TCP)."""
    busy = []
    for port in ports:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: a port in TIME_WAIT is free, one that somebody listens on is not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                probe.listen(1)
            except OSError:
                busy.append(port)
    return busy


def check_ports(address: str, ports: Sequence[int]) -> Finding:
    """Whether every port that the engine will use on this node is free."""
    busy = busy_ports(address, ports)
    if not busy:
        return Finding(check="ports", verdict="healthy", message=f"{len(ports)} ports free")
    listed = ", ".join(str(port) for port in busy[:5])
    return Finding(
        check="ports",
        verdict="unhealthy",
        message=f"port {listed} in use on {address}",
        hint="Stop what listens there, or write another `port:`.",
    )


def check_model_folder(model: str) -> Finding:
    """Whether this node sees the model folder."""
    config = Path(model) / "config.json"
    try:
        with config.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        return Finding(
            check="model",
            verdict="unhealthy",
            message=f"{config} is not there",
            hint="Put the model on a shared file system or at the same path on every node.",
        )
    except OSError as error:
        return Finding(check="model", verdict="unhealthy", message=f"{config}: {error.strerror}")
    return Finding(check="model", verdict="healthy", message=model)
