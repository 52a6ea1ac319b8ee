"""`launcher logs`: what the engines wrote, the first failure first."""

import sys
import time
from dataclasses import dataclass

from launcher import fleets, freshness
from launcher.backends.base import Allocation, Backend
from launcher.cli import output
from launcher.context import make_allocation
from launcher.errors import FleetError, UsageError
from launcher.paths import FleetPaths
from launcher.record import ReplicaRecord, RunRecord, Seat
from launcher.status import Status
from launcher.wish import read_record, read_wish

BYTES_PER_LINE = 400
FOLLOW_S = 0.5


@dataclass(frozen=True)
class _Source:
    replica: str
    allocation: Allocation
    node: str
    name: str

    @property
    def title(self) -> str:
        return f"{self.replica} {self.node} {self.name}"


def logs(
    paths: FleetPaths,
    replica: str | None,
    *,
    node: str | None,
    follow: bool,
    lines: int,
    as_json: bool,
) -> int:
    wish = read_wish(paths)
    record = read_record(paths, wish.run) if wish else None
    if wish is None or record is None:
        raise UsageError(f"{paths.root.name} has no run yet", where="logs")
    from launcher.backends import make_backend

    spec = fleets.spec_of(paths, wish.run)
    backend = make_backend(spec, paths)
    try:
        sources = _sources(paths, record, backend, replica, node)
        status = freshness.read_status(paths, wish.run)
        sources = _first_failure_first(sources, status)
        if as_json:
            _as_json(backend, sources, lines, follow)
        else:
            _tell_failure(status)
            _as_text(backend, sources, lines, follow)
    finally:
        backend.close()
    return 0


def _sources(
    paths: FleetPaths, record: RunRecord, backend: Backend, replica: str | None, node: str | None
) -> list[_Source]:
    chosen = [r for r in record.replicas.values() if replica in (None, r.name)]
    if not chosen:
        known = ", ".join(record.replicas)
        raise UsageError(f"there is no replica {replica}", where="logs", hint=f"One of {known}.")
    sources = []
    for one in chosen:
        sources += _of_replica(paths, record, one, backend, node)
    if not sources and node is not None:
        known = ", ".join(name for one in chosen for name in one.nodes)
        raise UsageError(f"{node} has no logs", where="--node", hint=f"Nodes: {known}.")
    return sources


def _of_replica(
    paths: FleetPaths,
    record: RunRecord,
    one: ReplicaRecord,
    backend: Backend,
    node: str | None,
) -> list[_Source]:
    """Where it sits now, then the allocations that were asked for it and serve it no more."""
    spec = fleets.spec_of(paths, record.run)
    own = [
        Seat(node=name, allocation=held.name)
        for held in record.allocations.values()
        if held.owner == one.name
        for name in held.nodes
    ]
    found = []
    for seat in dict.fromkeys([*one.seats, *own]):
        held = record.allocations.get(seat.allocation)
        if held is None or node not in (None, seat.node):
            continue
        allocation = make_allocation(paths, spec, record.run, held, backend.kind)
        try:
            files = backend.logs(allocation, seat.node)
        except FleetError as error:
            output.say(f"{seat.node}: {error}")
            continue
        found += [_Source(one.name, allocation, seat.node, file) for file in files]
    return found


def _first_failure_first(sources: list[_Source], status: Status | None) -> list[_Source]:
    """The log of the process that failed first, then the others as they are."""
    for replica in status.replicas if status else []:
        evidence = replica.failure.evidence if replica.failure else None
        if evidence is None:
            continue
        wanted = f"{evidence.process}.log"

        def key(source: _Source, node: str = evidence.node, name: str = wanted) -> bool:
            return not (source.node == node and source.name.endswith(name))

        return sorted(sources, key=key)
    return sources


def _tell_failure(status: Status | None) -> None:
    if status and status.error:
        output.say(f"first failure: {status.error.where}: {status.error.message}")


def _as_text(backend: Backend, sources: list[_Source], lines: int, follow: bool) -> None:
    ends: dict[str, int] = {}
    for source in sources:
        text = _tail(backend, source, lines)
        output.show(f"==> {source.title} <==\n{text}")
    if not follow:
        return
    for source in sources:
        whole = backend.read_log(source.allocation, source.node, source.name, 0)
        ends[source.title] = len(whole)
    last = ""
    while True:
        for source in sources:
            fresh = backend.read_log(
                source.allocation, source.node, source.name, ends[source.title]
            )
            if fresh:
                ends[source.title] += len(fresh)
                if last != source.title:
                    output.show(f"==> {source.title} <==")
                    last = source.title
                sys.stdout.write(fresh.decode("utf-8", "replace"))
                sys.stdout.flush()
        time.sleep(FOLLOW_S)


def _as_json(backend: Backend, sources: list[_Source], lines: int, follow: bool) -> None:
    if follow:
        raise UsageError("--follow prints text; leave --json out", where="logs")
    output.document(
        {
            "version": 1,
            "logs": [
                {
                    "replica": source.replica,
                    "node": source.node,
                    "name": source.name,
                    "lines": _tail(backend, source, lines).splitlines(),
                }
                for source in sources
            ],
        }
    )


def _tail(backend: Backend, source: _Source, lines: int) -> str:
    raw = backend.read_log(source.allocation, source.node, source.name, -lines * BYTES_PER_LINE)
    return "\n".join(raw.decode("utf-8", "replace").splitlines()[-lines:])
