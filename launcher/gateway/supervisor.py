"""The gateway's supervisor: `python -m launcher.gateway.supervisor FLEET/gateway`.

It starts the front and the tier's processes, replaces those that die, and says how they are. It
is not in the way of any request and of no order: when it is killed, both go on, and the next one
adopts them. HUP makes it a new version of itself, which replaces the tier's processes one by one;
TERM ends everything when what is under way has ended.
"""

import asyncio
import contextlib
import getpass
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from launcher.errors import FleetError, StateError
from launcher.files import make_private, read_document, write_document
from launcher.gateway.documents import Orders, Owner, Settings, State
from launcher.gateway.front_keeper import FrontKeeper
from launcher.gateway.keeper import LOOK_EVERY_S, Keeper
from launcher.gateway.metrics_page import MetricsPage
from launcher.gateway.owner import PortLock, SupervisedError, check_port_is_free
from launcher.gateway.places import LOG_MAX_BYTES, GatewayPaths, RunFolder
from launcher.gateway.processes import (
    DeathWatch,
    identity,
    is_alive,
    raise_descriptor_limit,
    tell,
)
from launcher.gateway.tier_keeper import TierKeeper
from launcher.paths import FleetPaths
from launcher.slurm_tools.jobs import own_place

CALM_TURN_S = 1.0
BUSY_TURN_S = 0.15
RESTART_PAUSE_MAX_S = 10.0
CALM_AFTER_S = 60.0
METRICS_OFFSET = 1000
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}

log = logging.getLogger("launcher.gateway")


