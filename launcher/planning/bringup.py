"""From seated agents to a serving replica: preflight, addresses, ranks, the token. Pure."""

from inventory import nodeset
from launcher import addresses, ports, rehearsal, render
from launcher.attribution import back_off_s
from launcher.documents import Assignment, Member, Peer, Report
from launcher.fitness import judge_set
from launcher.planning.draft import Draft, agent_views
from launcher.planning.holdings import checks
from launcher.planning.unfit import rehearsed, swap
from launcher.record import Failure, ReplicaRecord, Seat
from launcher.steps import Assign, Fail, Note, Sit
from launcher.verdicts import replica_phase


def bring_up(draft: Draft, replica: ReplicaRecord) -> None:
    """Agents up → each told its peers and checks → facts good → ranks."""
    now = draft.now
    if replica.running_at is None:
        draft.do(Note(replica.name, {"running_at": now}))
        draft.wait(replica.name, "agents")
        return
    reports = _reports(draft, replica)
    if missing := [seat for seat in replica.seats if seat.node not in reports]:
        _await_agents(draft, replica, missing)
        return
    if replica.agents_at is None:
        draft.do(Note(replica.name, {"agents_at": now}))
    peers = {seat: _peers(replica, seat, reports) for seat in replica.seats}
    if untold := [seat for seat in replica.seats if not _is_told(draft, seat, peers[seat])]:
        draft.do(*(_look_at(draft, replica, seat, reports, peers[seat]) for seat in untold))
        draft.wait(replica.name, "preflight")
        return
    if _again_elsewhere(draft, replica, reports, peers):
        draft.wait(replica.name, "another port block")
        return
    if waiting := [s.node for s in replica.seats if not _has_looked(draft, s, reports[s.node])]:
        draft.wait(replica.name, f"preflight on {', '.join(waiting)}")
        return
    facts = {node: report.facts for node, report in reports.items() if report.facts}
    began = {s.node: draft.record.allocations[s.allocation].requested_at for s in replica.seats}
    if found := judge_set(facts, began, now):
        swap(draft, replica, found, reports)
        return
    chosen = _addresses(draft, replica, reports)
    if chosen is None:
        return
    asked = draft.snapshot.restarts.get(replica.name, replica.restarts_asked)
    if asked <= replica.restarts_asked and (wait_s := back_off_s(replica, now)):
        draft.wait(replica.name, f"the next try in {wait_s:.0f} s")
        return
    # A replica that must come back is not kept waiting: what it served over is known to work.
    rehearses = not replica.served and rehearsal.wanted(
        draft.context, replica, reports, draft.snapshot
    )
    changes = {
        "ranked_at": now,
        "generation": replica.generation + 1,
        "rehearses": rehearses,
        # Whoever asked for a restart until now gets it by this generation.
        "restarts_asked": asked,
    }
    draft.do(*_rank(draft, replica, reports, chosen, rehearses=rehearses))
    draft.do(Note(replica.name, changes))
    draft.wait(replica.name, "the engine")


def watch(draft: Draft, replica: ReplicaRecord) -> None:
    """Until the token, and after it: say what is waited for, keep the deadline."""
    if replica.rehearses and rehearsed(draft, replica):
        return
    now = draft.now
    if replica_phase(replica, draft.snapshot) == "serving":
        if not replica.serving_at:
            changes = {"serving_at": now, "served": True, "story": _back(replica, now)}
            draft.do(Note(replica.name, changes))
        return
    leader = draft.snapshot.agent(replica.seats[0]).report
    waited_for = leader.member.waiting_for if leader and leader.member else ""
    limit = draft.context.spec.limits.start + 30  # the leader's own deadline comes first
    if now - (replica.ranked_at or now) > limit and replica.serving_at is None:
        failure = Failure(
            code="deadline",
            exit_code=4,
            message=f"not serving within {limit} s; waited for {waited_for or 'the engine'}",
            where=replica.name,
            hint="Raise limits.start; `launcher logs` shows how far it came.",
            at=now,
        )
        draft.do(Fail(replica.name, failure))
        return
    if replica.serving_at is None:
        draft.wait(replica.name, waited_for or "the engine")


