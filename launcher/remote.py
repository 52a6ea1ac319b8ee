"""The one door to SSH: connections, commands and files on hosts, with deadlines. I/O.

Host keys are checked, agents, key files and jump hosts are taken as ssh_config has them. What one
host cannot do is a value in the answer of a fan-out, not the end of the others.
"""

import contextlib
import logging
import posixpath
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fabric
import paramiko

from inventory.model import Node, SshAddress
from launcher.errors import FleetError, RemoteError, RemoteKind

CONNECT_TIMEOUT_S = 8.0
COMMAND_TIMEOUT_S = 60.0
FILE_TIMEOUT_S = 5.0
POLL_PATIENCE_S = 3.0
FAN_OUT_MAX = 32
THREADS_MAX = 512
READ_MAX_BYTES = 8 * 1024 * 1024
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What a command on a host printed, and how it ended."""

    code: int
    output: str
    errors: str


class _RefuseUnknownHost(paramiko.MissingHostKeyPolicy):
    """A host key that nobody has vouched for is an error that shows the fingerprint."""

    def missing_host_key(
        self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey
    ) -> None:
        raise RemoteError(
            "host_key",
            f"the host key is unknown: {key.get_name()} {key.fingerprint}",
            where=hostname,
            hint=f"If that is its fingerprint: ssh-keyscan {hostname} >> ~/.ssh/known_hosts",
        )


def _check_host_keys(connection: fabric.Connection, config: fabric.Config) -> None:
    """Known keys only, on the way, too: Fabric by itself believes every jump host."""
    client = connection.client
    client.load_system_host_keys()
    listed = config.base_ssh_config.lookup(connection.original_host)
    for name in listed.get("userknownhostsfile", "").split():
        if Path(name).expanduser().is_file():
            client.load_host_keys(str(Path(name).expanduser()))
    client.set_missing_host_key_policy(_RefuseUnknownHost())
    if isinstance(connection.gateway, fabric.Connection):
        _check_host_keys(connection.gateway, config)


class Host:
    """One SSH host: a connection made when it is needed, and made again when it broke."""

    def __init__(
        self, node: Node, ssh_config: Path | None, connecting: threading.BoundedSemaphore
    ) -> None:
        self.node = node
        self._connecting = connecting
        self._address = node.ssh or SshAddress(host=node.name)
        self._ssh_config = ssh_config
        self._connection: fabric.Connection | None = None
        self._sftp: paramiko.SFTPClient | None = None
        self._lock = threading.RLock()

    def run(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Answer:
        """Run a command line (quoted by launcher.quoting). Raises RemoteError."""
        with self._lock, self._translated("run a command"):
            channel = self._transport().open_session(timeout=CONNECT_TIMEOUT_S)
            channel.settimeout(timeout_s)
            channel.exec_command(command)
            output = channel.makefile("rb").read(READ_MAX_BYTES)
            errors = channel.makefile_stderr("rb").read(READ_MAX_BYTES)
            code = channel.recv_exit_status()
            channel.close()
            return Answer(
                code, output.decode("utf-8", "replace"), errors.decode("utf-8", "replace")
            )

    def home(self) -> str:
        with self._lock, self._translated("find the home folder"):
            return self._files().normalize(".")

    def read(self, path: str, offset: int = 0, limit: int = READ_MAX_BYTES) -> bytes | None:
        """A file's bytes from this offset (negative: from its end), or None if it is not there."""
        with self._lock, self._translated(f"read {path}"):
            try:
                with self._files().open(path, "rb") as file:
                    size = file.stat().st_size or 0
                    file.seek(max(0, size + offset) if offset < 0 else min(offset, size))
                    return file.read(limit)
            except FileNotFoundError:
                return None

    def write(self, path: str, content: bytes, mode: int = 0o600) -> None:
        """Replace a file whole or not at all; its folders are made with mode 0700."""
        with self._lock, self._translated(f"write {path}"):
            files = self._files()
            self._make_folders(files, posixpath.dirname(path))
            scratch = (
                f"{posixpath.dirname(path)}/.{posixpath.basename(path)}.{secrets.token_hex(4)}"
            )
            try:
                with files.open(scratch, "wb") as file:
                    file.chmod(mode)
                    file.write(content)
                files.posix_rename(scratch, path)
            except OSError:
                with contextlib.suppress(OSError):
                    files.remove(scratch)
                raise

    def listing(self, folder: str) -> list[str]:
        """Names in a folder; one that is a path is not one that a server may give."""
        with self._lock, self._translated(f"list {folder}"):
            try:
                names = self._files().listdir(folder)
                return sorted(n for n in names if "/" not in n and n not in (".", ".."))
            except FileNotFoundError:
                return []

    def close(self) -> None:
        with self._lock, contextlib.suppress(Exception):  # a broken connection may not close well
            if self._connection is not None:
                self._connection.close()
            self._connection = self._sftp = None

    def _transport(self) -> paramiko.Transport:
        if self._connection is None or not self._connection.is_connected:
            with self._connecting:
                self._connect()
        assert self._connection is not None
        transport: paramiko.Transport | None = self._connection.client.get_transport()
        if transport is None:
            raise paramiko.SSHException("the connection has gone")
        return transport

    def _files(self) -> paramiko.SFTPClient:
        transport = self._transport()
        if self._sftp is None:
            self._sftp = paramiko.SFTPClient.from_transport(transport)
            if self._sftp is None:
                raise paramiko.SSHException("the host has no SFTP")
        channel = self._sftp.get_channel()
        if channel is not None:
            channel.settimeout(FILE_TIMEOUT_S)
        return self._sftp

    def _connect(self) -> None:
        self._sftp = None
        path = str(self._ssh_config) if self._ssh_config else None
        config = fabric.Config(runtime_ssh_path=path) if path else fabric.Config()
        keywords: dict[str, Any] = {
            "banner_timeout": CONNECT_TIMEOUT_S,
            "auth_timeout": CONNECT_TIMEOUT_S,
        }
        if self._address.key_file:
            keywords["key_filename"] = self._address.key_file
        connection = fabric.Connection(
            self._address.host,
            user=self._address.user,
            port=self._address.port,
            gateway=self._gateway(config),
            config=config,
            connect_timeout=int(CONNECT_TIMEOUT_S),
            connect_kwargs=keywords,
        )
        _check_host_keys(connection, config)
        connection.open()
        transport = connection.client.get_transport()
        if transport is not None:
            transport.set_keepalive(5)
        self._connection = connection

    def _gateway(self, config: fabric.Config) -> fabric.Connection | None:
        """The inventory's jump host; without one Fabric takes that of ssh_config."""
        if not self._address.jump_host:
            return None
        return fabric.Connection(
            self._address.jump_host, config=config, connect_timeout=int(CONNECT_TIMEOUT_S)
        )

    def _make_folders(self, files: paramiko.SFTPClient, folder: str) -> None:
        missing = []
        while folder not in ("", "/"):
            try:
                files.stat(folder)
                break
            except FileNotFoundError:
                missing.append(folder)
                folder = posixpath.dirname(folder)
        for one in reversed(missing):
            with contextlib.suppress(OSError):  # another host of the same home was faster
                files.mkdir(one, 0o700)

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Any:
        """Paramiko's and the socket's errors as one RemoteError that tells the story."""
        try:
            yield
        except FleetError:
            self.close()
            raise
        except paramiko.BadHostKeyException as error:
            self.close()
            raise RemoteError(
                "host_key",
                f"its host key has changed: {error.key.get_name()} {error.key.fingerprint}",
                where=self.node.name,
                hint="Was it installed anew? Then remove its old line from known_hosts.",
            ) from error
        except paramiko.AuthenticationException as error:
            self.close()
            raise RemoteError(
                "auth",
                "it refused our keys",
                where=self.node.name,
                hint=f"Try `ssh {self._address.host}`; name a key in the inventory or ssh_config.",
            ) from error
        except (TimeoutError, FutureTimeoutError) as error:
            self.close()
            raise RemoteError(
                "timeout", f"did not {doing} in time", where=self.node.name
            ) from error
        except (paramiko.SSHException, EOFError, socket.gaierror, ConnectionError) as error:
            self.close()
            raise RemoteError(
                "unreachable",
                f"cannot be reached by SSH: {_short(error)}",
                where=self.node.name,
                hint=f"Is it up? Try `ssh {self._address.host}`.",
            ) from error
        except OSError as error:
            unreachable = error.errno in (101, 110, 111, 113) or not error.strerror
            if unreachable:
                self.close()
            kind: RemoteKind = "unreachable" if unreachable else "failed"
            words = "cannot be reached by SSH" if unreachable else f"could not {doing}"
            raise RemoteError(kind, f"{words}: {_short(error)}", where=self.node.name) from error


