"""Commands that change nothing: plan, render, status, ls, nodes."""

import time
from pathlib import Path
from typing import Any

from inventory import nodeset
from launcher import controller_job, cordons, fleets, freshness
from launcher.apply import remember
from launcher.cli import output, screens, top
from launcher.context import Ground, make_ground
from launcher.files import make_private, write_text
from launcher.paths import FleetPaths
from launcher.planning import make_plan, new_record
from launcher.record import AllocationRecord
from launcher.snapshot import Snapshot
from launcher.specfile import check_model_folder, load
from launcher.wish import is_driven, next_run, read_record, read_wish


def plan(file: Path | None, flags: dict[str, Any], *, as_json: bool) -> int:
    ground = _ground(file, flags)
    layout = ground.context.layout
    if as_json:
        output.document(
            {
                "version": 1,
                "fleet": ground.spec.name,
                "backend": ground.backend.kind,
                "pool": list(ground.context.pool),
                "nodes": ground.spec.nodes,
                "replicas": ground.spec.replicas,
                "gpus_per_node": ground.context.gpus_per_node,
                "layout": {
                    "tensor": layout.tensor,
                    "pipeline": layout.pipeline,
                    "data": layout.data,
                    "ranks_per_node": layout.ranks_per_node,
                    "executor": layout.executor,
                    "reasons": list(layout.reasons),
                },
                "spec": ground.spec.model_dump(mode="json"),
            }
        )
    else:
        output.show(screens.plan_screen(ground))
    return 0


def render(file: Path | None, flags: dict[str, Any], *, out: Path | None, as_json: bool) -> int:
    """The scripts of every replica's allocation: the running one's, or those that come next."""
    ground = _ground(file, flags)
    found = _allocations(ground)
    scripts = {
        f"{held.name}/{name}": text
        for held, run in found
        for name, text in ground.rendered(run, held).items()
    }
    if (job := ground.spec.controller_job) is not None:
        run = found[0][1] if found else next_run(ground.paths)
        text = controller_job.script_of(ground.spec, job, ground.paths, run)
        scripts[controller_job.SCRIPT] = text
    if out is not None:
        for name, text in scripts.items():
            make_private((out / name).parent)
            write_text(out / name, text, mode=0o700)
        output.say(f"wrote {len(scripts)} files below {out}")
    if as_json:
        output.document({"version": 1, "fleet": ground.spec.name, "files": scripts})
    elif out is None:
        for name, text in scripts.items():
            output.show(f"==> {name} <==\n{text}")
    return 0


def status(paths: FleetPaths, *, as_json: bool) -> int:
    current = freshness.known_status(paths)
    if as_json:
        output.document(current.model_dump(mode="json"))
    else:
        load = None if current.finished else top.load_of(paths, current)
        output.show(screens.fleet_screen(current, time.time(), load))
    return current.exit_code


def ls(*, as_json: bool) -> int:
    found = [one for paths in fleets.all_fleets() if (one := freshness.current_status(paths))]
    if as_json:
        output.document({"version": 1, "fleets": [one.model_dump(mode="json") for one in found]})
    else:
        output.show(screens.fleets_screen(found, time.time()))
    return 0


def nodes(file: Path | None, flags: dict[str, Any], *, as_json: bool) -> int:
    from launcher.backends import make_backend

    spec = load(file, {"model": "unknown/unknown", **flags} if file is None else flags).spec
    backend = make_backend(spec, FleetPaths.of(spec.name))
    try:
        pool = backend.pool()
    finally:
        backend.close()
    held = cordons.read(backend.kind).cordons
    if as_json:
        told = {name: cordon.model_dump() for name, cordon in held.items()}
        output.document({"version": 1, "pool": pool.model_dump(mode="json"), "cordons": told})
        return 0
    groups: dict[tuple[str, ...], list[str]] = {}
    for node in pool.nodes:
        gpus = f"{node.gpus} × {node.gpu_type}" if node.gpu_type else str(node.gpus)
        barred = held.get(node.name)
        state = f"{node.state}, cordoned" if barred else node.state
        reason = barred.reason if barred else node.state_reason or "-"
        key = (state, gpus, node.switch or node.rack or "-", reason)
        groups.setdefault(key, []).append(node.name)
    rows = [["NODES", "STATE", "GPUS", "SWITCH", "REASON"]]
    rows += [[nodeset.fold(names), *key] for key, names in groups.items()]
    output.show(f"{pool.name}: {len(pool.nodes)} nodes")
    output.show(output.table(rows))
    return 0


def _ground(file: Path | None, flags: dict[str, Any]) -> Ground:
    spec = load(file, flags).spec
    check_model_folder(spec)
    ground = make_ground(spec, FleetPaths.of(spec.name), check=False)
    ground.backend.close()
    return ground


def _allocations(ground: Ground) -> list[tuple[AllocationRecord, int]]:
    """The allocations of the running run, else those that the planner would ask for first."""
    paths = ground.paths
    wish = read_wish(paths)
    if wish and wish.desired == "up" and is_driven(paths):
        record = read_record(paths, wish.run)
        if record is not None:
            return [(held, wish.run) for held in record.allocations.values() if not held.released]
    run = next_run(paths)
    record = new_record(ground.context, run, read_record(paths, run - 1), 0.0)
    first = make_plan(ground.context, record, Snapshot(now=0.0, desired="up", allocations={}))
    for step in first.steps:
        record = remember(record, step, 0.0)
    return [(held, run) for held in record.allocations.values()]
