"""Each gateway of benchmarks/gateway.py: how it is started, where it listens, what it uses."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gateway_load import KEY
from launcher.files import write_document
from launcher.gateway import haproxy, keyring
from launcher.gateway.documents import Keys, Member, Orders, Settings
from launcher.gateway.door import Gateway
from launcher.gateway.front import FrontPlaces, render
from launcher.gateway.members import with_slots
from launcher.gateway.places import GatewayPaths
from tests.gateway.engines import Engine, free_port

ROUTERS = ROOT / ".venv/peers-router"
LITELLM = ROOT / ".venv/peers-litellm"
# Both routers are of one family, and have the same settings.
ROUTER_SETTINGS = (
    *("--health-check-interval-secs", "1", "--health-check-timeout-secs", "1"),
    *("--health-failure-threshold", "2", "--health-success-threshold", "1"),
    *("--retry-max-retries", "3", "--cb-failure-threshold", "3"),
    *("--cb-timeout-duration-secs", "5", "--request-timeout-secs", "3600"),
    *("--log-level", "error"),
)
PACKAGES = {ROUTERS: ["vllm-router==0.1.17", "smg==1.13.0"], LITELLM: ["litellm[proxy]<1.109"]}


def install() -> None:
    """The peers in virtual environments of their own, once."""
    for folder, packages in PACKAGES.items():
        if not (folder / "bin/pip").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if not (folder / ".installed").exists():
            subprocess.run([str(folder / "bin/pip"), "install", "-q", *packages], check=True)
            (folder / ".installed").touch()


class Peer:
    """A gateway in front of some engines. `verdict`: the controller says that one is dead."""

    name = ""

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self.folder = Path(tempfile.mkdtemp(prefix="gwb-"))
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.roots: list[int] = []

    def start(self) -> None:
        """Start, and wait until an answer comes through."""

    def spawn(self, *words: str, environment: dict[str, str] | None = None) -> None:
        log = (self.folder / "log").open("ab")
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self.roots.append(process.pid)

    def wait(self, timeout_s: float = 90.0) -> None:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        limit = time.monotonic() + timeout_s
        while True:
            try:
                url = f"http://{self.address}/v1/chat/completions"
                ask = urllib.request.Request(url, data=body, headers=headers)
                urllib.request.urlopen(ask, timeout=5).read()
                return
            except OSError:
                if time.monotonic() > limit:
                    told = (self.folder / "log").read_text()[-2000:]
                    raise RuntimeError(f"{self.name} does not answer: {told}") from None
                time.sleep(0.1)

    def verdict(self, number: int) -> None:
        """Most gateways have nobody who could tell them."""

    def processes(self) -> list[psutil.Process]:
        found = {}
        for pid in self.roots:
            try:
                root = psutil.Process(pid)
                for one in (root, *root.children(recursive=True)):
                    found[one.pid] = one
            except psutil.Error:
                continue
        return list(found.values())

    def cpu_s(self) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in self.processes())

    def memory_mb(self) -> float:
        return sum(p.memory_full_info().uss for p in self.processes()) / 2**20

    def stop(self) -> None:
        for process in reversed(self.processes()):
            with_suppress(process.kill)
        for pid in self.roots:
            with_suppress(lambda pid=pid: os.waitpid(pid, 0))
        shutil.rmtree(self.folder, ignore_errors=True)


def with_suppress(call) -> None:
    try:
        call()
    except (psutil.Error, OSError):
        pass


class Direct(Peer):
    name = "direct"

    def start(self) -> None:
        self.address = f"127.0.0.1:{self.engines[0].port}"


class Tier(Peer):
    """The rescue tier alone, one process of it."""

    name = "ours: tier alone"
    processes_of_tier = 1

    def start(self) -> None:
        write_document(
            self.folder / "settings.json", Settings(fleet="b", host="127.0.0.1", port=self.port)
        )
        self.give_orders()
        words = [sys.executable, "-m", "launcher.gateway.tier", str(self.folder), str(self.folder)]
        for index in range(self.processes_of_tier):
            self.spawn(*words, str(index), str(index))
        self.address = str(self.folder / "tier-0.sock")
        for index in range(self.processes_of_tier):
            while not (self.folder / f"tier-{index}.sock").exists():
                time.sleep(0.05)
        time.sleep(1.2)  # its first look at the engines' health

    def give_orders(self, dead: int | None = None) -> None:
        members = [
            Member(name=f"m{n}", slot=n, url=engine.url, goal="dead" if n == dead else "serving")
            for n, engine in enumerate(self.engines)
        ]
        revision = 1 if dead is None else 2
        write_document(self.folder / "orders.json", Orders(revision=revision, members=members))

    def verdict(self, number: int) -> None:
        self.give_orders(dead=number)


class Front(Peer):
    """HAProxy straight to the engines, with the front's own rules; no tier."""

    name = "ours: front alone"

    def start(self) -> None:
        keys = keyring.added(Keys(), "b", KEY, 0)
        (self.folder / "keys.map").write_text(keyring.as_map(keys))
        places = FrontPlaces(
            str(self.folder / "front.sock"), str(self.folder / "keys.map"), ("/nowhere",)
        )
        text = render(Settings(fleet="b", host="127.0.0.1", port=self.port), places, 1)
        text = text[: text.index("\nbackend tier")] + "\nbackend tier\n  balance leastconn\n"
        text += "  option httpchk GET /health\n"
        for number, engine in enumerate(self.engines):
            text += f"  server e{number} 127.0.0.1:{engine.port} check inter 1s fall 2 rise 1\n"
        # Engines are asked on connections that stay; the tier is on this host and is not.
        text = text.replace("http-reuse never", "http-reuse safe")
        text = text.replace("  option http-server-close\n", "")
        (self.folder / "haproxy.cfg").write_text(text)
        binary = haproxy.find_binary()
        haproxy.check(binary, self.folder / "haproxy.cfg")
        self.spawn(binary, "-W", "-f", str(self.folder / "haproxy.cfg"))
        self.wait()

    def verdict(self, number: int) -> None:
        path = self.folder / "front.sock"
        haproxy.ask(path, f"set server tier/e{number} state maint")
        haproxy.ask(path, f"shutdown sessions server tier/e{number}")


