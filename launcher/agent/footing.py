"""What an agent stands on: its node's lock, its secrets, its addresses. I/O."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

import psutil

from launcher.documents import NetAddress
from launcher.errors import StateError

LOCK_WITHIN_S = 2.0


def take_lock(lock: Path) -> int:
    """Hold the node's lock for our life, so that a repeated start is harmless."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_WITHIN_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:  # a reader that looks whether we live holds it for an instant
            if time.monotonic() > deadline:
                message = "another agent of this node is running"
                raise StateError(message, where=str(lock)) from error
            time.sleep(0.05)
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode("ascii"))
    return handle


def read_secrets(folder: Path) -> dict[str, str]:
    secrets = {}
    with contextlib.suppress(FileNotFoundError):
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("."):
                secrets[file.name] = file.read_text(encoding="utf-8").strip()
    if "agent_token" not in secrets:
        raise StateError("holds no agent_token", where=str(folder))
    return secrets


def own_addresses(forced: str | None) -> tuple[NetAddress, ...]:
    """Every IPv4 address of this node, loopback left out unless it was given to us."""
    if forced:
        return (NetAddress(interface=_interface_of(forced), ip=forced, prefix=8),)
    found = []
    stats = psutil.net_if_stats()
    for interface, addresses in sorted(psutil.net_if_addrs().items()):
        if interface == "lo" or not (interface in stats and stats[interface].isup):
            continue
        for address in addresses:
            if address.family == socket.AF_INET and address.netmask:
                bits = sum(int(part).bit_count() for part in address.netmask.split("."))
                found.append(NetAddress(interface=interface, ip=address.address, prefix=bits))
    return tuple(found)


def _interface_of(ip: str) -> str:
    if ip.startswith("127."):
        return "lo"
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            return interface
    return "lo"
