"""`launcher drill`: a real fault on purpose, under load, and how long the fleet takes over it."""

import secrets
import sys
import time
from dataclasses import dataclass
from typing import Any

import typer

from inventory import nodeset
from launcher import fleets, freshness
from launcher.cli import output
from launcher.cli.progress import Progress
from launcher.cli.steady import Requests, Steady
from launcher.documents import Drill
from launcher.drilling import DETECTED_WITHIN_S, KINDS, Course, followed, replica_of
from launcher.errors import BackendError, StateError, UsageError
from launcher.paths import FleetPaths
from launcher.spec import FleetSpec
from launcher.status import ReplicaStatus, Status, StatusError
from launcher.wish import Wish, read_record, read_wish, wish_drill

SLACK_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """What came of it. error: why it does not serve again; None also where nothing happened."""

    course: Course
    status: Status
    requests: Requests
    error: StatusError | None = None


def drill(
    paths: FleetPaths,
    kind: str,
    replica: str | None,
    node: str | None,
    *,
    yes: bool,
    as_json: bool,
) -> int:
    """Ask, keep requests going, inject the fault, and watch until the fleet serves again."""
    if kind not in KINDS:
        raise UsageError(
            f"there is no fault {kind}", where="drill", hint=f"One of {', '.join(KINDS)}."
        )
    wish, status = _serving(paths)
    spec = fleets.spec_of(paths, wish.run)
    target, node = choose(status, replica, node)
    _confirm(kind, target, node, status, spec, yes=yes)
    order = Drill(
        id=secrets.token_hex(4),
        replica=target.name,
        generation=target.generation,
        node=node,
        kind=kind,
    )
    outcome = _carry_out(paths, wish, status, spec, order)
    if as_json:
        output.document(document(order, target, outcome))
    else:
        output.show(table(order, target, outcome))
    return outcome.error.exit_code if outcome.error else 0


def choose(status: Status, replica: str | None, node: str | None) -> tuple[ReplicaStatus, str]:
    """Whom it hits: what is named, else the first replica and its last node, which leads only
    where it is alone. Raises UsageError with the names there are. Pure."""
    hosts = {one.name: [n.node for n in one.nodes] for one in status.replicas}
    if replica is not None and replica not in hosts:
        raise UsageError(
            f"there is no replica {replica}",
            where="--replica",
            hint=f"Its replicas: {', '.join(hosts)}.",
        )
    names = [replica] if replica is not None else list(hosts)
    if node is None:
        return _named(status, names[0]), hosts[names[0]][-1]
    for name in names:
        if node in hosts[name]:
            return _named(status, name), node
    every = nodeset.fold([one for name in names for one in hosts[name]])
    raise UsageError(f"no rank is on {node}", where="--node", hint=f"Ranks are on {every}.")


def document(order: Drill, before: ReplicaStatus, outcome: Outcome) -> dict[str, Any]:
    """The result for programs. Pure."""
    course, after = outcome.course, replica_of(outcome.status, order.replica) or before
    error = outcome.error
    return {
        "version": 1,
        "fleet": outcome.status.fleet,
        "drill": order.id,
        "kind": order.kind,
        "replica": order.replica,
        "node": order.node,
        "began_at": course.began_at,
        "detect_s": _rounded(course.detect_s),
        "serve_s": _rounded(course.serve_s),
        "generation": {"before": before.generation, "after": after.generation},
        "nodes": {
            "before": [one.node for one in before.nodes],
            "after": [one.node for one in after.nodes],
        },
        "requests": outcome.requests.as_document(),
        "error": error.model_dump() if error else None,
    }


def table(order: Drill, before: ReplicaStatus, outcome: Outcome) -> str:
    """The result for people. Pure."""
    course, requests = outcome.course, outcome.requests
    after = replica_of(outcome.status, order.replica) or before
    nodes = [nodeset.fold([one.node for one in its.nodes]) for its in (before, after)]
    unfinished = f", {requests.unfinished} still under way" if requests.unfinished else ""
    rows = [
        ["drill", f"{order.kind} on {order.node} ({order.replica}): {KINDS[order.kind]}"],
        ["detected", _after(course.detect_s, "not")],
        ["served again", _after(course.serve_s, _no_end(course))],
        ["generation", f"{before.generation} → {after.generation}"],
        ["nodes", nodes[0] if nodes[0] == nodes[1] else f"{nodes[0]} → {nodes[1]}"],
        [
            "requests",
            f"{requests.sent} sent, {requests.failed} failed, "
            f"{requests.broken_streams} streams broken{unfinished}; "
            f"the longest took {requests.longest_s:.1f} s",
        ],
    ]
    rows += [["", example] for example in requests.examples]
    if outcome.error:
        rows.append(["error", outcome.error.message])
    return output.table(rows)