def _back(replica: ReplicaRecord, now: float) -> tuple[str, ...]:
    """The story, with how long it took to serve again."""
    last = replica.incidents[-1] if replica.incidents else None
    if not replica.served or last is None:
        return replica.story
    nodes = nodeset.fold(replica.nodes)
    return replica.told(f"serves again on {nodes}, {now - last.at:.1f} s after")


def _reports(draft: Draft, replica: ReplicaRecord) -> dict[str, Report]:
    return {
        node: seen.report
        for node, seen in agent_views(draft, replica).items()
        if seen.report is not None
    }


def _await_agents(draft: Draft, replica: ReplicaRecord, missing: list[Seat]) -> None:
    now, limit = draft.now, draft.context.spec.limits.agents
    names = ", ".join(seat.node for seat in missing)
    began = [draft.record.allocations[s.allocation].running_at or now for s in missing]
    if now - min(began) <= limit:
        draft.wait(replica.name, f"the agent on {names}")
        return
    if replica.served:  # it goes on with other nodes
        kept = tuple(seat for seat in replica.seats if seat not in missing)
        draft.do(Sit(replica.name, kept, f"no agent came up on {names}"))
        return
    problems = "; ".join(
        f"{seat.node}: {problem}"
        for seat in missing
        if (problem := draft.snapshot.agent(seat).problem)
    )
    failure = Failure(
        code="deadline",
        exit_code=4,
        message=f"no agent reported from {names} within {limit} s"
        + (f" ({problems})" if problems else ""),
        where=replica.name,
        hint="See agent.log in the run folder; is launcher installed on the nodes?",
        at=now,
    )
    draft.do(Fail(replica.name, failure))


def _peers(replica: ReplicaRecord, seat: Seat, reports: dict[str, Report]) -> tuple[Peer, ...]:
    return tuple(
        Peer(
            node=other,
            port=reports[other].heartbeat_port,
            addresses=tuple(address.ip for address in reports[other].addresses),
        )
        for other in replica.nodes
        if other != seat.node
    )


def _is_told(draft: Draft, seat: Seat, peers: tuple[Peer, ...]) -> bool:
    order = draft.record.order(seat)
    return order is not None and order.goal == "idle" and order.peers == peers


def _look_at(
    draft: Draft,
    replica: ReplicaRecord,
    seat: Seat,
    reports: dict[str, Report],
    peers: tuple[Peer, ...],
) -> Assign:
    """Look at yourself, unless you did and have been watched since; and at who hears you."""
    report = reports[seat.node]
    watched = report.facts is not None and not report.facts.unfit
    rank = replica.seats.index(seat)
    wanted = None
    if not watched:
        block = ports.block(replica.slot + _offset(draft, rank))
        own_ports = ports.to_check(block, leader=rank == 0)
        wanted = checks(draft.context, seat.node, own_ports)
    assignment = Assignment(
        revision=draft.record.revision(seat) + 1,
        goal="idle",
        checks=wanted,
        peers=peers,
        park=draft.context.park,
    )
    return Assign(replica.name, seat, assignment)


def _has_looked(draft: Draft, seat: Seat, report: Report) -> bool:
    order = draft.record.order(seat)
    if order is None or report.assignment_revision < order.revision or report.facts is None:
        return False
    is_idle = report.phase in ("idle", "warm")  # an engine that is still there must end first
    return is_idle and (order.checks is None or report.checks_for == order.revision)


