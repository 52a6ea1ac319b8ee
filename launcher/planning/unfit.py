"""A node is unfit: is it swapped for another one, or is the fleet refused? Pure."""

from health.report import Finding
from inventory.ledger import Passed
from launcher import rehearsal
from launcher.documents import Report
from launcher.fitness import Unfit
from launcher.planning.draft import Draft, agent_views
from launcher.record import Failure, ReplicaRecord
from launcher.steps import End, Fail, Note, Pass, Sit
from launcher.verdicts import replica_phase

SWAPS_MAX = 3
LOST_CHECK = "node.lost"


def swap(draft: Draft, replica: ReplicaRecord, unfit: Unfit, reports: dict[str, Report]) -> None:
    """Quarantine who is to blame and take another in its place; or fail, saying why not."""
    if why := _why_not(draft, replica, unfit):
        draft.do(Fail(replica.name, _refused(unfit, why, draft.now)))
        return
    for node, finding in unfit.blamed.items():
        draft.quarantine(replica.name, node, finding, reports[node].boot_id)
    names = ", ".join(unfit.blamed)
    story = f"{names} swapped out by preflight: {unfit.message}"
    draft.wait(replica.name, f"another node for {names}")
    if replica.ranked_at is not None:
        # Engines are starting already: they end first; a cordoned node has no seat afterwards.
        changes = {
            "swaps": replica.swaps + 1,
            "stopping_at": draft.now,
            "story": replica.told(story),
        }
        draft.do(Note(replica.name, changes))
        return
    kept = tuple(seat for seat in replica.seats if seat.node not in unfit.blamed)
    if not draft.context.pool and not replica.served:
        # Nothing is lost yet by a clean start: one job on good nodes is worth more than two.
        for name in dict.fromkeys(seat.allocation for seat in replica.seats):
            draft.do(End(replica.name, name, story))
        kept = ()
    draft.do(Sit(replica.name, kept, story))
    changes = {"swaps": replica.swaps + 1, "story": replica.told(story)}
    draft.do(Note(replica.name, changes))


def rehearsed(draft: Draft, replica: ReplicaRecord) -> bool:
    """What the collective check says of the nodes; False while it says nothing yet."""
    said = rehearsal.verdict(draft.context, replica, agent_views(draft, replica), draft.now)
    if said is None:
        return False
    if isinstance(said, str):
        story = replica.told(f"the collective check did not run: {said}")
        draft.do(Note(replica.name, {"rehearses": False, "story": story}))
        return True
    bad = {
        node: finding
        for node, findings in said.findings.items()
        for finding in findings[:1]
        if finding.verdict == "unhealthy"
    }
    reports = {
        node: seen.report
        for node, seen in agent_views(draft, replica).items()
        if seen.report is not None
    }
    if not bad:
        boots = {node: report.boot_id for node, report in reports.items()}
        draft.do(Pass(replica.name, Passed(boots=boots, at=draft.now)))
        return True
    node, finding = next(iter(bad.items()))
    if replica_phase(replica, draft.snapshot) == "serving":
        # It serves all the same: what it does is known better than what a check foretold.
        told = f"{node or 'the network'} is doubtful: {finding.message}"
        draft.do(Note(replica.name, {"rehearses": False, "story": replica.told(told)}))
        return True
    blamed = {node: finding for node, finding in bad.items() if node in reports}
    where = f"node {node}, check collective" if node else "check collective"
    swap(draft, replica, Unfit(blamed, finding, where), reports)
    return True


def lost_too_often(draft: Draft, replica: ReplicaRecord, node: str) -> None:
    """A node that is lost again and again is kept out until somebody has looked at it."""
    if draft.brake(LOST_CHECK, [node]):
        return
    finding = Finding(
        check=LOST_CHECK,
        verdict="unhealthy",
        message="it was lost again within an hour",
    )
    draft.quarantine(replica.name, node, finding)


def _why_not(draft: Draft, replica: ReplicaRecord, unfit: Unfit) -> str:
    """Why no node can be swapped; empty if one can."""
    context, ledger = draft.context, draft.snapshot.ledger
    if not unfit.blamed:
        return "No single node is to blame."
    if context.shares_machine:
        return "This machine plays all nodes."
    if replica.swaps >= SWAPS_MAX:
        return f"{SWAPS_MAX} swaps were tried already."
    if why := _brake(draft, unfit):
        return f"No more automatic quarantine: {why}."
    taken = {seat.node for seat, owner in draft.sitting.items() if owner.name != replica.name}
    barred = taken | ledger.cordons.keys() | unfit.blamed.keys()
    if len(set(context.known) - barred) < context.spec.nodes and not replica.served:
        return "No other node is free to take its place."
    return ""


def _brake(draft: Draft, unfit: Unfit) -> str:
    by_check: dict[str, list[str]] = {}
    for node, finding in unfit.blamed.items():
        by_check.setdefault(finding.check, []).append(node)
    whys = (draft.brake(check, nodes) for check, nodes in by_check.items())
    return next((why for why in whys if why), "")


def _refused(unfit: Unfit, why: str, now: float) -> Failure:
    return Failure(
        code="preflight",
        exit_code=3,
        message=unfit.message,
        where=unfit.where,
        hint=f"{unfit.finding.hint} {why}".strip(),
        at=now,
    )
