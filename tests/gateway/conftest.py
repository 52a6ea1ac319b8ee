import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest

from launcher.files import write_document
from launcher.gateway.documents import Key, Keys, Member, Orders, Settings, TierState
from tests.gateway.engines import Engine
from tests.launcher.fleets import eventually


@pytest.fixture
def engines():
    """Makes engines; ends them all."""
    made: list[Engine] = []

    def make(**behaviour) -> Engine:
        made.append(Engine(**behaviour))
        return made[-1]

    yield make
    for engine in made:
        engine.kill()


class TierUnderTest:
    """One process of the tier, asked over its socket as the front would."""

    def __init__(self, folder: Path, run_folder: Path, **settings) -> None:
        self.folder, self.run_folder = folder, run_folder
        self.revision = 0
        self.process: subprocess.Popen[bytes] | None = None
        write_document(
            folder / "settings.json",
            Settings(fleet="t", host="127.0.0.1", port=1, **settings),
        )
        if not (folder / "orders.json").exists():
            self.give()
        words = [sys.executable, "-m", "launcher.gateway.tier", str(folder), str(run_folder)]
        self.process = subprocess.Popen(
            [*words, "0", "1"],
            stderr=(folder / "tier.log").open("w"),
        )
        assert eventually((run_folder / f"admin-{self.process.pid}.sock").exists)
        assert eventually((run_folder / "tier-0.sock").exists)

    def client(self, **more) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.run_folder / "tier-0.sock"))
        more = {"timeout": 30.0, **more}
        return httpx.Client(transport=transport, base_url="http://tier", **more)

    def give(self, *members: Member, expects: bool = False, is_open: bool = True) -> None:
        """New orders, and wait until they are known."""
        self.revision += 1
        orders = Orders(revision=self.revision, members=members, expects=expects, open=is_open)
        write_document(self.folder / "orders.json", orders)
        if self.process is not None:
            assert eventually(lambda: self.state().orders_revision == self.revision)

    def members(self, *engines: Engine, **changes) -> tuple[Member, ...]:
        return tuple(
            Member(name=f"r{i}", slot=i, url=engine.url, **changes)
            for i, engine in enumerate(engines, start=1)
        )

    def give_keys(self, *keys: Key) -> None:
        write_document(self.folder / "keys.json", Keys(keys=keys))
        self._ask("POST", "/look")  # it answers when it has looked

    def state(self) -> TierState:
        return TierState.model_validate_json(self._ask("GET", "/state"))

    def _ask(self, method: str, path: str) -> bytes:
        socket = self.run_folder / f"admin-{self.process.pid}.sock"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
            return client.request(method, f"http://tier{path}").content

    def log(self) -> str:
        return (self.folder / "tier.log").read_text()

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def tier(tmp_path):
    made: list[TierUnderTest] = []
    with tempfile.TemporaryDirectory(prefix="gw-") as run_folder:

        def make(**settings) -> TierUnderTest:
            made.append(TierUnderTest(tmp_path, Path(run_folder), **settings))
            return made[-1]

        yield make
        for one in made:
            one.end()


def chat(client: httpx.Client, *, stream: bool = False, **more) -> "Answer":
    """One chat request: its status, its words, and how it ended."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    began = time.monotonic()
    with client.stream("POST", "/v1/chat/completions", json={**asked, **more}) as response:
        lines = []
        first_s = None
        for line in response.iter_lines():
            if first_s is None and line.startswith("data:"):
                first_s = time.monotonic() - began
            lines.append(line)
        return Answer(response.status_code, dict(response.headers), lines, first_s)


class Answer:
    def __init__(self, status, headers, lines, first_s) -> None:
        self.status, self.headers, self.lines, self.first_s = status, headers, lines, first_s

    @property
    def events(self) -> list[dict]:
        data = [line[5:].strip() for line in self.lines if line.startswith("data:")]
        return [json.loads(one) for one in data if one != "[DONE]"]

    @property
    def document(self) -> dict:
        return json.loads("\n".join(self.lines))

    @property
    def is_done(self) -> bool:
        return "data: [DONE]" in self.lines

    @property
    def error(self) -> dict | None:
        return next((event["error"] for event in self.events if "error" in event), None)

    @property
    def tokens(self) -> int:
        return sum("choices" in event for event in self.events)


class InBackground:
    """A request that is under way while the test does something to its engine."""

    def __init__(self, ask) -> None:
        self._answer: list = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(ask,), daemon=True)
        self._thread.start()

    def _run(self, ask) -> None:
        try:
            self._answer.append(ask())
        except Exception as error:  # noqa: BLE001 - told to who asks for the result
            self._error = error

    def result(self, timeout_s: float = 20.0) -> Answer:
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        assert self._answer, "the request is still under way (or failed)"
        return self._answer[0]
