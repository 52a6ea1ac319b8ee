"""The controller's hold on the gateway: started in time, fed each round, ended last. I/O."""

import socket
import time
from pathlib import Path

from launcher.errors import FleetError
from launcher.files import read_document
from launcher.gateway import feed, keyring
from launcher.gateway.documents import Keys, Settings, State
from launcher.gateway.door import FRESH_S, Gateway
from launcher.gateway.owner import free_port
from launcher.journal import Journal
from launcher.paths import FleetPaths
from launcher.record import RunRecord
from launcher.slurm_tools import jobs
from launcher.snapshot import GatewayView, Snapshot
from launcher.spec import FleetSpec

PORTS = (8080, 8179)
RETRY_S = (1.0, 2.0, 5.0, 15.0, 30.0)
STOPS_WITHIN_S = 15.0


class Traffic:
    """One per controller. Serving goes on without it, and without the gateway's supervisor."""

    def __init__(
        self, paths: FleetPaths, spec: FleetSpec, spec_file: Path, journal: Journal
    ) -> None:
        self._paths = paths
        self._spec = spec
        self._spec_file = spec_file
        self._journal = journal
        self._gateway = Gateway(paths.gateway, jobs.has_left)
        self._trouble = ""
        self._failures = 0
        self._try_at = 0.0
        self._seen_orders = 0
        self._heard: tuple[float | None, float] = (None, 0.0)  # what it said when, by our clock

    def look(self, record: RunRecord) -> GatewayView:
        """What the gateway says now."""
        state = self._state()
        if state is None:
            return GatewayView(is_up=False, problem=self._trouble)
        at = {
            name: feed.requests_at(state, replica, self._seen_orders)
            for name, replica in record.replicas.items()
        }
        waiting = sum(process.waiting for process in state.processes)
        return GatewayView(
            is_up=state.front == "up" and bool(state.processes),
            address=f"{state.address}/v1",
            requests=at,
            waiting=waiting,
            quiet_s=min((process.quiet_s for process in state.processes), default=None),
            problem=state.problem,
        )

    def give_orders(self, record: RunRecord, snapshot: Snapshot) -> None:
        """Start the gateway when ranks are given, again when it is gone; tell it who serves.

        What goes wrong here is told and tried again: the fleet itself goes on.
        """
        try:
            if snapshot.desired == "up" and any(r.ranked_at for r in record.replicas.values()):
                self._tend(record)
            if self._paths.gateway.settings.exists():
                self._give(record, snapshot)
            self._trouble = ""
        except (FleetError, OSError) as error:
            if str(error) != self._trouble:
                self._journal.write("failed", step="gateway", error=str(error))
            self._trouble = str(error)

    def _give(self, record: RunRecord, snapshot: Snapshot) -> None:
        key_file = str(self._paths.secrets / "engine_key")
        before = self._gateway.orders()
        wanted = feed.orders(record, snapshot, before, key_file, self._backup())
        given = self._gateway.give(wanted)
        if given.revision != self._seen_orders:
            self._seen_orders = given.revision
            told = {member.name: member.goal for member in given.members}
            self._journal.write("gateway", members=told, open=given.open)

    def stop(self) -> str:
        """End it, and wait: afterwards nothing of this fleet listens; else what does, in words."""
        try:
            leftover = self._gateway.stop(self._spec.limits.drain + STOPS_WITHIN_S)
        except (FleetError, OSError) as error:
            leftover = str(error)
        self._journal.write("gateway", stopped=not leftover, leftover=leftover)
        return leftover

    def _tend(self, record: RunRecord) -> None:
        if self._gateway.is_supervised():
            self._configure(record)  # a changed spec is followed without a restart
            self._failures = 0
            return
        if self._gateway.is_starting():
            return
        if time.monotonic() < self._try_at:
            return
        self._try_at = time.monotonic() + RETRY_S[min(self._failures, len(RETRY_S) - 1)]
        self._failures += 1
        self._configure(record)
        self._journal.write("gateway", start=self._settings(record).port, tries=self._failures)
        self._gateway.start()

    def _configure(self, record: RunRecord) -> None:
        self._gateway.configure(self._settings(record))
        self._gateway.change_keys(self._with_default)

    def _with_default(self, keys: Keys) -> Keys:
        """The ring with the fleet's own key as its file is now; without a file nothing is new."""
        try:
            secret = self._paths.api_key.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return keys
        return keyring.with_default(keys, secret, time.time())

    def _settings(self, record: RunRecord) -> Settings:
        """The spec's gateway with an address that was found once and stays."""
        spec = read_document(self._spec_file, FleetSpec) or self._spec
        before = read_document(self._paths.gateway.settings, Settings)
        written = spec.gateway
        host = "127.0.0.1" if spec.backend.kind == "local" else "0.0.0.0"
        if written.host != "auto" and written.host.startswith("127."):
            host = written.host
        port = spec.port or (before.port if before else 0)
        # Another port only while nothing of ours listens on this one.
        if not port or (not spec.port and not self._gateway.is_running() and self._failures > 1):
            port = free_port(*PORTS, host)
        return Settings(
            fleet=spec.name,
            host=host,
            port=port,
            announced=written.host if written.host != "auto" else self._announced(record, host),
            processes=written.processes,
            certificate=written.tls.certificate if written.tls else "",
            certificate_key=written.tls.key if written.tls else "",
            body_max_bytes=written.body_max_bytes,
            waiting_max=written.waiting_max,
            hold_s=float(written.hold),
            drain_s=float(spec.limits.drain),
            continue_streams=written.continue_streams,
        )

    def _announced(self, record: RunRecord, host: str) -> str:
        """The address of this host that the nodes reach: what the kernel would send them from."""
        if host != "0.0.0.0":
            return host
        known = read_document(self._paths.gateway.settings, Settings)
        if known is not None and known.announced and self._gateway.is_supervised():
            return known.announced
        members = (
            assignment.member
            for held in record.allocations.values()
            for assignment in held.assignments.values()
        )
        for member in members:
            if member is None:
                continue
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                try:
                    probe.connect((member.leader_address, 9))
                except OSError:
                    continue
                return str(probe.getsockname()[0])
        return socket.gethostname()

    def _backup(self) -> feed.Backup | None:
        fallback = (read_document(self._spec_file, FleetSpec) or self._spec).gateway.fallback
        if fallback is None:
            return None
        key = str(self._paths.secrets / "fallback_key") if fallback.key else ""
        return feed.Backup(fallback.url, fallback.model, key)

    def _state(self) -> State | None:
        try:
            state = self._gateway.state()
        except (FleetError, OSError):
            return None
        return state if state is not None and self._is_fresh(state.at) else None

    def _is_fresh(self, at: float) -> bool:
        """Whether the gateway speaks. Its clock may be another one than ours, and wrong: what
        counts is that it moves; only the first time it is believed as it is."""
        now = time.monotonic()
        if at != self._heard[0]:
            known = self._heard[0] is not None or abs(time.time() - at) < FRESH_S
            self._heard = (at, now if known else now - FRESH_S)
        return now - self._heard[1] < FRESH_S
