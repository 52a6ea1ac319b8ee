"""A node is unfit: is it swapped for another one, or is the fleet refused? Pure."""

from inventory.ledger import Cordon, Passed
from launcher import rehearsal
from launcher.documents import Report
from launcher.fitness import Unfit
from launcher.record import Failure, ReplicaRecord, RunRecord
from launcher.snapshot import ReplicaView, Snapshot
from launcher.steps import Context, Fail, Note, Pass, Quarantine, Step, Swap
from launcher.verdicts import replica_phase

SWAPS_MAX = 3


def plan_swap(
    context: Context,
    run: RunRecord,
    replica: ReplicaRecord,
    unfit: Unfit,
    reports: dict[str, Report],
    snapshot: Snapshot,
) -> tuple[list[Step], list[str]]:
    """Quarantine who is to blame and begin again without them; or fail, saying why not."""
    if why := _why_not(context, run, replica, unfit, snapshot):
        return [Fail(replica.name, _refused(unfit, why, snapshot.now))], []
    steps: list[Step] = []
    for node, finding in unfit.blamed.items():
        device = f"{finding.device}: " if finding.device else ""
        cordon = Cordon(
            node=node,
            kind="quarantine",
            reason=f"{device}{finding.message}",
            at=snapshot.now,
            by=f"fleet {context.spec.name}",
            check=finding.check,
            device=finding.device,
            advice=finding.advice,
            boot_id=reports[node].boot_id,
        )
        steps.append(Quarantine(replica.name, cordon))
    names = ", ".join(unfit.blamed)
    story = f"{names} swapped out by preflight: {unfit.message}"
    return [*steps, Swap(replica.name, story)], [f"another node for {names}"]


def plan_rehearsed(
    context: Context,
    run: RunRecord,
    replica: ReplicaRecord,
    view: ReplicaView,
    snapshot: Snapshot,
) -> tuple[list[Step], list[str]] | None:
    """What the collective check says of the nodes; None while it says nothing yet."""
    said = rehearsal.verdict(context, replica, view, snapshot.now)
    if said is None:
        return None
    if isinstance(said, str):
        story = (*replica.story, f"the collective check did not run: {said}")
        return [Note(replica.name, {"rehearses": False, "story": story})], []
    bad = {
        node: finding
        for node, findings in said.findings.items()
        for finding in findings[:1]
        if finding.verdict == "unhealthy"
    }
    reports = {
        node: seen.report
        for node in replica.nodes
        if (seen := view.nodes.get(node)) is not None and seen.report is not None
    }
    if not bad:
        boots = {node: report.boot_id for node, report in reports.items()}
        return [Pass(replica.name, Passed(boots=boots, at=snapshot.now))], []
    node, finding = next(iter(bad.items()))
    if replica_phase(replica, view) == "serving":
        # It serves all the same: what it does is known better than what a check foretold.
        told = f"{node or 'the network'} is doubtful: {finding.message}"
        return [Note(replica.name, {"rehearses": False, "story": (*replica.story, told)})], []
    blamed = {node: finding for node, finding in bad.items() if node in reports}
    where = f"node {node}, check collective" if node else "check collective"
    return plan_swap(context, run, replica, Unfit(blamed, finding, where), reports, snapshot)


def _why_not(
    context: Context, run: RunRecord, replica: ReplicaRecord, unfit: Unfit, snapshot: Snapshot
) -> str:
    """Why no node can be swapped; empty if one can."""
    if not unfit.blamed:
        return "No single node is to blame."
    if context.shares_machine:
        return "This machine plays all nodes."
    if replica.swaps >= SWAPS_MAX:
        return f"{SWAPS_MAX} swaps were tried already."
    if why := snapshot.ledger.brake(unfit.finding.check, len(context.known), snapshot.now):
        return f"No more automatic quarantine: {why}."
    taken = {
        node
        for other in run.replicas.values()
        if other.name != replica.name and not other.released
        for node in other.nodes
    }
    barred = taken | snapshot.ledger.cordons.keys() | unfit.blamed.keys()
    if len(set(context.known) - barred) < context.spec.nodes:
        return "No other node is free to take its place."
    return ""


def _refused(unfit: Unfit, why: str, now: float) -> Failure:
    return Failure(
        code="preflight",
        exit_code=3,
        message=unfit.message,
        where=unfit.where,
        hint=f"{unfit.finding.hint} {why}".strip(),
        at=now,
    )
