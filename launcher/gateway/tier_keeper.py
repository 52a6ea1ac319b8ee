"""The processes of the tier as the supervisor keeps them: started, asked, replaced. I/O."""

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from launcher.errors import StateError
from launcher.files import open_log
from launcher.gateway.counters import ROWS, Counters
from launcher.gateway.documents import TierProcess, TierState
from launcher.gateway.places import GatewayPaths, RunFolder
from launcher.gateway.processes import identity, is_alive, tell

ASK_TIMEOUT_S = 2.0
HUNG_AFTER_S = 10.0
HUNG_ASKED = 4
STARTS_WITHIN_S = 15.0
STATE_MAX_BYTES = 16 * 1024 * 1024

log = logging.getLogger("launcher.gateway")


class TierKeeper:
    """Those that take requests, and those that end their last ones (retiring)."""

    def __init__(self, paths: GatewayPaths, run: RunFolder, on_change: Callable[[], None]) -> None:
        self.serving: list[TierProcess] = []
        self.retiring: list[TierProcess] = []
        self.states: dict[int, TierState] = {}
        self._paths = paths
        self._run = run
        self._counters = Counters(run.counters, ROWS - 1)
        self._on_change = on_change
        self._started: dict[int, float] = {}
        self._silent: dict[int, tuple[float, int]] = {}  # since when, and how often it was asked

    @property
    def everyone(self) -> list[TierProcess]:
        return [*self.serving, *self.retiring]

    @property
    def all_answer(self) -> bool:
        return bool(self.serving) and all(one.pid in self.states for one in self.serving)

    def adopt(self, processes: list[TierProcess]) -> None:
        """Processes of an earlier supervisor. The newest of an index serves, others retire."""
        for row in set(range(ROWS - 1)) - {one.row for one in processes}:
            self._counters.clear(row)
        for one in sorted(processes, key=lambda one: one.started_ticks):
            for older in [other for other in self.serving if other.index == one.index]:
                self.retire(older)
            self.serving.append(one)

    def tend(self, wanted: int) -> list[str]:
        """Bury the dead, end the hung, retire what is too many; what died, in words."""
        died = []
        now = time.monotonic()
        for one in self.everyone:
            if not is_alive(one):
                if one in self.serving:
                    died.append(f"process {one.pid} of the tier died")
                self._forget(one)
            elif self._hangs(one, now):
                log.error("process %d of the tier hangs; it is ended", one.pid)
                tell(one, signal.SIGKILL)
        for one in [one for one in self.serving if one.index >= wanted]:
            self.retire(one)
        return died

    def missing(self, wanted: int) -> list[int]:
        return [i for i in range(wanted) if all(one.index != i for one in self.serving)]

    def start(self, index: int) -> TierProcess:
        used = {one.row for one in self.everyone}
        row = next((row for row in range(ROWS - 1) if row not in used), None)
        if row is None:
            raise StateError("has no room for another process", where=str(self._run.counters))
        words = [sys.executable, "-m", "launcher.gateway.tier"]
        words += [str(self._paths.root), str(self._run.root), str(index), str(row)]
        with open_log(self._paths.log) as handle:
            started = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=handle,
                start_new_session=True,
                cwd="/",
            )
        known = identity(started.pid)
        made = TierProcess(**known.model_dump(), row=row, index=index)
        self.serving.append(made)
        self._started[made.pid] = time.monotonic()
        self._on_change()
        return made

    async def replace(self, index: int) -> None:
        """A new process for this index; the old one ends its requests once the new one answers."""
        old = [one for one in self.serving if one.index == index]
        new = self.start(index)
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline and is_alive(new):
            if await self._ask(new) is not None:
                for one in old:
                    self.retire(one)
                return
            await asyncio.sleep(0.05)
        log.error("the new process of index %d does not answer; the old one stays", index)
        tell(new, signal.SIGKILL)
        self._forget(new)

    def retire(self, one: TierProcess) -> None:
        self.serving.remove(one)
        self.retiring.append(one)
        tell(one, signal.SIGTERM)
        self._on_change()

    def _hangs(self, one: TierProcess, now: float) -> bool:
        """Whether it was asked several times for long, and was silent. Time in which nobody asked
        is no silence of its own."""
        since, asked = self._silent.get(one.pid, (now, 0))
        is_starting = now - self._started.get(one.pid, float("-inf")) < STARTS_WITHIN_S
        return now - since > HUNG_AFTER_S and asked >= HUNG_ASKED and not is_starting

    async def ask_all(self) -> None:
        everyone = self.everyone
        answers = await asyncio.gather(*(self._ask(one) for one in everyone))
        for one, state in zip(everyone, answers, strict=True):
            if state is not None:
                self.states[one.pid] = state
                self._silent.pop(one.pid, None)
            else:
                since, asked = self._silent.get(one.pid, (time.monotonic(), 0))
                self._silent[one.pid] = (since, asked + 1)

    async def find_unknown(self, known: list[TierProcess]) -> list[TierProcess]:
        """Processes that an earlier supervisor started and had no time to write down."""
        found = []
        for path in sorted(self._run.root.glob("admin-*.sock")):
            pid = int(path.stem.removeprefix("admin-") or 0)
            if any(one.pid == pid for one in known):
                continue
            state = await self._ask_pid(pid)
            with contextlib.suppress(OSError):
                if state is not None:
                    who = identity(pid).model_dump()
                    found.append(TierProcess(**who, row=state.row, index=state.index))
        return found

    async def _ask(self, one: TierProcess) -> TierState | None:
        return await self._ask_pid(one.pid)

    async def _ask_pid(self, pid: int) -> TierState | None:
        """What it says of itself, on a connection of its own; None where it does not answer."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                path = str(self._run.admin_socket(pid))
                reader, writer = await asyncio.open_unix_connection(path, limit=STATE_MAX_BYTES)
                try:
                    writer.write(b"GET /state HTTP/1.0\r\n\r\n")
                    _, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
                finally:
                    writer.close()
                return TierState.model_validate_json(body)
        except (TimeoutError, OSError, ValueError):
            return None

    def _forget(self, one: TierProcess) -> None:
        for group in (self.serving, self.retiring):
            if one in group:
                group.remove(one)
        self._counters.clear(one.row)
        self.states.pop(one.pid, None)
        self._silent.pop(one.pid, None)
        self._started.pop(one.pid, None)
        self._run.admin_socket(one.pid).unlink(missing_ok=True)
        self._on_change()