class Supervisor:
    def __init__(self, paths: GatewayPaths, settings: Settings, *, renew: bool) -> None:
        self._paths = paths
        self._settings = settings
        self._run = RunFolder(paths.run_folder)
        self._lock = PortLock(settings.port)
        self._front = FrontKeeper(paths, self._run)
        self._renew_left = list(range(settings.processes)) if renew else []
        self._failures = 0
        self._failed_at = 0.0
        self._restarts = 0
        self._problem = ""
        self._page = MetricsPage(self._state, self._run.front_socket)
        self._owner: Owner | None = None
        self._place = own_place()
        self._replaced = False
        self._orders = Orders()
        self._woken = asyncio.Event()
        self._deaths = DeathWatch(self._woken)
        self._is_ending = False
        self._renewing = False

    async def run(self) -> None:
        """Adopt or start, then look after it until we are told to end."""
        self._lock.take(str(self._paths.root))
        owner = self._former()
        self._front.process = owner.front if owner and is_alive(owner.front) else None
        self._is_ending = self._settings.goal == "stopped"  # only what is left has to end
        if self._front.process is None and not self._is_ending:
            try:
                check_port_is_free(self._settings.host, self._settings.port)
            except FleetError:
                self._lock.release()
                raise
        make_private(self._run.root)
        alive = [one for one in owner.tier if is_alive(one)] if owner else []
        if not alive:
            self._run.counters.unlink(missing_ok=True)
        self._tier = TierKeeper(self._paths, self._run, self._write_owner)
        alive += await self._tier.find_unknown(alive)
        self._tier.adopt(alive)
        if alive:
            log.info("adopted %d processes of the tier", len(alive))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._order_the_end)
        loop.add_signal_handler(signal.SIGHUP, self._renew)
        loop.add_signal_handler(signal.SIGUSR1, self._woken.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        before = owner.metrics_port if owner else None
        await self._page.open(before or min(self._settings.port + METRICS_OFFSET, 65535))
        self._write_owner()
        keeping = asyncio.create_task(self._keep_controller())
        while not self._is_ending:
            await self._turn()
            if self._renewing:
                self._become_new()
            self._watch_for_deaths()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), self._turn_s())
            self._woken.clear()
        keeping.cancel()
        await self._end()

    async def _keep_controller(self) -> None:
        keeper = Keeper(FleetPaths(self._paths.root.parent))
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await asyncio.to_thread(keeper.look)

    def _turn_s(self) -> float:
        orders = self._orders
        leaving = not orders.open or any(m.goal != "serving" for m in orders.members)
        behind = any(s.orders_revision != orders.revision for s in self._tier.states.values())
        settled = self._tier.all_answer and self._front.is_up and not self._tier.retiring
        is_busy = leaving or behind or not settled or self._renew_left or self._problem
        return BUSY_TURN_S if is_busy else CALM_TURN_S

    def _watch_for_deaths(self) -> None:
        ours = (self._front.process, *self._tier.everyone)
        self._deaths.watch({one.pid for one in ours if one is not None})

    async def _turn(self) -> None:
        problem = ""
        try:
            self._read_settings()
            if self._is_replaced():
                self._order_the_end()
            if self._is_ending:
                return
            await self._tend_tier()
            await self._tier.ask_all()
            self._tend_front()
        except FleetError as error:
            problem = str(error)
            if problem != self._problem:
                log.error("%s", error)
        self._problem = problem
        self._tell()
        self._rotate_logs()

    def _former(self) -> Owner | None:
        """What an earlier supervisor of this fleet has left on this host."""
        try:
            owner = read_document(self._paths.owner, Owner)
        except StateError:
            return None
        return owner if owner and owner.host == socket.gethostname() else None

    def _is_replaced(self) -> bool:
        """Whether a gateway of this fleet has begun on another host: Slurm held our job for gone.
        One of us has to end, and clients are told the address of the other one."""
        if self._owner is None or self._replaced:
            return self._replaced
        with contextlib.suppress(StateError):
            owner = read_document(self._paths.owner, Owner)
            self._replaced = owner is not None and owner.host != self._owner.host
        if self._replaced:
            log.error("this gateway runs on another host now; here it ends")
        return self._replaced

    def _read_settings(self) -> None:
        settings = read_settings(self._paths)
        before = self._settings
        if settings.goal == "stopped":
            self._order_the_end()
        address = {"host": before.host, "port": before.port, "announced": before.announced}
        settings = settings.model_copy(update={**address, "goal": before.goal})  # these stay
        if settings != self._settings:
            self._settings = settings
            self._renew_left = list(range(settings.processes))  # they read them at their start

    async def _tend_tier(self) -> None:
        wanted = self._settings.processes
        for what in self._tier.tend(wanted):
            self._note_failure(what)
        if self._is_pausing():
            return
        if missing := self._tier.missing(wanted):
            for index in missing:
                self._tier.start(index)
        elif self._renew_left and self._tier.all_answer:
            index = self._renew_left.pop(0)
            if index < wanted:
                await self._tier.replace(index)
        self._write_owner()

    def _tend_front(self) -> None:
        if is_alive(self._front.process):
            self._front.follow(self._settings)
            return
        if self._front.process is not None:
            self._front.process = None
            self._note_failure("the front died")
        if self._tier.states and not self._is_pausing():  # somebody is behind it
            self._front.start(self._settings)
            self._write_owner()

    def _note_failure(self, what: str) -> None:
        calm = time.monotonic() - self._failed_at > CALM_AFTER_S
        self._failures = 1 if calm else self._failures + 1
        self._failed_at = time.monotonic()
        self._restarts += 1
        log.error("%s", what)

    def _is_pausing(self) -> bool:
        """Replaced at once at first, then ever later: a crash loop must not eat the host."""
        if self._failures <= 2:
            return False
        pause_s: float = min(RESTART_PAUSE_MAX_S, 0.5 * 2 ** min(self._failures - 3, 8))
        return time.monotonic() < self._failed_at + pause_s

    def _order_the_end(self) -> None:
        self._is_ending = True
        self._woken.set()

    def _renew(self) -> None:
        self._renewing = True
        self._woken.set()

    def _become_new(self) -> None:
        """Our own new version, in the same process: children and their pids stay."""
        self._write_owner()
        log.info("becoming a new version")
        # A signal that comes before the new version has its handlers waits for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        words = [sys.executable, "-m", "launcher.gateway.supervisor", str(self._paths.root)]
        os.execv(sys.executable, [*words, "--renew"])  # noqa: S606 - no shell is wanted

    # What is said

    def _state(self) -> State:
        settings = self._settings
        living = [one.pid for one in self._tier.everyone]
        with contextlib.suppress(StateError):
            self._orders = read_document(self._paths.orders, Orders) or Orders()
        return State(
            fleet=settings.fleet,
            address=address_of(settings),
            host=socket.gethostname(),
            supervisor_pid=os.getpid(),
            front="up" if self._front.is_up else "down",
            processes=[self._tier.states[pid] for pid in living if pid in self._tier.states],
            orders=self._orders,
            metrics_port=self._page.port,
            problem=self._problem,
            restarts=self._restarts,
            at=time.time(),
        )

    def _tell(self) -> None:
        if self._replaced:
            return
        try:
            write_document(self._paths.state, self._state())
        except StateError as error:  # a full disk ends the telling, not the serving
            log.error("%s", error)

    def _write_owner(self) -> None:
        owner = Owner(
            fleet=self._settings.fleet,
            folder=str(self._paths.root),
            user=getpass.getuser(),
            host=socket.gethostname(),
            port=self._settings.port,
            run_folder=str(self._run.root),
            supervisor=identity(os.getpid()),
            front=self._front.process,
            tier=tuple(self._tier.everyone),
            metrics_port=self._page.port,
            job=self._place.job if self._place else "",
            node=self._place.node if self._place else "",
        )
        if owner == self._owner or self._is_replaced():
            return
        self._lock.write(owner)
        with contextlib.suppress(StateError):
            write_document(self._paths.owner, owner)
            self._owner = owner

    def _rotate_logs(self) -> None:
        for path in (self._paths.log, self._paths.front_log):
            with contextlib.suppress(OSError):
                if path.stat().st_size > LOG_MAX_BYTES:
                    # Copied and cut: those who write keep the file open, always at its end.
                    path.with_suffix(".log.1").write_bytes(path.read_bytes())
                    os.truncate(path, 0)

    # The end

    async def _end(self) -> None:
        """No new requests; those under way end, for as long as they may; then everything."""
        log.info("ending")
        tell(self._front.process, signal.SIGUSR1)  # closes the port
        deadline = time.monotonic() + self._settings.drain_s
        while time.monotonic() < deadline:
            self._tier.tend(self._settings.processes)
            await self._tier.ask_all()
            self._tell()
            if not sum(state.in_flight for state in self._tier.states.values()):
                break
            await asyncio.sleep(0.1)
        for number, wait_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            living = [p for p in (self._front.process, *self._tier.everyone) if is_alive(p)]
            for one in living:
                tell(one, number)
            limit = time.monotonic() + wait_s
            while time.monotonic() < limit and any(is_alive(one) for one in living):
                await asyncio.sleep(0.02)
        await self._page.close()
        for leftover in self._run.root.iterdir():
            leftover.unlink(missing_ok=True)
        self._run.root.rmdir()
        self._tier.tend(0)
        if not self._is_replaced():
            self._tell()
            self._paths.owner.unlink(missing_ok=True)
        self._lock.release()


