"""The front as the supervisor keeps it: configured, started, reloaded, its keys changed. I/O."""

import os
from pathlib import Path

from launcher.errors import FleetError, StateError
from launcher.files import open_log, read_document, write_text
from launcher.gateway import haproxy, keyring
from launcher.gateway.documents import Keys, Process, Settings
from launcher.gateway.front import FrontPlaces, render
from launcher.gateway.places import GatewayPaths, RunFolder
from launcher.gateway.processes import identity, is_alive

Stamp = tuple[int, int, int] | None
# One thread moves 30,000 chunks a second; a second one costs a third more for each request.
CORES_PER_THREAD, THREADS_MAX = 4, 4


class FrontKeeper:
    """One HAProxy: master and worker."""

    def __init__(self, paths: GatewayPaths, run: RunFolder) -> None:
        self.process: Process | None = None
        self._paths = paths
        self._run = run
        self._binary = haproxy.find_binary()
        self._configured_for: tuple[Settings, Stamp, Stamp] | None = None
        self._keys_given: Stamp = None
        self._refused: FleetError | None = None

    @property
    def is_up(self) -> bool:
        return is_alive(self.process) and self._run.front_socket.exists()

    def start(self, settings: Settings) -> None:
        keys_given = _stamp(self._paths.keys)
        self._configure(settings)
        with open_log(self._paths.front_log) as handle:
            started = haproxy.start(self._binary, self._run.config, handle)
        self.process = identity(started.pid)
        self._keys_given = keys_given

    def follow(self, settings: Settings) -> None:
        """Keys at once; anything else by a reload, after HAProxy has checked it. What it refused
        is told until the files change."""
        if not self.is_up or self.process is None:
            return
        if self._configured_for != _wanted(settings):
            keys_given = _stamp(self._paths.keys)
            self._refused = None
            try:
                self._configure(settings)
                haproxy.reload(self.process.pid)
                self._keys_given = keys_given
            except FleetError as error:
                self._refused = error
        if self._keys_given != _stamp(self._paths.keys):
            self._give_keys()
        if self._refused is not None:
            raise self._refused

    def _configure(self, settings: Settings) -> None:
        """Write what the front reads when it starts. Raises BackendError where it would refuse."""
        self._configured_for = _wanted(settings)
        write_text(self._run.keys_map, keyring.as_map(self._keys()))
        if settings.certificate:
            pair = (_read(settings.certificate), _read(settings.certificate_key))
            write_text(self._run.certificate, "\n".join(pair))
        places = FrontPlaces(
            socket=str(self._run.front_socket),
            keys_map=str(self._run.keys_map),
            tier_sockets=tuple(
                str(self._run.tier_socket(index)) for index in range(settings.processes)
            ),
            certificate=str(self._run.certificate) if settings.certificate else "",
        )
        threads = max(1, min(THREADS_MAX, (os.cpu_count() or 1) // CORES_PER_THREAD))
        scratch = self._run.config.with_suffix(".new")
        write_text(scratch, render(settings, places, threads))
        haproxy.check(self._binary, scratch)
        scratch.replace(self._run.config)

    def _give_keys(self) -> None:
        """Make the running front know exactly the keys that there are."""
        mark = _stamp(self._paths.keys)
        keys = self._keys()
        write_text(self._run.keys_map, keyring.as_map(keys))
        wanted = {key.sha256: key.name for key in keys.keys}
        socket, keys_map = self._run.front_socket, self._run.keys_map
        held = haproxy.known_keys(socket, keys_map)
        for digest in held.keys() - wanted.keys():
            haproxy.remove_key(socket, keys_map, digest)
        for digest in wanted.keys() - held.keys():
            haproxy.add_key(socket, keys_map, digest, wanted[digest])
        self._keys_given = mark

    def _keys(self) -> Keys:
        return read_document(self._paths.keys, Keys) or Keys()


def _wanted(settings: Settings) -> tuple[Settings, Stamp, Stamp]:
    certificate, key = settings.certificate, settings.certificate_key
    return (
        settings,
        _stamp(Path(certificate)) if certificate else None,
        _stamp(Path(key)) if key else None,
    )


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"cannot be read: {error}", where=path) from error
