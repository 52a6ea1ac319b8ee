"""Members as a list: their columns in the shared counters, their requests. Pure."""

from collections.abc import Iterable

from launcher.gateway.documents import MEMBERS_MAX, Member, State


def with_slots(before: Iterable[Member], wanted: Iterable[Member]) -> tuple[Member, ...]:
    """Members with a column of their own each; one that was there keeps its own. Pure."""
    held = {member.name: member.slot for member in before}
    wanted = list(wanted)
    names = [member.name for member in wanted]
    taken = {held[name] for name in names if name in held}
    # Not the column of one who has just gone: what is still counted there is his.
    shunned = set(held.values())
    free = iter(
        [slot for slot in range(MEMBERS_MAX) if slot not in shunned]
        + [slot for slot in range(MEMBERS_MAX) if slot in shunned - taken]
    )
    slots = {name: held[name] if name in held else next(free) for name in names}
    return tuple(m.model_copy(update={"slot": slots[m.name]}) for m in wanted)


def in_flight(state: State, name: str) -> int:
    """Requests at this member, over all processes. Pure."""
    return sum(p.members[name].in_flight for p in state.processes if name in p.members)
