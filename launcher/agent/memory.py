"""How much memory a process of ours may still take, by the machine and by our own limits. I/O."""

import contextlib
from pathlib import Path

import psutil

GIB = 1024**3
# A parked vLLM 0.32 takes 0.7 GB on the CPU, and more where CUDA's libraries are loaded.
TO_PARK_BYTES = 5 * GIB
TO_KEEP_BYTES = 2 * GIB
_ROOT = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """What can be had without swapping, and within the limits of the groups that we are in."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups(own: Path = Path("/proc/self/cgroup"), root: Path = _ROOT) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for row in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = row.split(":", 2)
            if controllers == "":
                found += _left(root, path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                found += _left(root / "memory", path, *names)
    return found


def _left(root: Path, path: str, limit_name: str, used_name: str) -> list[int]:
    """For this group and those above it: the limit less what is used and cannot be dropped."""
    found = []
    group = root / path.lstrip("/")
    while True:
        with contextlib.suppress(OSError, ValueError):  # no limit there, or not ours to see
            limit = int((group / limit_name).read_text(encoding="ascii"))
            used = int((group / used_name).read_text(encoding="ascii"))
            found.append(limit - used + _file_cache(group))
        if group in (root, group.parent):
            return found
        group = group.parent


def _file_cache(group: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for row in (group / "memory.stat").read_text(encoding="ascii").splitlines():
            name, _, value = row.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0
