"""The screens: a fleet's status, the list of fleets, a plan. Pure: data in, text out."""

from inventory import nodeset
from launcher.cli import weights
from launcher.cli.output import ago, span, table
from launcher.context import Ground
from launcher.figures import Load
from launcher.phases import longest
from launcher.status import ReplicaStatus, Status


def fleet_screen(
    status: Status, now: float, load: Load | None = None, *, with_story: bool = True
) -> str:
    """The screen that people look at most. load: what the replicas do, where that was asked."""
    serving = sum(replica.phase == "serving" for replica in status.replicas)
    head = f"{status.fleet}   {serving}/{len(status.replicas)} replicas serving"
    if status.endpoint:
        head += f"   {status.endpoint}"
    ends = [r.allocation_ends_at for r in status.replicas if r.allocation_ends_at]
    if ends and status.phase in ("serving", "degraded", "starting"):
        head += f"   walltime {span(min(ends) - now)}"
    if status.ends_at and not status.finished:
        head += f"   ends in {span(status.ends_at - now)}"
    lines = [head]
    if status.closed:
        lines.append(f"{'ended' if status.finished else 'ends'} by itself: {status.closed}")
    if status.replicas:
        columns = _load_columns(load)
        rows = [["REPLICA", "GEN", "PHASE", "NODES", *columns, "SINCE"]]
        rows += [
            [*_replica_row(replica, now), *_load_cells(load, replica), ago(replica.since, now)]
            for replica in status.replicas
        ]
        nothing = ["-".rjust(len(column)) for column in columns]
        rows += [
            ["spare", "-", spare.phase, spare.node or "-", *nothing, ago(spare.since, now)]
            for spare in status.spares
            if status.phase != "stopped"
        ]
        lines.append(table(rows))
    if load is not None and load.held:
        many = load.held > 1
        lines.append(f"{load.held} request{'s are' if many else ' is'} held until a replica comes")
    lines += _events(status, now, with_story=with_story)
    if status.error:
        place = f"{status.error.where}: " if status.error.where else ""
        lines.append(f"error: {place}{status.error.message}")
        if status.error.hint:
            lines.append(f"  {status.error.hint}")
    if status.waiting_for:
        lines += [f"waiting for {reason}" for reason in status.waiting_for]
    elif status.phase == "serving":
        lines.append("waiting for nothing")
    elif status.phase in ("stopped", "failed") and status.finished:
        lines.append(f"{status.phase}; `launcher up` starts it again")
    return "\n".join(lines)


def _load_columns(load: Load | None) -> list[str]:
    if load is None:
        return []
    return ["TOK/S", "RUN/WAIT"] if load.metered else ["RUN/WAIT"]


def _load_cells(load: Load | None, replica: ReplicaStatus) -> list[str]:
    """Right-aligned, for figures are compared by their lengths."""
    if load is None:
        return []
    its = load.of(replica.name)
    run, wait = ("-" if n is None else str(n) for n in (its.running, its.waiting))
    both = f"{run}/{wait}" if (run, wait) != ("-", "-") else "-"
    rate = "-" if its.tokens_per_s is None else f"{its.tokens_per_s:.0f}"
    return [rate.rjust(5), both.rjust(8)] if load.metered else [both.rjust(8)]


def _events(status: Status, now: float, *, with_story: bool = True) -> list[str]:
    """What happened to nodes: who was lost, swapped, cordoned, and whose health is in doubt."""
    lines = []
    doubtful: dict[str, list[str]] = {}
    for replica in status.replicas:
        for node in replica.nodes:
            if node.phase == "lost":
                lines.append(f"lost {node.node} ({replica.name}) {ago(node.lost_since, now)} ago")
            for doubt in node.doubts if status.phase != "stopped" else ():
                doubtful.setdefault(doubt, []).append(node.node)
        lines += [f"{replica.name}: {event}" for event in replica.story if with_story]
    for spare in status.spares:
        for doubt in spare.doubts if status.phase != "stopped" else ():
            doubtful.setdefault(doubt, []).append(spare.node or spare.name)
    lines += [*_parked(status), *weights.lines(status)]
    lines += [f"doubtful {nodeset.fold(names)}: {doubt}" for doubt, names in doubtful.items()]
    for held in status.cordoned:
        word = "quarantined" if held.kind == "quarantine" else "cordoned"
        lines.append(f"cordoned {held.node}: {held.reason} ({word} {ago(held.at, now)} ago)")
    return lines


