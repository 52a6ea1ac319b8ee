"""GET /metrics of the gateway, for this host alone. I/O."""

from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from launcher.errors import BackendError
from launcher.gateway import haproxy, metrics
from launcher.gateway.documents import State


class MetricsPage:
    def __init__(self, state: Callable[[], State], front_socket: Path) -> None:
        self.port: int | None = None
        self._state = state
        self._front_socket = front_socket
        app = web.Application()
        app.router.add_get("/metrics", self._tell)
        self._runner = web.AppRunner(app, access_log=None)

    async def open(self, port: int) -> None:
        """At this port, or at any where somebody else has it."""
        await self._runner.setup()
        for wanted in (port, 0):
            try:
                await web.TCPSite(self._runner, "127.0.0.1", wanted).start()
            except OSError:
                continue
            self.port = self._runner.addresses[0][1]
            return

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _tell(self, request: web.Request) -> web.Response:
        try:
            front = haproxy.statistics(self._front_socket)
        except BackendError:
            front = {}
        text = metrics.exposition(self._state(), front)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})
