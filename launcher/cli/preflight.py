"""`launcher preflight`, `cordon`, `uncordon`: look at nodes, and say which take no work."""

import getpass
import time
from pathlib import Path
from typing import Any

from health.evidence import LEVELS, Level
from health.judge import BY_NAME
from health.report import Finding
from inventory import nodeset
from inventory.ledger import Cordon, Ledger
from inventory.model import Node
from launcher import cordons, preflight
from launcher.cli import output
from launcher.context import make_ground
from launcher.errors import UsageError
from launcher.paths import FleetPaths
from launcher.preflight import Looked
from launcher.spec import FleetSpec
from launcher.specfile import load

UNFIT = 3
COVERAGE_NAMED_MAX = 4


def run(
    file: Path | None,
    flags: dict[str, Any],
    names: list[str],
    *,
    pool: str | None,
    level: str,
    explain: bool,
    record_to: Path | None,
    replay_from: Path | None,
    thresholds: Path | None,
    as_json: bool,
) -> int:
    if level not in LEVELS:
        raise UsageError(
            f"there is no level {level!r}", where="--level", hint=f"Levels: {', '.join(LEVELS)}."
        )
    if thresholds and not replay_from:
        raise UsageError("judges a recording", where="--thresholds", hint="Add --replay DIR.")
    if replay_from:
        looked = preflight.replay(replay_from, preflight.read_thresholds(thresholds))
        lifted: list[str] = []
    else:
        looked, lifted = _look(file, flags, names, level, pool)
    if record_to:
        preflight.record(looked, record_to)
        output.say(f"recorded {len(looked.evidence)} nodes in {record_to}")
    if as_json:
        output.document(_document(looked, lifted))
    else:
        output.show(screen(looked, explain=explain))
        for node in lifted:
            output.say(f"{node}: quarantine lifted")
    return UNFIT if looked.unfit else 0


def cordon(
    file: Path | None, flags: dict[str, Any], names: list[str], reason: str, *, drain: bool
) -> int:
    scope, nodes = _named(file, flags, names)
    if drain and scope != "slurm":
        raise UsageError("is Slurm's; this fleet's backend has none", where="--drain")

    def add(ledger: Ledger) -> Ledger:
        for node in nodes:
            made = Cordon(
                node=node.name, kind="manual", reason=reason, at=time.time(), by=getpass.getuser()
            )
            ledger = ledger.with_cordon(made)
        return ledger

    cordons.change(scope, add)
    output.say(f"{_fold(nodes)} cordoned: {reason}; `launcher uncordon` takes it back")
    if drain:
        from launcher.slurm_tools.drain import drain as drain_in_slurm

        for node in nodes:
            output.say(drain_in_slurm(node.name, reason))
    return 0


def uncordon(
    file: Path | None, flags: dict[str, Any], names: list[str], *, force: bool, as_json: bool
) -> int:
    """Lift cordons: at once with force, else of those nodes that pass a preflight now."""
    scope, nodes = _named(file, flags, names)
    held = cordons.read(scope).cordons
    for node in (node for node in nodes if node.name not in held):
        output.say(f"{node.name} is not cordoned")
    wanted = [node for node in nodes if node.name in held]
    if not wanted:
        return 0
    code = 0
    if not force:
        looked, _ = _look(file, flags, [node.name for node in wanted], "quick")
        unfit = looked.unfit
        if as_json:
            output.document(_document(looked, []))
        else:
            output.show(screen(looked, explain=False))
        wanted = [node for node in wanted if node.name not in unfit and not unfit.get("")]
        code = UNFIT if unfit else 0
    for node in wanted:
        cordons.lift(scope, node.name)
        if scope == "slurm":
            from launcher.slurm_tools.drain import resume

            output.say(resume(node.name) or f"{node.name} was not drained by us in Slurm")
    if wanted:
        output.say(f"{_fold(wanted)} takes work again")
    return code


def _look(
    file: Path | None,
    flags: dict[str, Any],
    names: list[str],
    level: str,
    pool: str | None = None,
) -> tuple[Looked, list[str]]:
    """The looked-at set, and the nodes whose quarantine a passed preflight has lifted."""
    spec = _of_pool(load(file, flags).spec, pool)
    ground = make_ground(spec, FleetPaths.of(spec.name), check=False)
    try:
        nodes = _choose(ground.backend.pool().nodes, names)
        wanted: Level = next(one for one in LEVELS if one == level)
        looked = preflight.look(ground, nodes, wanted)
    finally:
        ground.backend.close()
    lifted = []
    if level != "passive":
        unfit = looked.unfit
        for name, held in cordons.read(ground.backend.kind).cordons.items():
            passed = name in looked.evidence and name not in unfit and "" not in unfit
            if held.kind == "quarantine" and passed:
                cordons.lift(ground.backend.kind, name)
                lifted.append(name)
    return looked, lifted


