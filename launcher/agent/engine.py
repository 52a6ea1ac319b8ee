"""One member of a replica on this node: its processes from start to the last trace. I/O.

The member is started, watched and ended as a whole: any exit that was not ordered is a failure
(vLLM exits 0 when it dies), and takes everything else of the member down with it.
"""

import contextlib
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from health.probes.host import busy_ports
from health.report import NodeFacts
from launcher.agent import bundle, handover, lastwords, processes
from launcher.agent.bundle import Bundle
from launcher.agent.canary import StallWatch
from launcher.agent.parking import Adopted, Parking
from launcher.agent.probe import Api, TokenProbe
from launcher.agent.processes import SCRATCH_MARK, Reaper
from launcher.agent.rehearsing import Rehearsing
from launcher.agent.segments import Segments
from launcher.agent.surroundings import Surroundings, own_ports, scratch_folder
from launcher.agent.suspects import Suspects
from launcher.agent.waiting import Start
from launcher.documents import Command, Evidence, Member, Parked
from launcher.errors import StateError
from launcher.files import make_private, read_tail, write_text
from launcher.paths import NodePaths
from launcher.ports import to_check

FENCE_GRACE_S = 5.0
LOG_READ_BYTES = 4 * 1024 * 1024
SCAN_S = 5.0
YOUNG_SCAN_S = 1.0  # what it makes until it serves, it may leave behind a moment later
ENDING_SCAN_S = 0.2
OTHERS_WITHIN_S = 10.0  # then it starts all the same, and says itself what is missing


@dataclass
class _Process:
    name: str
    child: subprocess.Popen[bytes]
    log: Path


