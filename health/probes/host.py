"""The machine itself: memory, limits, clock, interfaces, ports. I/O."""

import ctypes
import os
import platform
import resource
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

from health.evidence import Asked, Host, Interface
from health.probes.files import text

# From linux/timex.h: the kernel's clock is not kept by anybody.
_STA_UNSYNC = 0x0040
_TIME_ERROR = 5
_CAP_IPC_LOCK = 14  # linux/capability.h


def read_host(asked: Asked) -> Host:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    synchronized, error_s = _kernel_clock()
    return Host(
        kernel=platform.release(),
        cpus=os.cpu_count() or 1,
        memory_total_bytes=memory.total,
        memory_available_bytes=memory.available,
        swap_total_bytes=swap.total,
        swap_used_bytes=swap.used,
        memlock_bytes=_memlock_bytes(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        clock_synchronized=synchronized,
        clock_error_s=error_s,
        stuck_processes=_stuck(),
        interfaces=_interfaces(),
        busy_ports=tuple(busy_ports(asked.address, asked.ports)),
        address=asked.address,
    )


def _memlock_bytes() -> int | None:
    """How much memory a process like us may lock; None: as much as it likes. The kernel does not
    ask for the limit where the process holds CAP_IPC_LOCK."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    status = Path("/proc/self/status").read_text()
    effective = next(row for row in status.splitlines() if row.startswith("CapEff:"))
    may_lock = int(effective.split()[1], 16) >> _CAP_IPC_LOCK & 1
    return None if may_lock or limit == resource.RLIM_INFINITY else limit


def boot_id() -> str:
    """The kernel's name of this boot: findings of another boot say nothing about this one."""
    return text(Path("/proc/sys/kernel/random/boot_id"))


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


def _interfaces() -> tuple[Interface, ...]:
    states = psutil.net_if_stats()
    return tuple(
        Interface(
            name=name,
            ip=address.address,
            prefix=_prefix(address.netmask),
            mtu=states[name].mtu,
            speed_mbps=states[name].speed,
            is_up=states[name].isup,
        )
        for name, addresses in sorted(psutil.net_if_addrs().items())
        for address in addresses
        if address.family == socket.AF_INET and name in states
    )


def _prefix(netmask: str | None) -> int:
    return sum(int(part).bit_count() for part in netmask.split(".")) if netmask else 32


def _stuck() -> int:
    """Processes that wait in the kernel and cannot be killed (state D)."""
    return sum(
        1
        for process in psutil.process_iter(["status"])
        if process.info["status"] == psutil.STATUS_DISK_SLEEP
    )


class _Timex(ctypes.Structure):
    """The beginning of struct timex; the rest is padding that we do not read."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("padding", ctypes.c_char * 256),
    )


def _kernel_clock() -> tuple[bool | None, float | None]:
    """Whether somebody keeps the kernel's clock right, and how wrong it may be, in seconds."""
    state = _Timex()
    try:
        answer = ctypes.CDLL(None).adjtimex(ctypes.byref(state))
    except (OSError, AttributeError):
        return None, None
    if answer < 0:
        return None, None
    synchronized = answer != _TIME_ERROR and not state.status & _STA_UNSYNC
    return synchronized, state.maxerror / 1e6
