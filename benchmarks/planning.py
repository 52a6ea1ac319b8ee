"""One planning round over a large fleet: `python benchmarks/planning.py [--json]`.

1,000 replicas of 10 nodes, by SSH (where we choose the nodes) and by Slurm, each in three
situations: everything serves; a tenth of the nodes was lost at once; nothing is there yet. Planner
and linter are measured, the snapshot is made beforehand. The bound is one second.
"""

import os
import platform
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import options, show
from launcher.check import lint
from launcher.documents import Assignment, MemberReport
from launcher.planning import make_plan, new_record
from launcher.record import AllocationRecord, RunRecord, Seat
from launcher.snapshot import AllocationView, NodeView, Snapshot
from launcher.steps import Context
from tests.launcher.worlds import NOW, make_context, report

REPLICAS, SIZE, SPARES = 1000, 10, 100
BOUND_S = 1.0


def main() -> None:
    as_json = options(__doc__).parse_args().json
    rows = []
    for kind in ("ssh", "slurm"):
        context = fleet(kind)
        nothing = new_record(context, 1, None, NOW)
        rows.append(
            measure(kind, "nothing is there yet", context, nothing, Snapshot(NOW, "up", {}))
        )
        record, seen = serving(context)
        rows.append(measure(kind, "everything serves", context, record, seen))
        rows.append(measure(kind, "a tenth was lost", context, record, without_a_tenth(seen)))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    found = {"rows": rows, "bound_s": BOUND_S, "peak_mib": round(peak_mib), "machine": machine}
    told = [
        f"{REPLICAS} replicas of {SIZE} nodes and {SPARES} spares; {machine}",
        *(
            f"  {row['backend']:6} {row['situation']:22} {row['seconds']:6.3f} s "
            f"({row['ratio']:.2f} of the bound), {row['steps']} steps"
            for row in rows
        ),
        f"  peak memory {peak_mib:.0f} MiB, with record and snapshot",
    ]
    show({"version": 1, **found}, "\n".join(told), as_json=as_json)


def measure(
    kind: str, situation: str, context: Context, record: RunRecord, seen: Snapshot
) -> dict[str, object]:
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        plan = make_plan(context, record, seen)
        problems = lint(context, record, plan, seen)
        best = min(best, time.perf_counter() - began)
    assert not problems, problems[:3]
    return {
        "backend": kind,
        "situation": situation,
        "seconds": round(best, 3),
        "ratio": round(best / BOUND_S, 3),
        "steps": len(plan.steps),
    }


def fleet(kind: str) -> Context:
    names = tuple(f"h{number}" for number in range(1, REPLICAS * SIZE + SPARES + 1))
    context = make_context(
        pool=names if kind == "ssh" else (),
        replicas=REPLICAS,
        nodes=SIZE,
        spares=SPARES,
        parallelism={"pipeline": SIZE},
        backend={"ssh": {"inventory": "x"}} if kind == "ssh" else {"slurm": {}},
    )
    return replace(context, known=names)


def serving(context: Context) -> tuple[RunRecord, Snapshot]:
    """Every replica serves in an allocation of its own; the spares are warm."""
    record = new_record(context, 1, None, NOW)
    names = iter(context.known)
    allocations, views, replicas = {}, {}, {}
    for replica in record.replicas.values():
        nodes = tuple(next(names) for _ in range(SIZE))
        held, view = holding(f"{replica.name}.a1", nodes, replica.name)
        allocations[held.name], views[held.name] = held, view
        seats = tuple(Seat(node=node, allocation=held.name) for node in nodes)
        changes = {"seats": seats, "generation": 1, "served": True, "requested_at": NOW}
        times = {"running_at": NOW, "ranked_at": NOW, "serving_at": NOW}
        replicas[replica.name] = replica.model_copy(update={**changes, **times})
    for number in range(1, SPARES + 1):
        held, view = holding(f"s{number}.a1", (next(names),), "")
        allocations[held.name], views[held.name] = held, view
    changed = record.model_copy(update={"replicas": replicas, "allocations": allocations})
    return changed, Snapshot(NOW, "up", views)


def holding(
    name: str, nodes: tuple[str, ...], replica: str
) -> tuple[AllocationRecord, AllocationView]:
    order = Assignment(revision=1, goal="rank" if replica else "idle")
    held = AllocationRecord(
        name=name,
        owner=name.partition(".")[0],
        number=1,
        size=len(nodes),
        nodes=nodes,
        requested_at=NOW,
        asked=True,
        running_at=NOW,
        assignments=dict.fromkeys(nodes, order),
    )
    agents = {}
    for rank, node in enumerate(nodes):
        token = NOW if rank == 0 else None
        member = MemberReport(
            replica=replica,
            generation=1,
            rank=rank,
            endpoint="http://x:1/v1",
            first_token_at=token,
        )
        said = report(node, "serving" if replica else "warm", member=member if replica else None)
        agents[node] = NodeView(node, said, heartbeat_silent_s=0.5, beat_silent_s=1.0)
    return held, AllocationView("running", name, nodes, agents=agents)


def without_a_tenth(seen: Snapshot) -> Snapshot:
    """The last node of every replica is silent."""
    views = {}
    for name, view in seen.allocations.items():
        agents = dict(view.agents)
        if len(agents) > 1:
            last = list(agents)[-1]
            agents[last] = replace(agents[last], heartbeat_silent_s=60.0, beat_silent_s=60.0)
        views[name] = replace(view, agents=agents)
    return replace(seen, allocations=views)


if __name__ == "__main__":
    main()