@dataclass
class Engine:
    """States: starting → (serving) → stopping → gone. Only `poll` and `stop` change them."""

    member: Member
    around: Surroundings
    reaper: Reaper
    has_gpus: bool = False
    parking: Parking | None = None
    shared_before: frozenset[int] = frozenset()  # in /dev/shm: see Segments
    started: str = ""  # how its last command came to be: see MemberReport
    begun_at: float | None = None
    started_at: float | None = None
    parked: Parked | None = None  # what it was started from
    evidence: Evidence | None = None
    gone: bool = False
    probe: TokenProbe | None = None
    is_serving: bool = False  # the leader has had its first token
    newest_health: Callable[[], NodeFacts | None] = lambda: None
    _processes: list[_Process] = field(default_factory=list)
    _pending: list[int] = field(default_factory=list)
    _heard_at: dict[tuple[str, int], float] = field(default_factory=dict)  # who listens, and since
    _quick_since: float | None = None  # when a parked process was there for what is pending
    _started_at: float = 0.0
    _stop_at: float | None = None
    _stop_grace_s: float = 0.0
    _scanned_at: float = 0.0
    _has_looked: bool = False  # since it serves
    _guard: socket.socket | None = None
    _rehearsal: Rehearsing | None = None
    _watch: StallWatch | None = None
    _bundle: Bundle | None = None
    _suspects: Suspects = field(default_factory=Suspects)
    _told: set[str] = field(default_factory=set)
    _adopted_mark: str = ""
    _killing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        claimed = self.parking.claim() if self.parking else None
        self.scratch = claimed or scratch_folder(
            self.around.mark, f"{self.member.scope}/{self.member.rank}"
        )
        self._segments = Segments(NodePaths(self.around.logs.parent).segments, self.shared_before)

    def start(self) -> None:
        """Prove the ports free, hold the guard port, start every command that waits for none."""
        member = self.member
        self._started_at, self.begun_at = time.monotonic(), time.time()
        ports = to_check(own_ports(member), leader=member.rank == 0)
        busy = busy_ports(member.address, ports)
        if busy:
            self._fail("error", f"port {busy[0]} in use on {member.address}", process="engine")
            return
        self._guard = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with contextlib.suppress(OSError):  # lost the race by a hair: the engine will say so
            self._guard.bind((member.address, member.guard_port))
            self._guard.listen(1)
        try:
            write_text(make_private(self.scratch) / SCRATCH_MARK, self.around.mark)
        except (OSError, StateError) as error:
            self._fail("error", f"cannot prepare its folder: {error}", process="engine")
            return
        with contextlib.suppress(OSError, StateError):  # the engine says itself what it lacks
            make_private(self.around.cache)
        self._pending = list(range(len(member.commands)))
        if member.rank == 0:
            self.probe = TokenProbe(self._api())
            self.probe.start()
        if member.rehearsal:
            environment = self._environment("collective")
            self._rehearsal = Rehearsing(member.rehearsal, self.scratch, environment, self.reaper)
        self._start_ready_commands()

    def poll(self) -> None:
        """Look once: start what waited, notice what died, go on with a stop."""
        now = time.monotonic()
        serves = self.is_serving or self.first_token_at is not None
        if now - self._scanned_at > self._scan_period_s() or (serves and not self._has_looked):
            self._scanned_at, self._has_looked = now, serves
            self._look_for_suspects(now)
            self._note_segments()
            self.reaper.collect_adopted()
        if self._stop_at is not None:
            self._go_on_stopping(now)
            return
        self._start_ready_commands()
        # The last started first: Ray's head, made by the twin of `serve`, ends with it.
        for process in reversed(self._processes):
            if process.child.poll() is not None:
                self._fail_by_exit(process)
                return
        if self.first_token_at is None and self.member.rank == 0:
            if now - self._started_at > self.member.start_timeout_s:
                waited = self.probe.waiting_for if self.probe else "the engine"
                limit = self.member.start_timeout_s
                self._fail("deadline", f"no token within {limit} s; waited for {waited}")
        elif self.member.rank == 0:
            self._watch_progress(now)

    def stop(self, grace_s: float) -> None:
        """Order the end: TERM to the API server, then to the rest, KILL when the grace is over."""
        if self._stop_at is not None or self.gone:
            return
        self._stop_at, self._stop_grace_s = time.monotonic(), grace_s
        self._pending = []
        if self.parking:
            self.parking.release()
        if self.probe:
            self.probe.stop()
        if self._watch:
            self._watch.stop()

    def fence(self) -> None:
        """From any thread, without touching a file: TERM to every group now, KILL soon after."""
        self._pending = []
        for process in list(self._processes):
            processes.signal_group(process.child.pid, signal.SIGTERM)
        timer = threading.Timer(FENCE_GRACE_S, self._kill_everything)
        timer.daemon = True
        timer.start()

    def lose(self, evidence: Evidence) -> None:
        """The main loop's half of a fence: record why, and stop.

        The signals went out already. A process that hangs outlives TERM, so that what it does can
        still be seen; nothing waits for that.
        """
        self.evidence = self.evidence or evidence
        self.look_before_the_end(evidence.message)
        self.stop(FENCE_GRACE_S)

    def look_before_the_end(self, why: str, within_s: float = 0.0) -> None:
        """Keep what can be seen of a member that goes down with its replica."""
        if self._bundle is None and not self.is_stopping:
            self._start_bundle(why, within_s=within_s)

    @property
    def first_token_at(self) -> float | None:
        return self.probe.first_token_at if self.probe else None

    @property
    def is_stopping(self) -> bool:
        return self._stop_at is not None

    @property
    def waiting_for(self) -> str:
        pending = self._pending  # a fence empties it from another thread
        if pending and self.has_gpus and self._rehearses():
            return "the collective check"
        if pending:
            command = self.member.commands[pending[0]]
            if self.parking and self.parking.waiting_for:
                return self.parking.waiting_for
            if self._quick_since:
                return f"Ray on the other nodes, to start {command.name}"
            return f"the leader's port {command.after_port}, to start {command.name}"
        return self.probe.waiting_for if self.probe else ""

    @property
    def starts(self) -> bool:
        """Whether a command of it has still to be started."""
        return bool(self._pending)

    @property
    def ray_workers(self) -> str:
        return handover.workers(read_tail(self.scratch / "ray/workers"))

    @property
    def rehearsed(self) -> str | None:
        return self._rehearsal.printed if self._rehearsal else None

    @property
    def suspects(self) -> tuple[str, ...]:
        return self._suspects.found

    @property
    def pids(self) -> dict[str, int]:
        return {p.name: p.child.pid for p in self._processes if p.child.returncode is None}

    def _start_ready_commands(self) -> None:
        while pending := self._pending:  # a fence empties it from another thread
            command = self.member.commands[pending[0]]
            if self.has_gpus and not command.name.startswith("ray-") and self._rehearses():
                return  # both would want the GPUs' memory; Ray itself wants none
            if not self._may_start(command, time.monotonic()):
                return
            log = self.around.logs / f"g{self.member.generation}.{command.name}.log"
            try:
                script = make_private(self.around.logs.parent / "engine") / f"{command.name}.sh"
                write_text(script, command.script, mode=0o700)
                child = self._launch(command, script, log)
            except (OSError, StateError) as error:
                self._pending = []
                self._fail("error", f"cannot start: {error}", process=command.name)
                return
            if child is None:
                return
            self._pending = self._pending[1:]
            self.started_at = time.time()
            self._processes.append(_Process(command.name, child, log))

    def _may_start(self, command: Command, now: float) -> bool:
        """Whether those listen that it needs."""
        if command.after_port is None:
            return True
        heard_at = self._listens_since(self.member.leader_address, command.after_port)
        if heard_at is None or now - heard_at < command.after_s:
            return False
        if self.parking is None or not self.parking.is_ready:
            return True
        self._quick_since = self._quick_since or now
        is_late = now - self._quick_since > OTHERS_WITHIN_S
        return is_late or all(self._listens_since(*other) for other in command.after_others)

    def _listens_since(self, address: str, port: int) -> float | None:
        if (address, port) not in self._heard_at and _listens(address, port):
            self._heard_at[address, port] = time.monotonic()
        return self._heard_at.get((address, port))

    def _launch(self, command: Command, script: Path, log: Path) -> subprocess.Popen[bytes] | None:
        """The command's process: the parked one, or a new one; None while that is not known."""
        environment = self._environment(command.name)
        why = ""
        if command.parkable and self.parking:
            limit = self.member.start_timeout_s / 4  # the rest is for a plain start
            wanted = Start(script, environment, log, self.scratch, limit)
            found = self.parking.start(wanted, time.monotonic())
            if found is None:
                return None
            if isinstance(found, Adopted):
                self.started, self._adopted_mark = "parked", found.mark
                self.parked = found.parked
                return found.child
            why = f": {found}"
        self.started = f"plain{why}"
        return self.reaper.start(["/bin/bash", str(script)], environment, log, self.scratch)

    def _api(self) -> Api:
        member, key = self.member, self.around.secrets.get("engine_key", "")
        return Api(member.address, member.ports["api"], member.served_model, key)

    def _watch_progress(self, now: float) -> None:
        """From the first token on: a stuck engine is looked at, for 8 s at most, and stopped."""
        if self._watch is None:
            self._watch = StallWatch(self._api())
            self._watch.start()
        if not self._watch.stalled:
            return
        if self._bundle is None:
            self._look_for_suspects(now)
            self._start_bundle(self._watch.stalled, with_stacks=True)
        if self._bundle and self._bundle.is_over:
            message = "; ".join((self._watch.stalled, *self.suspects))
            hint = f"What its processes did is in {self._bundle.folder} on {self.around.node}."
            if self._bundle.problem:
                hint = f"What its processes did could not be kept: {self._bundle.problem}"
            self._fail("stall", message, hint=hint)

    def _look_for_suspects(self, now: float) -> None:
        """Only while serving: a process that loads weights is often in state D for long, and
        what was found last is told on while the engine is ended."""
        if self.is_serving and not self.is_stopping:
            self._suspects.look(now, self._own_pids())

    def _own_pids(self) -> list[int]:
        started = [process.child.pid for process in self._processes]
        return [process.pid for process in self.reaper.below(started)]

    def _start_bundle(self, why: str, *, with_stacks: bool = False, within_s: float = 0.0) -> None:
        around, generation = self.around, self.member.generation
        health = self.newest_health()

        def run(arguments: list[str], timeout_s: float) -> tuple[int, str]:
            return self.reaper.run(arguments, around.environment, timeout_s)

        self._bundle = Bundle(
            bundle.Subject(
                folder=around.evidence / f"g{generation}",
                why="; ".join((why, *(one for one in self.suspects if one not in why))),
                pids=tuple(self._own_pids()),
                logs=tuple(process.log for process in self._processes),
                health_json=health.model_dump_json(indent=1) if health else "",
                secrets={**bundle.secrets_in(around.environment), **around.secrets},
                run=run if with_stacks else None,
            )
        )
        self._bundle.start(within_s)

    def _rehearses(self) -> bool:
        return self._rehearsal is not None and self._rehearsal.printed is None

    def _environment(self, command: str) -> dict[str, str]:
        return self.around.environment_of(self.member, command, self.scratch)

    def _fail_by_exit(self, process: _Process) -> None:
        code = process.child.returncode
        text = read_tail(process.log, LOG_READ_BYTES)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        reason = lastwords.cause(text)
        message = f"{process.name} {how}" + (f": {reason}" if reason else "")
        hint = "Was it out of memory? See dmesg on the node." if code == -9 else ""
        self._fail("exit", message, process.name, code, lastwords.tail(text), hint)

    def _fail(
        self,
        kind: str,
        message: str,
        process: str = "serve",
        code: int | None = None,
        tail: str = "",
        hint: str = "",
    ) -> None:
        if not tail:
            log = self.around.logs / f"g{self.member.generation}.{process}.log"
            tail = lastwords.tail(read_tail(log))
        self.evidence = self.evidence or Evidence.model_validate(
            {
                "kind": kind,
                "message": message,
                "node": self.around.node,
                "at": time.time(),
                "process": process,
                "exit_code": code,
                "log_tail": tail,
                "hint": hint,
            }
        )
        self.stop(FENCE_GRACE_S)

    def _terminate(self, process: _Process) -> None:
        """TERM once, and to the command itself: `ray start` takes 4 s to end its children in
        order, and 35 s when they were ended under its hands."""
        if process.name not in self._told:
            self._told.add(process.name)
            with contextlib.suppress(ProcessLookupError):
                process.child.send_signal(signal.SIGTERM)

    def _scan_period_s(self) -> float:
        if self.is_stopping:
            return ENDING_SCAN_S
        return SCAN_S if self._has_looked else YOUNG_SCAN_S

    def _note_segments(self) -> None:
        """What it has mapped: that is left behind by whoever is killed."""
        self._segments.look(self._answering())

    def _answering(self) -> list[psutil.Process]:
        return [p for p in self.reaper.descendants() if p.pid not in self._suspects.hanging]

    def _go_on_stopping(self, now: float) -> None:
        """The last started command in order: an API server ends its requests while Ray lives.
        Then nothing is worth to be ended in order: a Ray head takes seconds over nothing."""
        assert self._stop_at is not None
        last = self._processes[-1] if self._processes else None
        if last and last.child.poll() is None and now - self._stop_at < self._stop_grace_s:
            self._terminate(last)
            return
        # A young engine makes segments while it is being ended: what is stopped makes no more.
        processes.hold_all(self._answering())
        self._note_segments()
        self._kill_everything()
        left = [p for p in self._processes if p.child.poll() is None]
        if not left and not self.reaper.descendants():
            self._clean_up()

    def _kill_everything(self) -> None:
        """Not when all is over: what runs below us then is the next generation."""
        with self._killing:
            if not self.gone:
                self._kill()

    def _kill(self) -> None:
        for process in list(self._processes):
            if process.child.returncode is None:
                processes.signal_group(process.child.pid, signal.SIGKILL)
        if self.parking:
            self.parking.kill_claimed()
        processes.kill_all(self.reaper.descendants())
        for mark in filter(None, (self.around.mark, self._adopted_mark)):
            processes.kill_all(processes.marked(mark))

    def _clean_up(self) -> None:
        if self.parking:
            self.parking.clear()
        for process in self._processes:
            self.reaper.forget(process.child.pid)
        self.reaper.collect_adopted()
        self._segments.remove()
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self._guard:
            self._guard.close()
        with self._killing:
            self.gone = True


def _listens(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((address, port)) == 0
