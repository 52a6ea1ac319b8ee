"""The node looks at itself: before it takes work, and again while it serves. I/O, in threads.

The probes run in a child of ours (`health.collect`) that is started with the agent, so that its
imports are done when the first order comes. It is asked by a line and answers by a line; one that
does not answer is killed and started again.
"""

import contextlib
import queue
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from health.checks.base import Needs
from health.evidence import Asked, KernelLog, NodeEvidence, Xid
from health.judge import judge
from health.report import Finding, NodeFacts
from health.settle import LOOKS, settle
from launcher.agent.processes import Reaper
from launcher.documents import Checks
from launcher.errors import StateError
from launcher.files import write_text

ANSWER_WITHIN_S = 75.0  # the slowest probe's deadline (the engine's Python, 60 s) and some
PASSIVE_EVERY_S = 60.0  # as gpud; by chance up to a fifth later, so that nodes do not beat as one
XIDS_KEPT = 50


class Watch:
    """Asks the probes, judges their answers, and keeps what is known of this node's health."""

    def __init__(self, reaper: Reaper, environment: dict[str, str], node: str, mark: str) -> None:
        self._reaper = reaper
        self._environment = environment
        self._node = node
        self._mark = mark
        self._orders: queue.SimpleQueue[tuple[int | None, Asked, Needs] | None]
        self._orders = queue.SimpleQueue()
        self._child: subprocess.Popen[bytes] | None = None
        self._xid_child: subprocess.Popen[bytes] | None = None
        self._xids: list[Xid] = []
        self._looks: tuple[NodeFacts, ...] = ()
        self._next_at = 0.0
        self._script = ""
        self._needs = Needs()
        self._asked_for: int | None = None
        self.revision: int | None = None  # the assignment that `facts` answers
        self.facts: NodeFacts | None = None
        self.health: NodeFacts | None = None  # the newest look while serving
        threading.Thread(target=self._run, name="health", daemon=True).start()

    def preflight(self, revision: int, checks: Checks, address: str, folder: Path) -> None:
        """Order the checks of one assignment; `facts` is None until they are done."""
        asked = Asked(
            level="passive",
            node=self._node,
            mark=self._mark,
            scratch=str(folder),
            model_folder=checks.model_folder or "",
            image=checks.image,
            weights_folders=checks.weights_folders,
            address=address,
            ports=checks.ports,
            probe_script=str(folder / "engine-probe.sh"),
        )
        self._script = checks.probe_script
        self._needs = Needs(
            gpus=checks.gpus,
            executor=checks.executor,
            weights_bytes=checks.weights_bytes,
            shares_machine=checks.shares_machine,
        )
        self._asked_for, self.facts = revision, None
        self._orders.put((revision, asked, self._needs))

    @property
    def is_looking(self) -> bool:
        """Whether an ordered preflight has not answered yet."""
        return self._asked_for is not None and self.revision != self._asked_for

    def look_again(self, now: float) -> None:
        """Called each turn while serving: the passive level, now and then."""
        if now < self._next_at:
            return
        self._next_at = now + PASSIVE_EVERY_S * random.uniform(1.0, 1.2)
        # The engine runs: its environment is not asked again, and its own GPUs are what counts.
        needs = replace(self._needs, serving=True, executor=None)
        self._orders.put((None, Asked(node=self._node, mark=self._mark), needs))

    def stop(self) -> None:
        self._orders.put(None)
        for child in (self._child, self._xid_child):
            if child is not None:
                child.kill()

    def _run(self) -> None:
        self._start()
        while (order := self._orders.get()) is not None:
            revision, asked, needs = order
            try:
                if asked.probe_script:
                    write_text(Path(asked.probe_script), self._script, mode=0o700)
                facts = self._judged(self._ask(asked), needs)
            except StateError as error:  # the node's own disk is full, or not ours to write
                full = Finding(
                    check="disk.free",
                    verdict="unhealthy",
                    message=error.message,
                    device=error.where,
                    hint=error.hint,
                    advice="clean up",
                )
                facts = NodeFacts(findings=(full,))
            except Exception as error:  # a broken check must be reported, whatever broke it
                broken = Finding(check="preflight", verdict="unknown", message=repr(error)[:300])
                facts = NodeFacts(findings=(broken,))
            if revision is not None:
                self.facts, self.revision = facts, revision
            else:
                self._looks = (*self._looks, facts)[-LOOKS:]
                settled = settle(self._looks)
                if self.health is None or self.health.findings != settled.findings:
                    self.health = settled

    def _judged(self, evidence: NodeEvidence, needs: Needs) -> NodeFacts:
        if evidence.gpus and evidence.gpus.vendor == "nvidia" and self._must_watch_xids():
            self._watch_xids()
        if self._xids:
            # An ordinary user may not read the kernel's log: then these events are all there is.
            kernel = evidence.kernel or KernelLog()
            kernel = kernel.model_copy(update={"xids": (*kernel.xids, *self._xids)})
            evidence = evidence.model_copy(update={"kernel": kernel})
        return judge(evidence, needs)

    def _start(self) -> subprocess.Popen[bytes]:
        self._child = self._reaper.converse(
            [sys.executable, "-m", "health.collect"], self._environment
        )
        return self._child

    def _ask(self, asked: Asked) -> NodeEvidence:
        """One question to the probes' process. Raises what explains the missing answer."""
        child = self._child
        if child is None or child.poll() is not None:
            child = self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        watchdog = threading.Timer(ANSWER_WITHIN_S, child.kill)
        watchdog.start()
        try:
            child.stdin.write(asked.model_dump_json().encode() + b"\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        finally:
            watchdog.cancel()
        if not answer:
            self._child = None
            raise TimeoutError("the probes' process ended without an answer")
        return NodeEvidence.model_validate_json(answer)

    def _must_watch_xids(self) -> bool:
        """Not yet watched, or the watcher was killed (an engine's end takes all our children)."""
        return self._xid_child is None or (self._xid_child.poll() or 0) < 0

    def _watch_xids(self) -> None:
        """Wait for the driver's error events; each makes the next look come at once."""
        child = self._reaper.converse(
            [sys.executable, "-m", "health.xid_watch"], self._environment
        )
        self._xid_child = child

        def listen() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                with contextlib.suppress(ValidationError):
                    self._xids = [*self._xids, Xid.model_validate_json(line)][-XIDS_KEPT:]
                    self._next_at = time.monotonic()

        threading.Thread(target=listen, name="xids", daemon=True).start()
