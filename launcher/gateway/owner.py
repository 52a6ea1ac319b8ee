"""One owner for a port: a second gateway there would start silently and share the traffic. I/O.

HAProxy binds with SO_REUSEPORT, so the kernel does not refuse a second one of the same user. The
lock file of the port names the owner; it counts as long as any process of that gateway lives.
"""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from launcher.errors import BackendError, StateError, UsageError
from launcher.files import make_private, parse_document
from launcher.gateway.documents import Owner
from launcher.gateway.places import port_lock, private_root
from launcher.gateway.processes import is_alive


class SupervisedError(StateError):
    """Another supervisor of the same gateway lives."""


class PortLock:
    """Held by the supervisor; released by its end, in which the gateway may go on."""

    def __init__(self, port: int) -> None:
        make_private(private_root())
        self._path = port_lock(port)
        self._handle = -1

    def take(self, folder: str) -> None:
        """Become the owner. Raises UsageError with the name of another one."""
        while True:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                other = self._read()
                os.close(self._handle)
                if other is not None and other.folder == folder:
                    raise SupervisedError("is looked after already", where=folder) from None
                raise _taken(other, self._path) from None
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == os.fstat(self._handle).st_ino:
                    break
            os.close(self._handle)  # its owner ended, and took the file with it
        other = self._read()
        if other is not None and other.folder != folder and _lives(other):
            os.close(self._handle)
            raise _taken(other, self._path)

    def write(self, owner: Owner) -> None:
        """Say who it is. In place: a renamed file would not be the one that is locked."""
        data = owner.model_dump_json().encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, data, 0)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            os.close(self._handle)

    def _read(self) -> Owner | None:
        raw = os.pread(self._handle, 65536, 0)
        try:
            return parse_document(raw, Owner, str(self._path)) if raw.strip() else None
        except StateError:
            return None


def _lives(owner: Owner) -> bool:
    return any(is_alive(one) for one in (owner.supervisor, owner.front, *owner.tier))


def _taken(owner: Owner | None, path: Path) -> UsageError:
    who = (
        f"the gateway of fleet {owner.fleet} ({owner.user}, pid {owner.supervisor.pid}, "
        f"state in {owner.folder})"
        if owner
        else "another gateway"
    )
    return UsageError(
        f"{path.stem.rpartition('-')[2]} is held by {who}",
        where="port",
        hint="Write another `port:`, or end that fleet.",
    )


def check_port_is_free(host: str, port: int) -> None:
    """Bind as one who does not share. Raises BackendError when anybody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host if host != "0.0.0.0" else "", port))
        except OSError as error:
            told = "is in use" if error.errno == errno.EADDRINUSE else f"{error.strerror}"
            raise BackendError(
                f"port {port} of {host} {told}",
                where="port",
                hint="Write another `port:`, or leave it out for a free one.",
            ) from error


def free_port(first: int, last: int, host: str) -> int:
    """The first port that nobody listens on. Raises BackendError where there is none."""
    for port in range(first, last + 1):
        try:
            check_port_is_free(host, port)
        except BackendError:
            continue
        return port
    raise BackendError(
        f"no port from {first} to {last} is free", where="port", hint="Write `port:` yourself."
    )
