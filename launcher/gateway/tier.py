"""One process of the rescue tier: `python -m launcher.gateway.tier FOLDER RUN_FOLDER INDEX ROW`.

It listens on tier-INDEX.sock, where only the front can reach it. A successor renames its own
socket over that name; this one then ends its requests and goes (TERM). Its admin socket carries
its pid, so that both can be asked meanwhile.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import uvloop
from aiohttp import web

from launcher.errors import StateError
from launcher.files import read_document
from launcher.gateway.attempt import Attempts
from launcher.gateway.counters import Counters
from launcher.gateway.documents import Settings, TierState
from launcher.gateway.pool import Pool
from launcher.gateway.relay import Relay
from launcher.gateway.tally import Tally

ALIVE_PATH = "/-/alive"
BACKLOG = 4096
CONNECT_TIMEOUT_S = 2.0


class Tier:
    def __init__(self, folder: Path, run_folder: Path, index: int, row: int) -> None:
        self._folder, self._run_folder = folder, run_folder
        self._index, self._row = index, row
        self._retiring = asyncio.Event()
        self._tally = Tally()
        self._sites: list[web.BaseSite] = []  # a listener that nobody holds is collected

    async def run(self) -> None:
        settings = read_document(self._folder / "settings.json", Settings)
        if settings is None:
            raise StateError("is not there", where=str(self._folder / "settings.json"))
        counters = Counters(self._run_folder / "counters", self._row)
        # No total and no idle limit: an engine may think for an hour. A dead connection is found
        # by the kernel's own probes, a dead replica by the controller.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_make_socket)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, trust_env=False
        ) as session:
            self._pool = Pool(self._folder, counters)
            self._pool.read()
            attempts = Attempts(counters, self._tally, session)
            self._relay = Relay(settings, self._pool, counters, self._tally, attempts)
            reading = asyncio.create_task(self._pool.run())
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, self._retiring.set)
            loop.add_signal_handler(signal.SIGINT, self._retiring.set)
            front = await self._listen(settings)
            await self._retiring.wait()
            await front.stop()
            while self._relay.in_flight:
                await asyncio.sleep(0.05)
            reading.cancel()
            counters.clear(self._row)
        (self._run_folder / f"admin-{os.getpid()}.sock").unlink(missing_ok=True)

    async def _listen(self, settings: Settings) -> web.BaseSite:
        admin = web.Application()
        admin.router.add_get("/state", self._tell_state)
        admin.router.add_post("/look", self._look)
        await self._serve(admin, self._run_folder / f"admin-{os.getpid()}.sock")
        app = web.Application(client_max_size=settings.body_max_bytes)
        app.router.add_get(ALIVE_PATH, self._tell_alive)
        app.router.add_route("*", "/v1/{rest:.*}", self._relay.serve)
        return await self._serve(app, self._run_folder / f"tier-{self._index}.sock")

    async def _serve(self, app: web.Application, path: Path) -> web.BaseSite:
        """Listen at a path, which names this socket from one moment to the next."""
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, keepalive_timeout=75.0
        )
        await runner.setup()
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.unlink(missing_ok=True)
        site = web.UnixSite(runner, str(scratch), backlog=BACKLOG)
        await site.start()
        scratch.rename(path)
        self._sites.append(site)
        return site

    async def _tell_alive(self, request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def _look(self, request: web.Request) -> web.Response:
        """There are new orders: read them now."""
        self._pool.read()
        return web.json_response({"orders_revision": self._pool.orders.revision})

    async def _tell_state(self, request: web.Request) -> web.Response:
        standings = self._pool.standings
        self._tally.forget(set(standings))
        for name, standing in standings.items():
            tally = self._tally.of(name)
            tally.reachable, tally.sure = standing.reachable, standing.fails == 0
        state = TierState(
            pid=os.getpid(),
            index=self._index,
            row=self._row,
            retiring=self._retiring.is_set(),
            orders_revision=self._pool.orders.revision,
            in_flight=self._relay.in_flight,
            waiting=self._relay.waiting,
            holding=self._tally.holding,
            body_bytes=self._relay.body_bytes,
            rescued=self._tally.rescued,
            refused=dict(self._tally.refused),
            by_key=dict(self._tally.by_key),
            fell_back=self._tally.fell_back,
            members=self._tally.members,
        )
        return web.Response(text=state.model_dump_json(), content_type="application/json")


def _make_socket(info: tuple[object, ...]) -> socket.socket:
    """A connection to an engine that notices within half a minute that its host is gone."""
    family, kind, protocol = info[0], info[1], info[2]
    made = socket.socket(family, kind, protocol)  # type: ignore[arg-type]
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s tier %(process)d %(message)s")
    folder, run_folder, index, row = sys.argv[1:5]
    uvloop.run(Tier(Path(folder), Path(run_folder), int(index), int(row)).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
