"""What must never happen, looked at after each round."""

from inventory.ledger import BRAKE_NODES, BRAKE_WINDOW_S
from launcher.documents import Assignment
from launcher.record import RunRecord, Seat
from launcher.steps import Allocate, Assign, Interrupt, Plan
from tests.simulation.world import Agent, World

UNDISTURBED_S = 15.0


class BrokenError(AssertionError):
    """An invariant does not hold."""


def one_engine_per_node(world: World) -> None:
    """Never two live engines on one node's GPUs."""
    holders: dict[str, set[tuple[str, int]]] = {}
    for agent, engine in world.engines():
        holders.setdefault(agent.node, set()).add(engine.scope)
    for node, scopes in holders.items():
        if len(scopes) > 1:
            raise BrokenError(f"{node} holds {sorted(scopes)} at once")


def nothing_serves_twice(world: World) -> None:
    """When a generation serves, the generations before it hold no GPU any more."""
    newest = {}
    for _, engine in world.engines():
        if engine.serving and engine.gone_at is None:
            newest[engine.replica] = max(newest.get(engine.replica, 0), engine.generation)
    for agent, engine in world.engines():
        told_to_end = engine.gone_at is not None  # and does not: not even KILL ends every process
        if (
            engine.generation < newest.get(engine.replica, 0)
            and engine.serving
            and not told_to_end
        ):
            raise BrokenError(f"{engine.scope} still serves on {agent.node} beside its successor")


def brake_holds(quarantines: list[tuple[float, str, str]]) -> None:
    """No more automatic quarantines for one check within minutes than the brake allows."""
    for at, _, check in quarantines:
        same = {
            node
            for when, node, other in quarantines
            if other == check and 0 <= when - at < BRAKE_WINDOW_S
        }
        if len(same) > BRAKE_NODES:
            raise BrokenError(f"{check}: {sorted(same)} quarantined within minutes")


def nothing_repeated(before: Plan, after: Plan) -> None:
    """Planning again from what was just recorded orders nothing a second time."""
    done = [step for step in before.steps if isinstance(step, Allocate | Assign)]
    for step in after.steps:
        if step in done:
            raise BrokenError(f"ordered again: {step}")
        if isinstance(step, Assign):
            same = [
                one
                for one in done
                if isinstance(one, Assign)
                and one.seat == step.seat
                and _what(one.assignment) == _what(step.assignment)
            ]
            if same:
                raise BrokenError(f"the same assignment again: {step}")


def _what(assignment: Assignment) -> Assignment:
    return assignment.model_copy(update={"revision": 0})


class Undisturbed:
    """Since when each replica has really been well, and seen to be so."""

    def __init__(self) -> None:
        self._well_since: dict[str, float] = {}

    def look(
        self, world: World, record: RunRecord, deaf: set[str], wishes: dict[str, int]
    ) -> None:
        for replica in record.replicas.values():
            agents = [world.agents.get((seat.allocation, seat.node)) for seat in replica.seats]
            well = bool(agents) and all(
                agent is not None
                and agent.alive
                and world.in_sight(agent.node)
                and agent.node not in deaf
                and _serves(agent, replica.generation)
                for agent in agents
            )
            asked = wishes.get(replica.name, 0) > replica.restarts_asked
            if not well or asked or replica.is_restarting or replica.ranked_at is None:
                self._well_since.pop(replica.name, None)
            else:
                self._well_since.setdefault(replica.name, world.now)

    def check(self, world: World, record: RunRecord, plan: Plan) -> None:
        """A replica that is well is not ended by us."""
        for step in plan.steps:
            if isinstance(step, Interrupt) and step.incident.code != "asked":
                owner = step.about
            elif isinstance(step, Assign) and step.assignment.goal != "rank":
                owner = _owner(record, step.seat)
            else:
                continue
            since = self._well_since.get(owner, world.now)
            if world.now - since > UNDISTURBED_S:
                raise BrokenError(
                    f"{owner} is well and was told: {step.assignment.goal} on {step.seat}"
                )


def _serves(agent: Agent, generation: int) -> bool:
    engine = agent.engine
    return bool(
        engine and engine.gone_at is None and engine.serving and engine.generation == generation
    )


def _owner(record: RunRecord, seat: Seat) -> str:
    return next(
        (one.name for one in record.replicas.values() if seat in one.seats and one.intent == "up"),
        "",
    )