def _parked(status: Status) -> list[str]:
    """Which nodes have an engine process ready for the next start, and why others have none."""
    if status.phase == "stopped":
        return []
    nodes = [(node.node, node.parked) for one in status.replicas for node in one.nodes]
    nodes += [(spare.node, spare.parked) for spare in status.spares if spare.node]
    told: dict[tuple[str, str], list[str]] = {}
    for name, parked in nodes:
        if parked and parked.state == "none" and parked.reason:
            told.setdefault(("nothing parked on", f": {parked.reason}"), []).append(name)
        elif parked and parked.state != "none":
            words = "parked on" if parked.state == "ready" else "parking on"
            told.setdefault((words, ""), []).append(name)
    return [f"{words} {nodeset.fold(names)}{why}" for (words, why), names in sorted(told.items())]


def timing_lines(status: Status) -> str:
    """After how long the last replica had its first token, and what that time went into."""
    last = max(status.replicas, key=_first_token_s)
    took = _seconds(longest(last.phases, beside=False))
    also = _seconds(longest(last.phases, beside=True))
    return f"first token after {_first_token_s(last):.0f} s\nphases: {took}" + (
        f"; beside them: {also}" if also else ""
    )


def _seconds(phases: dict[str, float]) -> str:
    told = (f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in phases.items())
    return ", ".join(told)


def _first_token_s(replica: ReplicaStatus) -> float:
    tokens = [one for one in replica.phases if one.name == "first_token"]
    return max((one.began_s + (one.took_s or 0.0) for one in tokens), default=0.0)


def fleets_screen(statuses: list[Status], now: float) -> str:
    if not statuses:
        return "no fleets; `launcher up` makes one"
    rows = [["FLEET", "PHASE", "BACKEND", "REPLICAS", "MODEL", "ENDPOINT", "SEEN"]]
    for status in statuses:
        serving = sum(replica.phase == "serving" for replica in status.replicas)
        rows.append(
            [
                status.fleet,
                status.phase,
                status.backend,
                f"{serving}/{len(status.replicas)}",
                status.model,
                (status.endpoint or "-") if status.phase in ("serving", "degraded") else "-",
                f"{ago(status.updated_at, now)} ago",
            ]
        )
    return table(rows)


def plan_screen(ground: Ground) -> str:
    """The layout that `up` would use, and where each value came from."""
    spec, layout = ground.spec, ground.context.layout
    nodes = nodeset.fold(ground.context.pool) if ground.context.pool else "chosen by Slurm"
    size = f"{spec.nodes} node{'s' if spec.nodes > 1 else ''}"
    rows = [
        ["fleet", spec.name],
        ["model", spec.model],
        ["backend", f"{ground.backend.kind} ({nodes})"],
        [
            "replicas",
            f"{spec.replicas} of {size}{_and_spares(spec.spares)}, "
            f"{ground.context.gpus_per_node} GPU(s) per node",
        ],
        [
            "layout",
            f"tensor {layout.tensor} × pipeline {layout.pipeline} × data {layout.data}, "
            f"{layout.ranks_per_node} rank(s) on each node, executor {layout.executor}",
        ],
    ]
    rows += [["", f"because: {reason}"] for reason in layout.reasons]
    return table(rows)


def _and_spares(spares: int) -> str:
    return f" and {spares} spare{'s' if spares > 1 else ''}" if spares else ""


def progress_line(status: Status) -> str:
    """One line that changes when something happens, for logs and pipes."""
    parts = []
    for replica in status.replicas:
        by_phase: dict[str, list[str]] = {}
        for node in replica.nodes:
            by_phase.setdefault(node.phase, []).append(node.node)
        nodes = ", ".join(f"{nodeset.fold(names)} {phase}" for phase, names in by_phase.items())
        parts.append(f"{replica.name} {replica.phase}" + (f" ({nodes})" if nodes else ""))
    waits = f"; waiting for {'; '.join(status.waiting_for)}" if status.waiting_for else ""
    return " · ".join(parts or [status.phase]) + waits


def _replica_row(replica: ReplicaStatus, now: float) -> list[str]:
    names = [node.node for node in replica.nodes]
    phase = replica.phase
    if replica.expected_start and phase == "pending":
        phase += f" (starts in {span(replica.expected_start - now)}?)"
    return [
        replica.name,
        str(replica.generation or "-"),
        phase,
        nodeset.fold(names) if names else "-",
    ]
