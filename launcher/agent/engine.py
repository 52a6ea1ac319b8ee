"""One member of a replica on this node: its processes from start to the last trace. I/O.

The member is started, watched and ended as a whole: any exit that was not ordered is a failure
(vLLM exits 0 when it dies), and takes everything else of the member down with it.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from health.probes.host import busy_ports
from health.report import NodeFacts
from launcher.agent import bundle, lastwords, processes
from launcher.agent.bundle import Bundle
from launcher.agent.canary import StallWatch
from launcher.agent.probe import Api, TokenProbe
from launcher.agent.processes import SCRATCH_MARK, Reaper, scratch_root
from launcher.agent.rehearsing import Rehearsing
from launcher.agent.suspects import Suspects
from launcher.documents import Evidence, Member
from launcher.files import make_private, read_tail, write_text
from launcher.ports import to_check

FENCE_GRACE_S = 5.0
LOG_READ_BYTES = 4 * 1024 * 1024
SEGMENT_SCAN_S = 5.0


@dataclass(frozen=True)
class Surroundings:
    """What the agent knows about its node that every process of an engine is told."""

    node: str
    base: Path
    logs: Path
    evidence: Path
    cache: Path
    mark: str
    environment: dict[str, str]
    secrets: dict[str, str]


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
    evidence: Evidence | None = None
    gone: bool = False
    probe: TokenProbe | None = None
    is_serving: bool = False  # the leader has had its first token
    newest_health: Callable[[], NodeFacts | None] = lambda: None
    _processes: list[_Process] = field(default_factory=list)
    _pending: list[int] = field(default_factory=list)
    _started_at: float = 0.0
    _stop_at: float | None = None
    _stop_grace_s: float = 0.0
    _segments: set[int] = field(default_factory=set)
    _scanned_at: float = 0.0
    _guard: socket.socket | None = None
    _rehearsal: Rehearsing | None = None
    _watch: StallWatch | None = None
    _bundle: Bundle | None = None
    _suspects: Suspects = field(default_factory=Suspects)
    _told: set[str] = field(default_factory=set)
    _ending: threading.Lock = field(default_factory=threading.Lock)

    @property
    def scratch(self) -> Path:
        return scratch_folder(self.around.mark, self.member)

    def start(self) -> None:
        """Prove the ports free, hold the guard port, start every command that waits for none."""
        member = self.member
        self._started_at = time.monotonic()
        ports = to_check(own_ports(member), leader=member.rank == 0)
        busy = busy_ports(member.address, ports)
        if busy:
            self._fail("error", f"port {busy[0]} in use on {member.address}", process="engine")
            return
        self._guard = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with contextlib.suppress(OSError):  # lost the race by a hair: the engine will say so
            self._guard.bind((member.address, member.guard_port))
            self._guard.listen(1)
        write_text(make_private(self.scratch) / SCRATCH_MARK, self.around.mark)
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
        if now - self._scanned_at > SEGMENT_SCAN_S:
            self._scanned_at = now
            self._look_for_suspects(now)
            below = [p for p in processes.descendants() if p.pid not in self._suspects.hanging]
            self._segments |= processes.segments_of(below)
            self.reaper.collect_adopted()
        if self._stop_at is not None:
            self._go_on_stopping(now)
            return
        self._start_ready_commands()
        for process in self._processes:
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
        if self.probe:
            self.probe.stop()
        if self._watch:
            self._watch.stop()

    def fence(self) -> None:
        """From any thread, without touching a file: TERM to every group now, KILL soon after."""
        self._pending = []
        for process in list(self._processes):
            processes.signal_group(process.child.pid, signal.SIGTERM)
        timer = threading.Timer(FENCE_GRACE_S, self._kill_unless_gone)
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
        if self._pending and self.has_gpus and self._rehearses():
            return "the collective check"
        if self._pending:
            command = self.member.commands[self._pending[0]]
            return f"the leader's port {command.after_port}, to start {command.name}"
        return self.probe.waiting_for if self.probe else ""

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
        while self._pending:
            command = self.member.commands[self._pending[0]]
            if self.has_gpus and command.name != "ray-head" and self._rehearses():
                return  # both would want the GPUs' memory; Ray starts meanwhile
            if command.after_port and not _listens(self.member.leader_address, command.after_port):
                return
            self._pending.pop(0)
            folder = self.around.logs.parent / "engine"
            make_private(folder)
            script = folder / f"{command.name}.sh"
            write_text(script, command.script, mode=0o700)
            log = self.around.logs / f"g{self.member.generation}.{command.name}.log"
            try:
                child = self.reaper.start(
                    ["/bin/bash", str(script)], self._environment(command.name), log, self.scratch
                )
            except OSError as error:
                self._fail("error", f"cannot start: {error.strerror}", process=command.name)
                return
            self._processes.append(_Process(command.name, child, log))

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
        member, around = self.member, self.around
        scratch = str(self.scratch)
        leader_ports = {f"LEADER_PORT_{k.upper()}": str(v) for k, v in member.ports.items()}
        named = {
            "NODE": around.node,
            "NODE_RANK": str(member.rank),
            "NODES": str(member.size),
            "NODE_ADDRESS": member.address,
            "LEADER_ADDRESS": member.leader_address,
            "RANKS_PER_NODE": str(member.ranks_per_node),
            "TMP": scratch,
            "BASE": str(around.base),
            "CACHE": str(around.cache),
            "SECRETS": str(around.base / "secrets"),
            "MARK": around.mark,
            **leader_ports,
            **{f"PORT_{k.upper()}": str(v) for k, v in own_ports(member).items()},
        }
        secret = {
            variable: around.secrets[name]
            for variable, name in member.secret_environment.items()
            if name in around.secrets and (variable != "VLLM_API_KEY" or command == "serve")
        }
        interface = member.interface
        return {
            **around.environment,
            "TMPDIR": scratch,
            "VLLM_RPC_BASE_PATH": scratch,
            "VLLM_CACHE_ROOT": str(around.cache / "vllm"),
            "VLLM_CONFIG_ROOT": str(around.cache / "vllm-config"),
            "TORCHINDUCTOR_CACHE_DIR": str(around.cache / "inductor"),
            "TRITON_CACHE_DIR": str(around.cache / "triton"),
            "GLOO_SOCKET_IFNAME": interface,
            "TP_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": f"={interface}",
            **{f"LAUNCHER_{name}": value for name, value in named.items()},
            **secret,
        }

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

    def _go_on_stopping(self, now: float) -> None:
        """The last started command first: an API server ends its requests while Ray lives."""
        assert self._stop_at is not None
        living = [p for p in self._processes if p.child.poll() is None]
        if living and now - self._stop_at < self._stop_grace_s:
            self._terminate(living[-1])
            return
        self._kill_everything()
        left = [p for p in self._processes if p.child.poll() is None]
        if not left and not processes.descendants():
            self._clean_up()

    def _kill_unless_gone(self) -> None:
        """The mark is the agent's: what carries it once we are gone is the next generation."""
        with self._ending:
            if not self.gone:
                self._kill_everything()

    def _kill_everything(self) -> None:
        for process in list(self._processes):
            if process.child.returncode is None:
                processes.signal_group(process.child.pid, signal.SIGKILL)
        processes.kill_all(processes.descendants())
        processes.kill_all(processes.marked(self.around.mark))

    def _clean_up(self) -> None:
        for process in self._processes:
            self.reaper.forget(process.child.pid)
        self.reaper.collect_adopted()
        processes.remove_segments(self._segments)
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self._guard:
            self._guard.close()
        with self._ending:
            self.gone = True


def own_ports(member: Member) -> dict[str, int]:
    """The ports of this rank: the leader's block, moved where one machine plays several nodes."""
    offset = member.guard_port - member.ports["guard"]
    return {name: port if name == "api" else port + offset for name, port in member.ports.items()}


def scratch_folder(mark: str, member: Member) -> Path:
    """A short folder of our own: a Unix socket's path has room for 107 bytes, Ray's need 60."""
    seed = f"{mark}/{member.scope}/{member.rank}".encode()
    return scratch_root() / f"fl-{os.getuid()}-{hashlib.sha256(seed).hexdigest()[:8]}"


def _listens(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((address, port)) == 0