class Both(Peer):
    """What ships: supervisor, front and tier."""

    name = "ours: both"

    def start(self) -> None:
        self.gateway = Gateway(GatewayPaths(self.folder))
        self.gateway.configure(Settings(fleet="b", host="127.0.0.1", port=self.port, drain_s=2))
        self.gateway.change_keys(lambda keys: keyring.added(keys, "b", KEY, 0))
        members = [
            Member(name=f"m{n}", slot=0, url=engine.url) for n, engine in enumerate(self.engines)
        ]
        self.gateway.give(Orders(members=with_slots((), members)))
        self.gateway.start()
        self.gateway.wait_until_up()
        owner = self.gateway.owner()
        assert owner is not None
        ours = [owner.supervisor, owner.front, *owner.tier]
        self.roots = [one.pid for one in ours if one is not None]
        self.wait()
        time.sleep(1.2)

    def verdict(self, number: int) -> None:
        self.gateway.dead(f"m{number}")

    def stop(self) -> None:
        self.gateway.stop(15)
        super().stop()


class VllmRouter(Peer):
    name = "vllm-router"

    def start(self) -> None:
        self.spawn(
            str(ROUTERS / "bin/vllm-router"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--policy", "power_of_two"),
            *("--worker-urls", *(engine.url for engine in self.engines)),
            *(*ROUTER_SETTINGS, "--prometheus-port", str(free_port())),
        )
        self.wait()


class Smg(Peer):
    name = "smg"

    def start(self) -> None:
        self.spawn(
            str(ROUTERS / "bin/smg"),
            *("launch", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--policy", "power_of_two", "--api-key", KEY),
            *("--worker-urls", *(engine.url for engine in self.engines)),
            *(*ROUTER_SETTINGS, "--prometheus-port", str(free_port())),
        )
        self.wait()


class LiteLlm(Peer):
    name = "litellm"

    def start(self) -> None:
        config = self.folder / "config.yaml"
        models = [
            {
                "model_name": "m",
                "litellm_params": {
                    "model": "openai/m",
                    "api_base": f"{engine.url}/v1",
                    "api_key": "x",
                },
            }
            for engine in self.engines
        ]
        routing = {"routing_strategy": "least-busy", "num_retries": 3}
        config.write_text(json.dumps({"model_list": models, "router_settings": routing}))
        self.spawn(
            str(LITELLM / "bin/litellm"),
            *("--config", str(config), "--host", "127.0.0.1", "--port", str(self.port)),
            environment={
                "LITELLM_LOG": "ERROR",
                "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            },
        )
        self.wait()


PEERS = (Direct, Front, Tier, Both, VllmRouter, Smg, LiteLlm)