def read_settings(paths: GatewayPaths) -> Settings:
    settings = read_document(paths.settings, Settings)
    if settings is None:
        raise StateError("is not there", where=str(paths.settings))
    return settings


def address_of(settings: Settings) -> str:
    scheme = "https" if settings.certificate else "http"
    return f"{scheme}://{settings.announced or settings.host}:{settings.port}"


def _say_why_not(paths: GatewayPaths, error: FleetError) -> None:
    """Where the one who started us looks."""
    failed = State(
        fleet=paths.root.parent.name,
        address="",
        host=socket.gethostname(),
        supervisor_pid=os.getpid(),
        front="down",
        processes=[],
        orders=Orders(),
        metrics_port=None,
        problem=str(error),
        at=time.time(),
    )
    with contextlib.suppress(StateError):
        write_document(paths.state, failed)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s gateway %(process)d %(message)s")
    paths = GatewayPaths(Path(sys.argv[1]))
    raise_descriptor_limit()
    # The next order may name us before we have a handler for its signal: it waits for one.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        settings = read_settings(paths)
        asyncio.run(Supervisor(paths, settings, renew="--renew" in sys.argv[2:]).run())
    except SupervisedError:
        return 0  # another one was quicker
    except FleetError as error:
        log.error("%s", error)
        _say_why_not(paths, error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
