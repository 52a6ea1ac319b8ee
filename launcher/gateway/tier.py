"""One process of the rescue tier: `python -m launcher.gateway.tier FOLDER RUN_FOLDER INDEX ROW`.

It listens on tier-INDEX.sock, where only the front can reach it. A successor renames its own
socket over that name; this one then ends its requests and goes (TERM). Its admin socket carries
its pid, so that both can be asked meanwhile.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
from aiohttp import web

from launcher.errors import StateError
from launcher.files import read_document
from launcher.gateway.attempt import Attempts
from launcher.gateway.counters import Counters
from launcher.gateway.documents import Settings, TierState
from launcher.gateway.front import BUFFER_BYTES
from launcher.gateway.pool import Pool
from launcher.gateway.processes import raise_descriptor_limit
from launcher.gateway.relay import Relay
from launcher.gateway.tally import Tally

ALIVE_PATH = "/-/alive"
BACKLOG = 4096
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


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
        self._pool = Pool(self._folder, counters)
        self._pool.start()
        attempts = Attempts(counters, self._tally)
        self._relay = Relay(settings, self._pool, counters, self._tally, attempts)
        reading = asyncio.create_task(self._pool.run())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._retiring.set)
        loop.add_signal_handler(signal.SIGINT, self._retiring.set)
        await self._serve(self._admin, self._run_folder / f"admin-{os.getpid()}.sock")
        front = await self._serve(self._dispatch, self._run_folder / f"tier-{self._index}.sock")
        await self._retiring.wait()
        await front.stop()
        while self._relay.in_flight:
            await asyncio.sleep(0.05)
        reading.cancel()
        counters.clear(self._row)
        (self._run_folder / f"admin-{os.getpid()}.sock").unlink(missing_ok=True)

    async def _serve(self, handler: Handler, path: Path) -> web.BaseSite:
        """Listen at a path, which names this socket from one moment to the next."""
        server = web.Server(
            handler,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=75.0,
            auto_decompress=False,  # a body is passed on as it came
            max_line_size=BUFFER_BYTES,  # what the front lets through, we can read
            max_field_size=BUFFER_BYTES,
        )
        runner = web.ServerRunner(server)
        await runner.setup()
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.unlink(missing_ok=True)
        site = web.UnixSite(runner, str(scratch), backlog=BACKLOG)
        await site.start()
        scratch.rename(path)
        self._sites.append(site)
        return site

    async def _dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        """What the front sends: requests of clients, and its own question each second."""
        if request.path.startswith("/v1/"):
            return await self._relay.serve(request)
        if request.path == ALIVE_PATH:
            return web.Response(text="alive\n")
        return web.Response(status=404)

    async def _admin(self, request: web.BaseRequest) -> web.StreamResponse:
        """What supervisor and door ask: how it is, and to look at new orders now."""
        if request.path == "/look":
            await self._pool.look()
            return web.Response(text=f"{self._pool.orders.revision}\n")
        return await self._tell_state()

    async def _tell_state(self) -> web.Response:
        standings = self._pool.standings
        self._tally.forget(set(standings))
        for name, standing in standings.items():
            tally = self._tally.of(name)
            tally.reachable, tally.sure = standing.reachable, standing.is_sure
        state = TierState(
            pid=os.getpid(),
            index=self._index,
            row=self._row,
            retiring=self._retiring.is_set(),
            orders_revision=self._pool.orders.revision,
            in_flight=self._relay.in_flight,
            waiting=self._relay.waiting,
            quiet_s=self._relay.quiet_s,
            holding=self._tally.holding,
            body_bytes=self._relay.body_bytes,
            rescued=self._tally.rescued,
            refused=dict(self._tally.refused),
            by_key=dict(self._tally.by_key),
            fell_back=self._tally.fell_back,
            members=self._tally.members,
        )
        return web.Response(text=state.model_dump_json(), content_type="application/json")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s tier %(process)d %(message)s")
    folder, run_folder, index, row = sys.argv[1:5]
    raise_descriptor_limit()
    uvloop.run(Tier(Path(folder), Path(run_folder), int(index), int(row)).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
