"""From record and snapshot to the gateway's orders: who takes traffic, who is dead. Pure.

A replica takes traffic once a token of it was seen, loses it before anything of it is stopped, and
frees its requests when it is dead. What cannot be seen now stays as it was ordered last.
"""

from dataclasses import dataclass

from inventory import nodeset
from launcher.gateway.documents import Member, MemberGoal, Orders, State
from launcher.gateway.members import in_flight, with_slots
from launcher.record import ReplicaRecord, RunRecord
from launcher.snapshot import NOTHING, Snapshot
from launcher.verdicts import endpoint_of, node_phase, replica_phase


@dataclass(frozen=True)
class Backup:
    """The fallback of a fleet: any OpenAI-compatible place, and what the model is called there."""

    url: str
    model: str
    key_file: str = ""


def name_of(replica: ReplicaRecord) -> str:
    """A member is a replica in one generation: what fails in one says nothing about the next."""
    return f"{replica.name}.g{replica.generation}"


def orders(
    record: RunRecord,
    snapshot: Snapshot,
    before: Orders,
    engine_key_file: str,
    backup: Backup | None,
) -> Orders:
    """What the gateway shall do now. before: the orders that count, for what cannot be seen."""
    held = {member.name: member for member in before.members}
    members = []
    for replica in record.replicas.values():
        member = _member(replica, snapshot, held.get(name_of(replica)), engine_key_file)
        if member is not None:
            members.append(member)
    if backup is not None:
        members.append(
            Member(
                name="fallback",
                slot=0,
                url=backup.url.rstrip("/").removesuffix("/v1"),
                fallback=True,
                model=backup.model,
                key_file=backup.key_file,
                where="fallback",
            )
        )
    return Orders(
        revision=before.revision,
        members=with_slots(before.members, members),
        expects=snapshot.desired == "up"
        and any(_is_coming(one, snapshot) for one in record.replicas.values()),
        open=snapshot.desired == "up",
    )


def _member(
    replica: ReplicaRecord, snapshot: Snapshot, held: Member | None, key_file: str
) -> Member | None:
    if replica.over or not replica.generation:
        return None
    if replica_phase(replica, snapshot) == "serving":
        url = endpoint_of(replica, snapshot)
        if url is None:
            return held
        leader = snapshot.allocations.get(replica.seats[0].allocation, NOTHING)
        return Member(
            name=name_of(replica),
            slot=0,
            url=url.removesuffix("/v1"),
            key_file=key_file,
            where=", ".join(
                part for part in (leader.identity, nodeset.fold(replica.nodes)) if part
            ),
        )
    if held is None:
        return None
    return held.model_copy(update={"goal": _goal(replica, snapshot, held.goal)})


def _goal(replica: ReplicaRecord, snapshot: Snapshot, before: MemberGoal) -> MemberGoal:
    if replica.failure is not None:
        return "dead"
    if replica.intent == "down" or replica.is_restarted_by_a_person:
        return "draining"
    if _has_ended(replica):
        return "dead"
    views = snapshot.agents(replica.seats)
    leader = views.get(replica.nodes[0]) if replica.nodes else None
    if leader is None or leader.report is None:
        return before  # a controller that has just begun has not seen it yet
    if any(node_phase(node) in ("lost", "failed", "stopped") for node in views.values()):
        return "dead"
    return "draining" if before == "serving" else before


def _has_ended(replica: ReplicaRecord) -> bool:
    """Whether this generation is over: nobody has said so of the next one yet."""
    return replica.intent == "up" and (replica.is_restarting or replica.ranked_at is None)


def _is_coming(replica: ReplicaRecord, snapshot: Snapshot) -> bool:
    """Whether it will take traffic, and does not yet."""
    is_wanted = replica.intent == "up" and replica.failure is None and not replica.over
    return is_wanted and replica_phase(replica, snapshot) != "serving"


def requests_at(state: State | None, replica: ReplicaRecord, revision: int) -> int | None:
    """Requests that are under way at this replica; None: the gateway has not told yet."""
    if state is None or not state.processes:
        return None
    if any(one.orders_revision < revision for one in state.processes if not one.retiring):
        return None
    return in_flight(state, name_of(replica))
