"""The agent's loop: read assignment.json, make the node so, write report.json. I/O."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from health.probes.host import boot_id
from launcher import __version__
from launcher.agent import drills, processes, segments
from launcher.agent.checks import Watch
from launcher.agent.engine import Engine
from launcher.agent.footing import own_addresses, read_secrets, take_lock
from launcher.agent.heart import Heart, Loss
from launcher.agent.parking import Parking
from launcher.agent.surroundings import Surroundings, clean_environment
from launcher.agent.sweep import sweep
from launcher.agent.upkeep import Upkeep
from launcher.agent.weights import Stage, WeightsWatch
from launcher.documents import (
    AgentConfig,
    Assignment,
    Evidence,
    MemberReport,
    NodePhase,
    Report,
)
from launcher.errors import StateError
from launcher.files import make_private, read_document, write_document
from launcher.paths import BasePaths

TURN_S = 0.2
WAITING_TURN_S = 0.05  # while an order, a port or an end is awaited: we would delay the engine
BEAT_S = 5.0
ASSIGNMENT_POLL_S = 0.5
LOOK_WITHIN_S = 1.0
ORPHAN_GRACE_S = 5


class Agent:
    """One node of one allocation. `run` returns when the node has been stopped."""

    def __init__(self, base: BasePaths, node: str) -> None:
        config = read_document(base.config, AgentConfig)
        if config is None:
            raise StateError("is not there", where=str(base.config))
        self.config = config
        self.base = base
        self.node = node
        self.paths = base.node(node)
        make_private(self.paths.root)
        make_private(self.paths.logs)
        self._lock = take_lock(self.paths.root / "agent.lock")
        self.secrets = read_secrets(base.secrets)
        self.mark = f"{config.mark}/{node}"
        self.reaper = processes.Reaper()
        self.parking = Parking(self.reaper, self._surroundings)
        self.weights = WeightsWatch(self.reaper, config.model, clean_environment(), self.mark)
        address = config.addresses.get(node, "0.0.0.0")
        self.heart = Heart(self.secrets["agent_token"].encode(), address, self._on_loss)
        self.addresses = own_addresses(config.addresses.get(node))
        self.assignment: Assignment | None = None
        self.engine: Engine | None = None
        self.lost_peer: Loss | None = None
        self.evidence: Evidence | None = None
        self._assignment_stat: tuple[int, int] | None = None
        self._looked_at = 0.0
        self._reported: Report | None = None
        self._reported_at = 0.0
        self._phase_since: tuple[NodePhase, float] = ("starting", time.time())
        self._fenced_revision = 0
        self._ordered_to_end = False
        self._shared_before: frozenset[int] = frozenset()
        self._boot_id = boot_id()

    def run(self) -> None:
        processes.become_subreaper()
        sweep(self.mark, [self.paths])  # what an agent before us left
        self._shared_before = segments.present()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.heart.start()
        upkeep = Upkeep(self._surroundings().cache, self._scratches)
        upkeep.start()
        environment = {**clean_environment(), **self._node_environment()}
        self.watch = Watch(self.reaper, environment, self.node, self.mark)
        while not self._turn():
            engine = self.engine
            waits = engine is None or engine.starts or engine.is_stopping
            self.heart.woken.wait(WAITING_TURN_S if waits else TURN_S)
            self.heart.woken.clear()
        self.watch.stop()
        upkeep.stop()
        self.heart.stop()

    def _turn(self) -> bool:
        """One round; True when the node has ended and has said so."""
        self._read_assignment()
        self._reconcile()
        if self.engine:
            self._take_loss(self.engine)  # before the exits that it causes are seen
            self.engine.poll()
            self._after_poll(self.engine)
        self._keep_warm()
        ended = self._is_over()
        self._report("stopped" if ended else self._phase())
        return ended

    def _read_assignment(self) -> None:
        now = time.monotonic()
        hinted = self.heart.assignment_hint > (self.assignment.revision if self.assignment else 0)
        if self.engine and not hinted and now - self._looked_at < ASSIGNMENT_POLL_S:
            return
        self._looked_at = now
        try:
            stat = self.paths.assignment.stat()
        except OSError:
            return
        seen = (stat.st_mtime_ns, stat.st_ino)
        if seen == self._assignment_stat and not hinted:
            return
        try:
            new = read_document(self.paths.assignment, Assignment)
        except StateError as error:
            self.evidence = self._evidence("error", str(error))
            return
        self._assignment_stat = seen
        if new and (self.assignment is None or new.revision > self.assignment.revision):
            self._take(new)

    def _take(self, new: Assignment) -> None:
        before, self.assignment = self.assignment, new
        self.heart.controller_heard_at = time.monotonic()  # a new order is a sign of life, too
        if new.drill and before is not None and before.goal == new.goal == "rank":
            if before.member == new.member:
                self._drill(new, before)
                return
        if new.goal == "rank" or new.checks:
            self.evidence = None  # kept while idle: it tells how the last generation ended
        if new.peers:
            self.heart.ask_reach(new.peers)
        if new.checks:
            address = self.config.addresses.get(self.node, "0.0.0.0")
            self.watch.preflight(new.revision, new.checks, address, self.paths.root)

    def _keep_warm(self) -> None:
        """Keep an engine process ready, unless this node is to end or has no time for it; and
        look what else is warm."""
        order = self.assignment
        if self._ordered_to_end or order is None or order.goal == "stopped" or self._is_over():
            self.parking.end()
            return
        engine = self.engine
        self.parking.want(order.park)
        is_serving = engine is not None and engine.is_serving and not engine.is_stopping
        self.parking.turn(time.monotonic(), idle=engine is None, serving=is_serving)
        stage: Stage = "idle"
        if engine is not None:
            stage = "serving" if engine.is_serving else "starting"
        self.weights.turn(time.monotonic(), stage)

    def _drill(self, new: Assignment, before: Assignment) -> None:
        """The order is the same but for a fault. An agent that begins with it inflicts none: it
        may be what came after the fault; and what has failed already does not start again."""
        if before.revision <= self._fenced_revision:
            self._fenced_revision = new.revision
        elif self.engine and not self.engine.is_stopping:
            drills.inject(new.drill, self.engine, self.mark)

    def _reconcile(self) -> None:
        """Start or stop the engine so that it is what the assignment says."""
        assignment = self.assignment
        if self._ordered_to_end or assignment is None or assignment.goal != "rank":
            if self.engine and not self.engine.is_stopping:
                # We stay a member until the engine is gone: a leader that ends its requests needs
                # its followers, and they fence themselves as soon as we are not.
                self.heart.watch_nobody()
                if assignment and assignment.after_failure:
                    self.engine.look_before_the_end(assignment.reason, LOOK_WITHIN_S)
                self.engine.stop(assignment.stop_grace_s if assignment else ORPHAN_GRACE_S)
            return
        member = assignment.member
        if member is None or assignment.revision <= self._fenced_revision:
            return
        if self.engine and self.engine.member.scope != member.scope:
            self.heart.release()
            self.engine.stop(assignment.stop_grace_s)
            return
        if self.engine is None:
            leader = next((p.node for p in member.peers), None) if member.rank else None
            self.heart.hold(member.scope, member.peers, leader)
            has_gpus = bool(self.watch.facts and self.watch.facts.gpus)
            around, before = self._surroundings(), self._shared_before
            self.engine = Engine(member, around, self.reaper, has_gpus, self.parking, before)
            self.engine.newest_health = lambda: self.watch.health or self.watch.facts
            self.engine.start()

    def _take_loss(self, engine: Engine) -> None:
        loss = self.lost_peer
        if loss is None or engine.evidence:
            return
        what = "ended its part" if loss.said_so else "stopped answering"
        message = f"{loss.peer} {what}; its lease is over"
        engine.lose(self._evidence("lost_peer", message, at=loss.at, process=loss.peer))

    def _after_poll(self, engine: Engine) -> None:
        if engine.evidence and self.evidence is None:
            self.evidence = engine.evidence
            self.heart.release()
            self._fenced_revision = self.assignment.revision if self.assignment else 0
        if engine.first_token_at or (engine.member.rank and self.heart.leader_serves()):
            self.heart.set_serving()
            engine.is_serving = True
            self.watch.look_again(time.monotonic())
        if engine.gone:
            self.heart.release()
            self.engine = None
            self.lost_peer = None

    def _phase(self) -> NodePhase:
        if self.evidence and (self.assignment is None or self.assignment.goal == "rank"):
            return "failed"
        if self.engine:
            if self.engine.is_stopping:
                return "draining"
            if self.engine.first_token_at or self.heart.leader_serves():
                return "serving"
            return "joining"
        if self.assignment is None:
            return "starting"
        if self.watch.is_looking:
            return "preflight"
        facts = self.watch.facts
        return "warm" if facts and not facts.unfit else "idle"

    def _is_over(self) -> bool:
        if self.engine is not None:
            return False
        if self._ordered_to_end or (self.assignment and self.assignment.goal == "stopped"):
            return True
        silent_s = time.monotonic() - self.heart.controller_heard_at
        return silent_s > self.config.orphan_timeout_s

    def _report(self, phase: NodePhase) -> None:
        if phase != self._phase_since[0]:
            self._phase_since = (phase, time.time())
        last = self._reported
        report = Report(
            revision=last.revision if last else 0,
            beat=last.beat if last else 0,
            node=self.node,
            host=socket.gethostname(),
            pid=os.getpid(),
            package_version=__version__,
            boot_id=self._boot_id,
            phase=phase,
            since=self._phase_since[1],
            assignment_revision=self.assignment.revision if self.assignment else 0,
            addresses=self.addresses,
            heartbeat_port=self.heart.port,
            facts=None if self.watch.is_looking else self.watch.facts,
            checks_for=None if self.watch.is_looking else self.watch.revision,
            health=self.watch.health,
            reach=self.heart.reach_found(),
            member=self._member_report(),
            parked=self.parking.parked,
            weights=self.weights.found,
            evidence=self.evidence,
        )
        now = time.monotonic()
        changed = report != last
        if not changed and now - self._reported_at < BEAT_S:
            return
        report = report.model_copy(
            update={"revision": report.revision + int(changed), "beat": report.beat + 1}
        )
        try:
            write_document(self.paths.report, report)
        except StateError:
            return  # a full disk: the last report stays, the next round tries again
        self._reported, self._reported_at = report, now
        self.heart.report_revision = report.revision

    def _member_report(self) -> MemberReport | None:
        if self.engine is None:
            last = self._reported.member if self._reported else None
            return last.model_copy(update={"processes": {}}) if last else None
        member = self.engine.member
        ready = self.engine.first_token_at
        endpoint = f"http://{member.address}:{member.ports['api']}/v1" if ready else None
        return MemberReport(
            replica=member.replica,
            generation=member.generation,
            rank=member.rank,
            endpoint=endpoint,
            processes=self.engine.pids,
            first_token_at=ready,
            waiting_for=self.engine.waiting_for,
            started=self.engine.started,
            begun_at=self.engine.begun_at,
            started_at=self.engine.started_at,
            ray_workers=self.engine.ray_workers,
            parked=self.engine.parked,
            rehearsed=self.engine.rehearsed,
            suspects=self.engine.suspects,
        )

    def _surroundings(self) -> Surroundings:
        cache = self.config.cache_folder or str(Path.home() / ".local/state/launcher/cache")
        return Surroundings(
            node=self.node,
            base=self.base.root,
            logs=self.paths.logs,
            evidence=self.paths.evidence,
            cache=Path(cache),
            mark=self.mark,
            environment=clean_environment(),
            secrets=self.secrets,
        )

    def _scratches(self) -> list[Path]:
        """Where engines of this node work, parked ones included; asked from another thread."""
        engine = self.engine
        found = [engine.scratch if engine else None, self.parking.scratch]
        return [scratch for scratch in found if scratch]

    def _node_environment(self) -> dict[str, str]:
        """What the scripts' preamble needs where no engine is being started."""
        around = self._surroundings()
        with contextlib.suppress(OSError, StateError):  # what needs it says so
            make_private(around.cache)
        return {
            "LAUNCHER_NODE": self.node,
            "LAUNCHER_TMP": str(self.paths.root),
            "LAUNCHER_BASE": str(self.base.root),
            "LAUNCHER_CACHE": str(around.cache),
            "LAUNCHER_MARK": self.mark,
        }

    def _evidence(
        self, kind: str, message: str, *, at: float | None = None, process: str = ""
    ) -> Evidence:
        return Evidence.model_validate(
            {
                "kind": kind,
                "message": message,
                "node": self.node,
                "at": at or time.time(),
                "process": process,
            }
        )

    def _on_loss(self, loss: Loss) -> None:
        """Called in the heart's thread: fence first, tell the main loop afterwards."""
        self.lost_peer = loss
        engine = self.engine
        if engine:
            engine.fence()

    def _on_signal(self, number: int, frame: object) -> None:
        self._ordered_to_end = True
        self.heart.woken.set()