class Fleet:
    """Several hosts, asked in parallel. Never more than FAN_OUT_MAX connect at once, which is what
    costs; what runs on them waits together, for ranks of one check must all be there."""

    def __init__(self, nodes: Iterable[Node], ssh_config: Path | None) -> None:
        # Paramiko logs what it raises, too; the errors are ours to tell.
        logging.getLogger("paramiko").setLevel(logging.CRITICAL)
        connecting = threading.BoundedSemaphore(FAN_OUT_MAX)
        self.hosts = {node.name: Host(node, ssh_config, connecting) for node in nodes}
        threads = max(1, min(len(self.hosts), THREADS_MAX))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ssh")
        self._unfinished: dict[str, Future[Any]] = {}
        self._polled: dict[tuple[str, str], tuple[float, Future[Any]]] = {}

    def poll(
        self, about: str, names: Iterable[str], do: Callable[[Host], T], wait_s: float
    ) -> dict[str, T | RemoteError | None]:
        """As `each`, but a slow host holds up nobody: None while its answer is on its way, which
        the next poll about the same thing takes; an error once that has lasted too long."""
        answers: dict[str, T | RemoteError | None] = {}
        asked: dict[str, tuple[float, Future[T]]] = {}
        for name in names:
            answers[name] = None
            before = self._unfinished.get(name)
            if (about, name) not in self._polled and (before is None or before.done()):
                future = self._unfinished[name] = self._pool.submit(do, self.hosts[name])
                self._polled[about, name] = (time.monotonic(), future)
            if (about, name) in self._polled:
                asked[name] = self._polled[about, name]
        wait([future for _, future in asked.values()], timeout=wait_s)
        for name, (began, future) in asked.items():
            if future.done():
                del self._polled[about, name]
                try:
                    answers[name] = future.result()
                except RemoteError as error:
                    answers[name] = error
            elif (lasted_s := time.monotonic() - began) > POLL_PATIENCE_S:
                message = f"has not answered for {lasted_s:.0f} s"
                answers[name] = RemoteError("timeout", message, where=name)
        return answers

    def each(
        self, names: Iterable[str], do: Callable[[Host], T], deadline_s: float
    ) -> dict[str, T | RemoteError]:
        """`do` on every named host; an answer or the error, for each of them."""
        answers: dict[str, T | RemoteError] = {}
        futures: dict[str, Future[T]] = {}
        for name in names:
            before = self._unfinished.get(name)
            if before is not None and not before.done():
                # One question at a time to a host that hangs, or they would pile up behind it.
                answers[name] = RemoteError("timeout", "has not answered yet", where=name)
                continue
            futures[name] = self._unfinished[name] = self._pool.submit(do, self.hosts[name])
        deadline = time.monotonic() + deadline_s
        for name, future in futures.items():
            try:
                answers[name] = future.result(timeout=max(0.0, deadline - time.monotonic()))
            except RemoteError as error:
                answers[name] = error
            except FutureTimeoutError:
                answers[name] = RemoteError(
                    "timeout", f"did not answer within {deadline_s:.0f} s", where=name
                )
        return answers

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:300]
