"""Disks and mounts. I/O. The caller asks each mount in a child of its own: it may hang."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from health.evidence import Asked, Folder, Nvme, Storage
from health.probes.files import entries, text

NVME_CLI_TIMEOUT_S = 1.0
READ_BYTES = 1024**3
_BLOCK_BYTES = 4 * 1024**2
# Mounts whose server is another machine: only these can hang without a fault of this one.
NETWORK_TYPES = (
    "nfs",
    "nfs4",
    "lustre",
    "beegfs",
    "gpfs",
    "ceph",
    "cifs",
    "9p",
    "wekafs",
    "pvfs2",
)


def read_storage(asked: Asked) -> Storage:
    """Space where the fleet writes, and the state of the NVMe drives."""
    places: list[tuple[str, str]] = [("/dev/shm", "shm")]
    places += [(asked.scratch, "scratch")] if asked.scratch else []
    places += [(folder, "weights") for folder in asked.weights_folders]
    folders = tuple(_folder(path, purpose) for path, purpose in places)
    rate = None
    if asked.level == "deep" and asked.model_folder:
        rate = read_rate(Path(asked.model_folder))
    return Storage(folders=folders, nvmes=_nvmes(Path(asked.sysfs)), read_rate_bytes_s=rate)


def network_mounts(mounts: Path = Path("/proc/self/mounts")) -> list[tuple[str, str]]:
    """Path and type of every mount that another machine or a user's daemon serves."""
    found = []
    with contextlib.suppress(OSError):
        for line in mounts.read_text().splitlines():
            words = line.split()
            if len(words) > 2 and is_over_network(words[2]):
                found.append((words[1].encode().decode("unicode_escape"), words[2]))
    return found


def is_over_network(kind: str) -> bool:
    """Whether a mount of this type is another machine's, or a user's daemon's, which may be."""
    return kind in NETWORK_TYPES or kind.startswith("fuse.")


def time_mount(path: str) -> float:
    """How long statfs of this mount takes; the caller's deadline ends a hanging one."""
    began = time.monotonic()
    with contextlib.suppress(OSError):  # an error is an answer: it does not hang
        os.statvfs(path)
    return round(time.monotonic() - began, 4)


def read_rate(folder: Path) -> float | None:
    """Bytes per second of the largest file below this folder, past the page cache."""
    files = [path for path in folder.glob("*") if path.is_file()]
    if not files:
        return None
    largest = max(files, key=lambda path: path.stat().st_size)
    handle = os.open(largest, os.O_RDONLY)
    try:
        # Dirty pages cannot be dropped, clean ones can: what follows comes from the device.
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        began, total = time.monotonic(), 0
        while total < READ_BYTES:
            block = os.read(handle, _BLOCK_BYTES)
            if not block:
                break
            total += len(block)
        return total / max(time.monotonic() - began, 1e-6)
    finally:
        os.close(handle)


def _folder(path: str, purpose: str) -> Folder:
    try:
        usage = shutil.disk_usage(path)
        inodes = os.statvfs(path)
    except OSError as error:
        said = error.strerror or str(error)
        return Folder.model_validate({"path": path, "purpose": purpose, "error": said})
    return Folder.model_validate(
        {
            "path": path,
            "purpose": purpose,
            "free_bytes": usage.free,
            "total_bytes": usage.total,
            # Some file systems do not count inodes and say 0 of 0.
            "free_inodes": inodes.f_favail if inodes.f_files else None,
        }
    )


def _nvmes(sysfs: Path) -> tuple[Nvme, ...]:
    drives = []
    for folder in entries(sysfs / "class/nvme"):
        smart = _smart(folder.name)
        drives.append(
            Nvme(
                name=folder.name,
                state=text(folder / "state"),
                model=text(folder / "model"),
                critical_warning=smart.get("critical_warning"),
                percentage_used=smart.get("percent_used", smart.get("percentage_used")),
            )
        )
    return tuple(drives)


def _smart(name: str) -> dict[str, int]:
    """The SMART log by nvme-cli, where that is installed and allowed."""
    program = shutil.which("nvme")
    if program is None:
        return {}
    try:
        answer = subprocess.run(
            [program, "smart-log", "--output-format=json", f"/dev/{name}"],
            capture_output=True,
            timeout=NVME_CLI_TIMEOUT_S,
            check=True,
        )
        log = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return {key: value for key, value in log.items() if isinstance(value, int)}
