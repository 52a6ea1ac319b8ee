"""Nodes, agents, engines and a scheduler, in a time of their own. They refuse what they know not.

An agent here does what launcher.agent does, as far as others can tell: it reads its assignment,
starts and stops one member of an engine, holds leases on its peers, and reports.
"""

import random
from dataclasses import dataclass, field

from health.report import Finding, NodeFacts
from launcher.documents import Assignment, Evidence, MemberReport, NetAddress, Report
from launcher.heartbeat import PERIOD_S

LEASE_LOST_S = 4.0  # three misses and their time-out: 3.6 to 4.6 s
FENCE_S = 5.0  # TERM, then KILL
ORPHAN_S = 1800.0
VERSIONS = {"vllm": "1", "ray": "1", "torch": "1", "python": "3"}


class SimError(AssertionError):
    """The world was asked for something that it does not know."""


@dataclass
class Engine:
    """One member of a replica on one node; it holds the node's GPUs until it is gone."""

    replica: str
    generation: int
    rank: int
    size: int
    peers: tuple[str, ...]
    leader: str
    started_at: float
    serving: bool = False
    gone_at: float | None = None  # when its processes have ended
    token_at: float | None = None

    @property
    def scope(self) -> tuple[str, int]:
        return self.replica, self.generation


@dataclass
class Agent:
    allocation: str
    node: str
    born_at: float
    ready_at: float
    boot: int
    alive: bool = True
    assignment: Assignment | None = None
    unread: Assignment | None = None
    reads_at: float = 0.0
    engine: Engine | None = None
    fenced: int = 0
    evidence: Evidence | None = None
    facts: NodeFacts | None = None
    checks_for: int | None = None
    checked_at: float | None = None
    last_member: MemberReport | None = None
    stopped: bool = False
    stubborn_until: float = 0.0
    heard_at: dict[str, float] = field(default_factory=dict)
    revision: int = 0
    beat: int = 0
    beat_at: float = -1e9
    seen: tuple[object, ...] | None = None
    report: Report | None = None
    controller_at: float = 0.0


@dataclass
class Node:
    name: str
    up: bool = True
    linked: bool = True
    boot: int = 1
    fault: str = ""  # a check that fails here until it is repaired
    crash_prone: float = 0.0