def _named(
    file: Path | None, flags: dict[str, Any], names: list[str]
) -> tuple[str, tuple[Node, ...]]:
    from launcher.backends import make_backend

    spec = load(file, flags).spec
    backend = make_backend(spec, FleetPaths.of(spec.name))
    try:
        return backend.kind, _choose(backend.pool().nodes, names)
    finally:
        backend.close()


def _of_pool(spec: FleetSpec, pool: str | None) -> FleetSpec:
    """The spec with another pool: a partition under Slurm, a list of the inventory over SSH."""
    if pool is None:
        return spec
    backend = spec.backend
    if backend.slurm is not None:
        changed = backend.slurm.model_copy(update={"partition": pool})
        return spec.model_copy(update={"backend": backend.model_copy(update={"slurm": changed})})
    if backend.ssh is not None:
        chosen = backend.ssh.model_copy(update={"pool": pool, "nodes": None})
        return spec.model_copy(update={"backend": backend.model_copy(update={"ssh": chosen})})
    raise UsageError("this machine is one pool", where="--pool")


def _choose(pool: tuple[Node, ...], names: list[str]) -> tuple[Node, ...]:
    """The nodes of these (folded) names, in their order; the whole pool without names."""
    if not names:
        return pool
    by_name = {node.name: node for node in pool}
    chosen = [name for word in names for name in nodeset.expand(word)]
    missing = [name for name in chosen if name not in by_name]
    if missing:
        raise UsageError(
            f"{nodeset.fold(missing)} is not in the pool",
            where="NODE",
            hint=f"Nodes there: {nodeset.fold(list(by_name))}.",
        )
    return tuple(by_name[name] for name in dict.fromkeys(chosen))


def _fold(nodes: list[Node] | tuple[Node, ...]) -> str:
    return nodeset.fold([node.name for node in nodes])


def screen(looked: Looked, *, explain: bool) -> str:
    """Nodes with the same findings on one line, the odd one out in detail. Pure."""
    groups: dict[tuple[Finding, ...], list[str]] = {}
    for node in looked.facts:
        groups.setdefault(looked.findings(node), []).append(node)
    lines = []
    for findings, nodes in sorted(groups.items(), key=lambda group: len(group[0])):
        verdict = looked.verdict(nodes[0])
        lines.append(f"{nodeset.fold(nodes)}: {verdict}")
        rows = [_row(finding) for finding in findings]
        lines += [output.table(rows, indent="  ")] if rows else []
        for finding in findings:
            if explain or finding.verdict == "unhealthy":
                lines += _reason(finding, nodes[0])
    for odd in looked.odd:
        if not odd.blamed:
            lines.append(f"{nodeset.fold(list(odd.nodes))}: {odd.finding.message}")
            lines.append(f"  {odd.finding.hint}")
    lines += _coverage(looked, explain)
    return "\n".join(lines)


def _row(finding: Finding) -> list[str]:
    advice = "" if finding.advice == "none" else f"→ {finding.advice}"
    return [finding.verdict, finding.device or "-", finding.check, finding.message, advice]


def _reason(finding: Finding, node: str) -> list[str]:
    """Value, threshold, source and the command to repeat it, below the table."""
    check = BY_NAME.get(finding.check)
    device = finding.device.removeprefix("GPU ").partition("/")[0]
    lines = []
    if finding.value or finding.threshold:
        lines.append(f"value {finding.value or '?'}, good: {finding.threshold or '?'}")
    if check:
        lines.append(f"source: {check.source}")
        lines.append(f"repeat on {node}: {check.repeat.format(device=device)}")
    if finding.hint:
        lines.append(finding.hint)
    named = f"{finding.check}{' of ' + finding.device if finding.device else ''}: "
    return [f"    {named if index == 0 else ' ' * 4}{line}" for index, line in enumerate(lines)]


def _coverage(looked: Looked, explain: bool) -> list[str]:
    """What was not looked at, over all nodes: silence would read as health."""
    reasons: dict[tuple[str, str], set[str]] = {}
    for facts in looked.facts.values():
        for one in facts.coverage:
            if one.state != "covered":
                reasons.setdefault((one.state, one.reason), set()).add(one.check)
    lines = []
    for (state, reason), checks in sorted(reasons.items()):
        short = explain or len(checks) <= COVERAGE_NAMED_MAX
        listed = ", ".join(sorted(checks)) if short else f"{len(checks)} checks"
        lines.append(f"{state} ({reason}): {listed}")
    return lines


def _document(looked: Looked, lifted: list[str]) -> dict[str, Any]:
    return {
        "version": 1,
        "level": looked.recorded.level,
        "fit": not looked.unfit,
        "nodes": {
            node: {
                "verdict": looked.verdict(node),
                "findings": [finding.model_dump() for finding in looked.findings(node)],
                "coverage": [one.model_dump() for one in facts.coverage],
                "traits": facts.traits,
                "boot_id": facts.boot_id,
                "taken_at": facts.taken_at,
            }
            for node, facts in looked.facts.items()
        },
        "set": [
            {"nodes": list(odd.nodes), **odd.finding.model_dump()}
            for odd in looked.odd
            if not odd.blamed
        ],
        "quarantine_lifted": lifted,
    }