def _carry_out(
    paths: FleetPaths, wish: Wish, status: Status, spec: FleetSpec, order: Drill
) -> Outcome:
    if status.endpoint is None:
        raise StateError("has no address", where=status.fleet)
    try:
        key = paths.api_key.read_text(encoding="utf-8").strip()
    except OSError as missing:
        why = f"cannot be read: {missing.strerror}"
        raise StateError(why, where=str(paths.api_key)) from missing
    since = fleets.ensure_driven(paths, wish)
    certificate = spec.gateway.tls.certificate if spec.gateway.tls else ""
    with Steady(status.endpoint, key, spec.name, certificate) as steady:
        if not steady.wait_for_an_answer():
            said = "; ".join(steady.requests.examples) or "no answer"
            raise BackendError(
                f"requests from here are not answered ({said})",
                where=status.endpoint,
                hint="Nothing was done. Run it where the fleet's address can be reached.",
            )
        began_at = time.time()
        wish = wish_drill(paths, wish, order)
        output.say(f"{order.node} is told: {KINDS[order.kind]}")
        course = Course(order.replica, order.generation, began_at)
        course, status, error = _watch(paths, wish, spec, order.kind, course, since)
    return Outcome(course, status, steady.requests, error)


def _watch(
    paths: FleetPaths, wish: Wish, spec: FleetSpec, kind: str, course: Course, since: float
) -> tuple[Course, Status, StatusError | None]:
    """Until it serves again, was given up, or a deadline passed."""
    began = time.monotonic()
    detect_within_s = DETECTED_WITHIN_S[kind]
    serve_within_s = detect_within_s + spec.limits.agents + spec.limits.start + SLACK_S
    with Progress(f"drill {kind}, {course.replica}") as progress:
        for status in fleets.watch(paths, wish, since):
            waited_s = time.monotonic() - began
            if status is None:
                continue
            progress.update(status)
            record = read_record(paths, wish.run)
            replica = record.replicas.get(course.replica) if record else None
            course = followed(course, status, replica.incidents if replica else ())
            its = replica_of(status, course.replica)
            if course.served_at is not None:
                return course, status, None
            if status.finished or (its and its.phase == "failed"):
                return course, status, status.error or _error("failed", "it was given up", 1)
            if course.detected_at is None and waited_s > detect_within_s:
                if kind == "disk":  # it is there to be borne
                    return course, status, None
                late = f"nobody noticed within {detect_within_s:.0f} s"
                return course, status, _error("deadline", late, 4)
            if waited_s > serve_within_s:
                late = f"it does not serve again within {serve_within_s:.0f} s"
                return course, status, _error("deadline", late, 4)
    raise StateError("the run ended without a word", where=str(paths.status))


def _serving(paths: FleetPaths) -> tuple[Wish, Status]:
    """A fleet that is well. Raises UsageError for any other: it has a fault already."""
    wish = read_wish(paths)
    status = freshness.read_status(paths, wish.run) if wish else None
    if wish is None or status is None or not fleets.is_up(paths) or status.phase != "serving":
        phase = status.phase if status else "not there yet"
        raise UsageError(
            f"the fleet is {phase}; a drill needs one that fully serves",
            where=paths.root.name,
            hint="`launcher status` says what it waits for; `launcher up` starts it.",
        )
    return wish, status


def _confirm(
    kind: str, target: ReplicaStatus, node: str, status: Status, spec: FleetSpec, *, yes: bool
) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(
            "a drill is a real fault, and nobody can be asked here",
            where="drill",
            hint="Give --yes.",
        )
    output.say(f"{status.fleet}: {KINDS[kind]} on {node}, a rank of {target.name}")
    if len(status.replicas) == 1:
        output.say("  it is the only replica: requests wait until it serves again")
    if spec.limits.restarts == 0:
        output.say("  limits.restarts is 0: it will not come again by itself")
    typer.confirm("Do it?", abort=True, err=True)


def _named(status: Status, name: str) -> ReplicaStatus:
    return next(one for one in status.replicas if one.name == name)


def _error(code: str, message: str, exit_code: int) -> StatusError:
    return StatusError(code=code, message=message, exit_code=exit_code)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)


def _after(seconds: float | None, otherwise: str) -> str:
    return otherwise if seconds is None else f"after {seconds:.1f} s"


def _no_end(course: Course) -> str:
    return "it served all the time" if course.detected_at is None else "not"
