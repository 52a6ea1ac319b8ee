"""All probes of one level, each in a killable child with a deadline. I/O.

    python -m health.collect < asked.json > evidence.json

One line on stdin is one question, one line on stdout its answer, until stdin ends.

The process forks before it has a thread, so that a probe which hangs in a driver or on a mount, or
dies with the library that it calls, costs its own answer and nothing else. A child that does not
even die (waiting in the kernel) is left behind and reported.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError

from health import evidence
from health.evidence import Asked, Mount, NodeEvidence, Outcome
from health.probes import gpu, host, infiniband, kernel_log, software, storage

Probe = Callable[[Asked], BaseModel | None]
PROBES: dict[str, tuple[Probe, float, type[BaseModel]]] = {
    "gpus": (gpu.read_gpus, 5.0, evidence.Gpus),
    "infiniband": (infiniband.read_infiniband, 4.0, evidence.Infiniband),
    "storage": (storage.read_storage, 4.0, evidence.Storage),
    "host": (host.read_host, 4.0, evidence.Host),
    "kernel": (kernel_log.read_kernel_log, 4.0, evidence.KernelLog),
    "software": (software.read_software, software.PROBE_TIMEOUT_S + 5, evidence.Software),
}
MOUNT_DEADLINE_S = 1.5
DEEP_DEADLINE_S = 120.0
ANSWER_MAX_BYTES = 8 * 1024**2


class Child:
    """One forked probe and its answer so far."""

    def __init__(self, work: Callable[[], str], deadline_s: float) -> None:
        self.answer = b""
        self.began = time.monotonic()
        self.deadline = self.began + deadline_s
        self.fd, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _be_a_child(work, writer)
        os.close(writer)

    def end(self, outcome: str, detail: str = "") -> Outcome:
        os.close(self.fd)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # with whatever it has started itself
        for _ in range(20):  # a child in the kernel's hands does not die; do not wait for it
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self.pid, os.WNOHANG)[0] == 0:
                    time.sleep(0.005)
                    continue
            break
        took_s = round(time.monotonic() - self.began, 3)
        return Outcome.model_validate({"status": outcome, "detail": detail, "took_s": took_s})


def _be_a_child(work: Callable[[], str], writer: int) -> None:
    """Do the work, write the answer, and end without any of the parent's code or clean-up."""
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            answer = work()
        except Exception as error:  # whatever broke a check is a finding about the check
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
        data = answer.encode()
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(0)


def collect(asked: Asked, wanted: tuple[str, ...] = tuple(PROBES)) -> NodeEvidence:
    """Run the probes side by side. Never raises; takes at most the longest deadline."""
    began, cpu_began = time.monotonic(), _children_cpu_s()
    taken_at = time.time()
    slack_s = DEEP_DEADLINE_S if asked.level == "deep" else 0.0
    children: dict[str, Child] = {}
    for name in wanted:
        probe, deadline_s, _ = PROBES[name]
        children[name] = Child(partial(_ask, probe, asked), deadline_s + slack_s)
    mounts = storage.network_mounts() if "storage" in wanted else []
    for path, _ in mounts:
        children[f"mount {path}"] = Child(partial(_time_mount, path), MOUNT_DEADLINE_S)
    answers, outcomes = _gather(children)
    values: dict[str, Any] = {}
    for name in wanted:
        values[name], outcomes[name] = _parsed(name, answers.get(name), outcomes[name])
    timed = tuple(
        Mount(path=path, type=kind, took_s=(answers.get(f"mount {path}") or {}).get("took_s"))
        for path, kind in mounts
    )
    return NodeEvidence(
        node=asked.node or socket.gethostname(),
        boot_id=host.boot_id(),
        level=asked.level,
        taken_at=taken_at,
        took_s=round(time.monotonic() - began, 3),
        cpu_s=round(_children_cpu_s() - cpu_began, 3),
        outcomes={name: outcomes[name] for name in wanted},
        mounts=timed if "storage" in wanted else None,
        **values,
    )


def _ask(probe: Probe, asked: Asked) -> str:
    answer = probe(asked)
    return "null" if answer is None else answer.model_dump_json()


def _time_mount(path: str) -> str:
    return json.dumps({"took_s": storage.time_mount(path)})


def _gather(children: dict[str, Child]) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """Read all answers until each has come or its deadline has passed."""
    answers: dict[str, Any] = {}
    outcomes: dict[str, Outcome] = {}
    waiting = dict(children)
    while waiting:
        now = time.monotonic()
        first = min(child.deadline for child in waiting.values())
        ready, _, _ = select.select(
            [child.fd for child in waiting.values()], [], [], max(0.0, first - now)
        )
        for name, child in list(waiting.items()):
            if child.fd in ready:
                chunk = os.read(child.fd, 65536)
                child.answer += chunk
                if not chunk:
                    del waiting[name]
                    answers[name], outcomes[name] = _finish(child)
                elif len(child.answer) > ANSWER_MAX_BYTES:
                    del waiting[name]
                    outcomes[name] = child.end("error", "an answer without an end")
            elif time.monotonic() >= child.deadline:
                del waiting[name]
                waited_s = child.deadline - child.began
                outcomes[name] = child.end("timeout", f"no answer within {waited_s:.1f} s")
    return answers, outcomes


def _finish(child: Child) -> tuple[Any, Outcome]:
    if not child.answer:
        return None, child.end("error", "the probe died without an answer")
    try:
        answer = json.loads(child.answer)
    except ValueError:
        return None, child.end("error", "the probe died in the middle of its answer")
    if isinstance(answer, dict) and set(answer) == {"error"}:
        return None, child.end("error", str(answer["error"]))
    return answer, child.end("absent" if answer is None else "ok")


def _parsed(name: str, answer: Any, outcome: Outcome) -> tuple[BaseModel | None, Outcome]:
    if answer is None:
        return None, outcome
    try:
        return PROBES[name][2].model_validate(answer), outcome
    except ValidationError as error:
        return None, outcome.model_copy(update={"status": "error", "detail": str(error)[:300]})


def _children_cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system + times.user + times.system


def main() -> int:
    """Answer questions until there are no more. The clock is read last, for the asker."""
    for line in sys.stdin:
        try:
            asked = Asked.model_validate_json(line)
        except ValidationError as error:
            sys.stderr.write(f"not what the probes can be asked: {error}\n")
            return 2
        found = collect(asked).model_copy(update={"taken_at": time.time()})
        sys.stdout.write(found.model_dump_json() + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