class World:
    """All that is, and how it goes on: `advance` moves time, nothing else does."""

    def __init__(self, rng: random.Random, nodes: list[str]) -> None:
        self.rng = rng
        self.now = 1_000_000.0
        self.nodes = {name: Node(name) for name in nodes}
        self.agents: dict[tuple[str, str], Agent] = {}
        self.start_s = (8.0, 25.0)
        self.crash_chance = 0.0  # of an engine, while it starts
        self.history: list[str] = []
        self.heard_by_controller: set[str] = set()  # "allocation/node" of who is asked

    def tell(self, line: str) -> None:
        self.history.append(f"{self.now - 1_000_000.0:8.1f}  {line}")

    # --- what the backend does here ---

    def start_agent(self, allocation: str, node: str) -> None:
        """Harmless when the agent is there already, as the real one's lock makes it."""
        if node not in self.nodes:
            raise SimError(f"there is no node {node}")
        known = self.agents.get((allocation, node))
        if known is not None and known.alive:
            return
        ready = self.now + self.rng.uniform(0.5, 3.0)
        boot = self.nodes[node].boot
        self.agents[allocation, node] = Agent(
            allocation, node, self.now, ready, boot, controller_at=self.now
        )

    def sweep(self, allocation: str, node: str) -> None:
        """Kill the agent and all that carries its mark."""
        agent = self.agents.get((allocation, node))
        if agent is not None:
            self._kill(agent)

    def assign(self, allocation: str, node: str, assignment: Assignment) -> None:
        agent = self.agents.get((allocation, node))
        if agent is None:
            return  # the file lies there; the agent that comes will not be ours
        agent.unread = assignment
        agent.reads_at = self.now + self.rng.uniform(0.1, 0.8)

    # --- faults ---

    def power_off(self, name: str) -> None:
        node = self.nodes[name]
        node.up = False
        for agent in self.agents.values():
            if agent.node == name:
                self._kill(agent)
        self.tell(f"{name} loses power")

    def power_on(self, name: str) -> None:
        node = self.nodes[name]
        if not node.up:
            node.up, node.boot = True, node.boot + 1
            self.tell(f"{name} is back")

    def link(self, name: str, *, up: bool) -> None:
        if self.nodes[name].linked != up:
            self.nodes[name].linked = up
            self.tell(f"{name}: link {'mended' if up else 'cut'}")

    def kill_agent(self, agent: Agent) -> None:
        """Its engine is a child of it and dies with it (PDEATHSIG), a moment later."""
        self.tell(f"agent {agent.allocation}/{agent.node} is killed")
        self._kill(agent)

    def crash_engine(self, agent: Agent, message: str) -> None:
        if agent.engine and agent.engine.gone_at is None:
            self.tell(f"engine {agent.engine.scope} dies on {agent.node}")
            self._fail(agent, "exit", message, "serve")

    # --- time ---

    def advance(self, seconds: float) -> None:
        """In steps small enough for heartbeats."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + PERIOD_S / 2)
            for agent in list(self.agents.values()):
                if agent.alive and self.nodes[agent.node].up:
                    self._turn(agent)

    def reachable(self, one: str, other: str) -> bool:
        """Whether two nodes hear each other."""
        a, b = self.nodes[one], self.nodes[other]
        return a.up and b.up and (one == other or (a.linked and b.linked))

    def in_sight(self, name: str) -> bool:
        """Whether the controller's host reaches this node."""
        return self.nodes[name].up and self.nodes[name].linked

    def engines(self) -> list[tuple[Agent, Engine]]:
        """Every engine whose processes live: each holds its node's GPUs."""
        return [
            (agent, agent.engine)
            for agent in self.agents.values()
            if agent.engine is not None
            and (agent.engine.gone_at is None or agent.engine.gone_at > self.now)
        ]

    def _kill(self, agent: Agent) -> None:
        agent.alive = False
        if agent.engine is not None:
            agent.engine.gone_at = self.now
            agent.engine = None

    def _turn(self, agent: Agent) -> None:
        if self.now < agent.ready_at:
            return
        if self.in_sight(agent.node) and (
            f"{agent.allocation}/{agent.node}" in self.heard_by_controller
        ):
            agent.controller_at = self.now
        if agent.unread is not None and self.now >= agent.reads_at:
            self._take(agent, agent.unread)
            agent.unread = None
        self._look_at_itself(agent)
        self._drive_engine(agent)
        if agent.assignment and agent.assignment.goal == "stopped" and agent.engine is None:
            agent.stopped = True
        if self.now - agent.controller_at > ORPHAN_S and agent.engine is None:
            agent.stopped = True
        self._write_report(agent)
        if agent.stopped:
            agent.alive = False

    def _take(self, agent: Agent, new: Assignment) -> None:
        if agent.assignment is not None and new.revision <= agent.assignment.revision:
            return
        agent.assignment = new
        if new.goal == "rank" or new.checks:
            agent.evidence = None
        if new.checks:
            agent.facts, agent.checks_for = None, None
            agent.checked_at = self.now + self.rng.uniform(0.5, 3.0)

    def _look_at_itself(self, agent: Agent) -> None:
        if agent.checked_at is None or self.now < agent.checked_at or agent.assignment is None:
            return
        findings: tuple[Finding, ...] = ()
        if fault := self.nodes[agent.node].fault:
            findings = (Finding(check=fault, verdict="unhealthy", message=f"{fault} failed"),)
        agent.facts = NodeFacts(findings=findings, traits=VERSIONS)
        agent.checks_for, agent.checked_at = agent.assignment.revision, None

    def _drive_engine(self, agent: Agent) -> None:
        engine, order = agent.engine, agent.assignment
        if engine is not None and engine.gone_at is not None:
            if self.now >= engine.gone_at:
                agent.engine = None
            return
        member = order.member if order and order.goal == "rank" else None
        if engine is not None:
            if member is None or (member.replica, member.generation) != engine.scope:
                self._stop(agent, float(order.stop_grace_s if order else 5))
            else:
                self._hold_leases(agent, engine)
                self._get_ready(agent, engine)
            return
        if member is None or order is None or order.revision <= agent.fenced:
            return
        agent.engine = Engine(
            replica=member.replica,
            generation=member.generation,
            rank=member.rank,
            size=member.size,
            peers=tuple(peer.node for peer in member.peers),
            leader=member.peers[0].node if member.rank else agent.node,
            started_at=self.now,
        )
        agent.heard_at = {}

    def _peer(self, agent: Agent, engine: Engine, node: str) -> Agent | None:
        """The agent there that is a member of the same generation, if it can be heard."""
        if not self.reachable(agent.node, node):
            return None
        for other in self.agents.values():
            if other.node == node and other.alive and other.engine is not None:
                if other.engine.scope == engine.scope and other.engine.gone_at is None:
                    return other
        return None

    def _hold_leases(self, agent: Agent, engine: Engine) -> None:
        for peer in engine.peers:
            if self._peer(agent, engine, peer) is not None:
                agent.heard_at[peer] = self.now
                continue
            if peer not in agent.heard_at:
                continue  # it has never been a member: it is still coming
            answers = self.reachable(agent.node, peer) and any(
                other.node == peer and other.alive for other in self.agents.values()
            )
            if answers or self.now - agent.heard_at[peer] > LEASE_LOST_S:
                self._fail(agent, "lost_peer", f"{peer} stopped answering", peer)
                return

    def _get_ready(self, agent: Agent, engine: Engine) -> None:
        if engine.serving:
            return
        if engine.rank:
            leader = self._peer(agent, engine, engine.leader)
            engine.serving = bool(leader and leader.engine and leader.engine.serving)
            return
        if self.now - engine.started_at < self.start_s[0]:
            return
        if self.rng.random() < self.crash_chance:
            self._fail(agent, "exit", "serve exited with code 1: RuntimeError: bad luck", "serve")
            return
        others = [self._peer(agent, engine, peer) for peer in engine.peers]
        ready = self.now - engine.started_at > self.rng.uniform(*self.start_s)
        if ready and all(other is not None for other in others):
            engine.serving, engine.token_at = True, self.now
        elif self.now - engine.started_at > 300:
            self._fail(agent, "deadline", "no token within 300 s", "serve")

    def _fail(self, agent: Agent, kind: str, message: str, process: str) -> None:
        agent.evidence = Evidence.model_validate(
            {
                "kind": kind,
                "message": message,
                "node": agent.node,
                "at": self.now,
                "process": process,
                "exit_code": 0 if kind == "exit" else None,
            }
        )
        agent.fenced = agent.assignment.revision if agent.assignment else 0
        self._stop(agent, FENCE_S)

    def _stop(self, agent: Agent, grace_s: float) -> None:
        engine = agent.engine
        if engine is None or engine.gone_at is not None:
            return
        agent.last_member = self._member(agent)
        took = self.rng.uniform(0.2, max(0.3, min(grace_s, FENCE_S)))
        engine.gone_at = max(self.now + took, agent.stubborn_until)

    def _member(self, agent: Agent) -> MemberReport | None:
        engine = agent.engine
        if engine is None or engine.gone_at is not None:
            return agent.last_member
        return MemberReport(
            replica=engine.replica,
            generation=engine.generation,
            rank=engine.rank,
            endpoint=f"http://{agent.node}:1/v1" if engine.token_at else None,
            first_token_at=engine.token_at,
            rehearsed=None,
        )

    def _phase(self, agent: Agent) -> str:
        order = agent.assignment
        if agent.stopped:
            return "stopped"
        if agent.evidence and (order is None or order.goal == "rank"):
            return "failed"
        if agent.engine is not None:
            if agent.engine.gone_at is not None:
                return "draining"
            return "serving" if agent.engine.serving else "joining"
        if order is None:
            return "starting"
        if agent.checked_at is not None:
            return "preflight"
        return "warm" if agent.facts and not agent.facts.unfit else "idle"

    def _write_report(self, agent: Agent) -> None:
        order = agent.assignment
        peers = order.peers if order else ()
        reach = tuple(p.node for p in peers if self.reachable(agent.node, p.node))
        seen = (
            self._phase(agent),
            order.revision if order else 0,
            id(agent.facts),
            agent.checks_for,
            self._member(agent),
            agent.evidence,
            reach,
        )
        if seen == agent.seen and self.now - agent.beat_at < 5.0:
            return
        agent.revision += seen != agent.seen
        agent.beat += 1
        agent.beat_at, agent.seen = self.now, seen
        agent.report = Report.model_construct(
            version=1,
            revision=agent.revision,
            beat=agent.beat,
            node=agent.node,
            host=agent.node,
            pid=1,
            package_version="0",
            boot_id=str(agent.boot),
            phase=seen[0],
            since=self.now,
            assignment_revision=seen[1],
            addresses=(
                NetAddress.model_construct(interface="eth0", ip=_ip(agent.node), prefix=16),
            ),
            heartbeat_port=5000,
            facts=agent.facts if agent.checked_at is None else None,
            checks_for=agent.checks_for,
            health=None,
            reach={node: (_ip(node),) for node in reach},
            member=seen[4],
            evidence=agent.evidence,
        )


def _ip(node: str) -> str:
    number = int(node[1:])
    return f"10.0.{number // 250}.{number % 250 + 1}"