def _again_elsewhere(
    draft: Draft,
    replica: ReplicaRecord,
    reports: dict[str, Report],
    peers: dict[Seat, tuple[Peer, ...]],
) -> bool:
    """A busy port is no fault of the node: try the next block, some times."""
    if replica.slots_tried >= ports.SLOTS // 4:
        return False
    for seat in replica.seats:
        facts = reports[seat.node].facts
        current = reports[seat.node].checks_for == draft.record.revision(seat)
        if current and facts and any(f.check == "host.ports" for f in facts.unfit):
            step = draft.context.spec.nodes if draft.context.shares_machine else 1
            moved = replica.model_copy(update={"slot": (replica.slot + step) % ports.SLOTS})
            changes = {"slot": moved.slot, "slots_tried": replica.slots_tried + 1}
            draft.do(Note(replica.name, changes))
            unlooked = {node: r.model_copy(update={"facts": None}) for node, r in reports.items()}
            draft.do(*(_look_at(draft, moved, s, unlooked, peers[s]) for s in replica.seats))
            return True
    return False


def _addresses(
    draft: Draft, replica: ReplicaRecord, reports: dict[str, Report]
) -> dict[str, addresses.Choice] | None:
    """One address for each node; None while, or because, no network joins them."""
    chosen = addresses.choose(
        draft.context.spec.interface,
        {node: reports[node].addresses for node in replica.nodes},
        {node: reports[node].reach for node in replica.nodes},
        {node: view.answers_at for node, view in agent_views(draft, replica).items()},
    )
    if not isinstance(chosen, addresses.NoPath):
        return chosen
    asked_at = replica.running_at or draft.now
    if not chosen.is_final and draft.now - asked_at <= draft.context.spec.limits.agents:
        draft.wait(replica.name, "the nodes to hear each other over the network")
        return None
    if (
        replica.served and len(replica.seats) > 1
    ):  # it goes on with another in the last one's place
        draft.do(Sit(replica.name, replica.seats[:-1], chosen.message))
        return None
    failure = Failure(
        code="preflight",
        exit_code=3,
        message=chosen.message,
        where=replica.name,
        hint="Write `interface:` with the name of the network between the nodes.",
        at=draft.now,
    )
    draft.do(Fail(replica.name, failure))
    return None


def _rank(
    draft: Draft,
    replica: ReplicaRecord,
    reports: dict[str, Report],
    chosen: dict[str, addresses.Choice],
    *,
    rehearses: bool,
) -> list[Assign]:
    context = draft.context
    steps = []
    leader = replica.nodes[0]
    leader_ports = ports.block(replica.slot)
    shown = {}
    if rehearses:
        shown = rehearsal.rehearsals(context, replica, chosen, leader_ports["collective"])
    raylets = tuple(
        (chosen[node].ip, ports.block(replica.slot + _offset(draft, rank))["node_manager"])
        for rank, node in enumerate(replica.nodes)
        if rank
    )
    for rank, seat in enumerate(replica.seats):
        guard = ports.block(replica.slot + _offset(draft, rank))["guard"]
        others = [leader, *replica.nodes] if rank else list(replica.nodes)
        peers = tuple(
            Peer(node=other, port=reports[other].heartbeat_port, addresses=(chosen[other].ip,))
            for other in dict.fromkeys(others)
            if other != seat.node
        )
        member = Member(
            replica=replica.name,
            generation=replica.generation + 1,
            rank=rank,
            size=len(replica.seats),
            address=chosen[seat.node].ip,
            interface=chosen[seat.node].interface,
            leader_address=chosen[leader].ip,
            ports=leader_ports,
            commands=render.commands_of(
                rank, context.layout, leader_ports, context.scripts, raylets
            ),
            ranks_per_node=context.layout.ranks_per_node,
            secret_environment=context.secret_names,
            served_model=context.spec.name,
            start_timeout_s=context.spec.limits.start,
            peers=peers,
            guard_port=guard,
            rehearsal=shown.get(seat.node),
        )
        revision = draft.record.revision(seat) + 1
        assignment = Assignment(revision=revision, goal="rank", member=member, park=context.park)
        steps.append(Assign(replica.name, seat, assignment))
    return steps


def _offset(draft: Draft, rank: int) -> int:
    return rank if draft.context.shares_machine else 0
