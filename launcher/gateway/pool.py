"""The members as one process of the tier knows them: orders read, health asked. I/O."""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from yarl import URL

from launcher.errors import StateError
from launcher.files import read_document
from launcher.gateway.choose import Seen, choose, may_come
from launcher.gateway.counters import Counters
from launcher.gateway.documents import Key, Keys, Member, Orders
from launcher.gateway.upstream import OUR_LIMITS

READ_EVERY_S = 0.1  # opened anew each time: close-to-open makes that fresh on NFS, too
CHECK_EVERY_S = 1.0
CHECK_TIMEOUT_S = 2.0
DOUBTED_AFTER = 2
RESTS_AFTER, REST_S = 3, 5.0

T = TypeVar("T", bound=BaseModel)
log = logging.getLogger("launcher.gateway")


class Standing:
    """One member: its order, what we see of it, and the tries that are under way there."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.reachable = True
        self.fails = 0
        self.answered_at = float("-inf")  # when it last gave a token
        self._failures = 0  # tries that failed one after the other
        self._failed_at = float("-inf")
        self._key = ""
        self.under_way: set[Callable[[str], None]] = set()

    @property
    def key(self) -> str:
        """What the member wants to see; read again until there is something in its file."""
        if not self._key and self.member.key_file:
            self._key = _read_key(self.member.key_file)
        return self._key

    def forget_key(self) -> None:
        """The next request reads the file again: its content may be another one."""
        self._key = ""

    @property
    def is_sure(self) -> bool:
        """Whether it is asked like the others. A member that fails at once has few requests in
        flight, and would get more than its share of them."""
        fails_now = time.monotonic() - self._failed_at < REST_S
        return self.fails < DOUBTED_AFTER and not (self._failures >= RESTS_AFTER and fails_now)

    def note(self, *, failed: bool) -> None:
        """What became of a try there, where that says something about it."""
        self._failures = self._failures + 1 if failed else 0
        if failed:
            self._failed_at = time.monotonic()

    def release_all(self, why: str) -> None:
        """Free every request that waits for this member."""
        for abandon in list(self.under_way):
            abandon(why)


class Pool:
    """Who takes traffic. `changed` is set whenever a waiting request should look again."""

    def __init__(self, folder: Path, counters: Counters) -> None:
        self._orders_file = folder / "orders.json"
        self._keys_file = folder / "keys.json"
        self._counters = counters
        self._marks: dict[Path, tuple[int, int, int]] = {}
        self._complaints: dict[Path, str] = {}
        self._looking = asyncio.Lock()
        self.has_keys = False
        self._checks: dict[str, asyncio.Task[None]] = {}
        self.orders = Orders()
        self.keys: dict[str, Key] = {}
        self.standings: dict[str, Standing] = {}
        self.changed = asyncio.Event()

    async def run(self) -> None:
        """Read the orders for ever; those that cannot be read leave the last good ones."""
        while True:
            await self.look()
            await asyncio.sleep(READ_EVERY_S)

    async def look(self) -> None:
        """Read what is new. In a thread: a file system that hangs must not hold requests."""
        async with self._looking:
            self._take(*await asyncio.to_thread(self._read))

    def start(self) -> None:
        """Read everything once, before the first request."""
        self._take(*self._read())

    def _read(self) -> tuple[Orders | None, Keys | None]:
        """What has changed on disk since the last good look."""
        return self._new(self._orders_file, Orders), self._new(self._keys_file, Keys)

    def _new(self, path: Path, kind: type[T]) -> T | None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                stat = os.fstat(handle)
            finally:
                os.close(handle)
            found = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if self._marks.get(path) == found:
                return None
            document = read_document(path, kind)
            self._marks[path] = found
            self._complaints.pop(path, None)
            return document
        except FileNotFoundError:
            return None
        except (StateError, OSError) as error:
            if self._complaints.get(path) != str(error):
                log.error("%s; the last good one counts", error)
                self._complaints[path] = str(error)
            return None

    def pick(self, tried: frozenset[str], *, with_fallback: bool = True) -> Standing | None:
        members = tuple(m for m in self.orders.members if with_fallback or not m.fallback)
        seen = {
            m.name: Seen(
                self._counters.in_flight(m.slot),
                self.standings[m.name].reachable,
                self.standings[m.name].is_sure,
            )
            for m in members
        }
        chosen = choose(members, seen, tried, random.random())
        return self.standings[chosen.name] if chosen else None

    def may_come(self, tried: frozenset[str]) -> bool:
        return may_come(self.orders.members, tried, expects=self.orders.expects)

    def awaits_a_verdict(self, tried: frozenset[str]) -> bool:
        """Whether one of these seems to be down, and the controller has not said so."""
        return any(
            standing.member.goal == "serving" and not (standing.reachable and standing.is_sure)
            for name, standing in self.standings.items()
            if name in tried and not standing.member.fallback
        )

    def unreachable(self, standing: Standing) -> None:
        """A try could not connect: nobody else is sent there until a check can."""
        standing.reachable = False

    async def wait_for_change(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), timeout_s)

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def _take(self, orders: Orders | None, keys: Keys | None) -> None:
        if keys is not None:
            self.keys = {key.name: key for key in keys.keys}
            self.has_keys = True
        if orders is not None:
            self._take_orders(orders)

    def _take_orders(self, orders: Orders) -> None:
        kept: dict[str, Standing] = {}
        for member in orders.members:
            known = self.standings.pop(member.name, None)
            if known is None or known.member.url != member.url:
                if known is not None:
                    known.release_all("its address changed")
                known = Standing(member)
            known.member = member
            known.forget_key()
            kept[member.name] = known
            if member.goal == "dead":
                known.release_all("was declared dead")
        for gone in self.standings.values():
            gone.release_all("was removed")
        self.standings = kept
        self.orders = orders
        self._watch_health()
        self._wake()

    def _watch_health(self) -> None:
        wanted = {
            name
            for name, standing in self.standings.items()
            if standing.member.goal != "dead" and not standing.member.fallback
        }
        for name in list(self._checks):
            if name not in wanted or self._checks[name].done():
                self._checks.pop(name).cancel()
        for name in wanted - self._checks.keys():
            self._checks[name] = asyncio.create_task(self._check(self.standings[name]))

    async def _check(self, standing: Standing) -> None:
        """Ask /health for ever. It only stops new traffic; who is dead, the controller says."""
        while self.standings.get(standing.member.name) is standing:
            began = time.monotonic()
            was = (standing.reachable, standing.fails >= DOUBTED_AFTER)
            if began - standing.answered_at < CHECK_EVERY_S:
                standing.reachable, standing.fails = True, 0  # requests have shown it
            else:
                await _ask_health(standing)
            if was != (standing.reachable, standing.fails >= DOUBTED_AFTER):
                self._wake()
            spent_s = time.monotonic() - began
            await asyncio.sleep(max(0.1, CHECK_EVERY_S * random.uniform(0.9, 1.1) - spent_s))


async def _ask_health(standing: Standing) -> None:
    """One GET /health, with as little as that takes: it is asked each second."""
    url = URL(standing.member.url)
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            try:
                reader, writer = await asyncio.open_connection(url.host, url.port)
            except OSError as error:
                if error.errno not in OUR_LIMITS:
                    standing.reachable = False
                return
            standing.reachable = True
            try:
                host = f"{url.host}:{url.port}".encode()
                writer.write(
                    b"GET /health HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % host
                )
                status = (await reader.readline()).split(b" ")
            finally:
                writer.close()
        good = len(status) > 1 and status[1] == b"200"
    except (TimeoutError, OSError, ValueError):
        good = False
    standing.fails = 0 if good else standing.fails + 1


def _read_key(path: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except OSError as error:
        log.error("the key of a member cannot be read: %s", error)
        return ""
