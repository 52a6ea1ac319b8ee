"""Where everything of a gateway lies. Pure but for names from the environment.

FLEET/gateway/            beside the fleet's runs: it outlives them
├── orders.json  keys.json  settings.json     what it shall do
├── state.json   owner.json                   what it does, and with which processes
├── fallback_key                              mode 0600
└── gateway.log  front.log                    rotated

/tmp/launcher-UID/gateway-…/    its host's own disk: sockets, counters, haproxy.cfg; mode 0700
/tmp/launcher-UID/gateway-…-PORT.lock        one owner for each port of this network namespace
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

LOG_MAX_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class GatewayPaths:
    root: Path

    @property
    def orders(self) -> Path:
        return self.root / "orders.json"

    @property
    def keys(self) -> Path:
        return self.root / "keys.json"

    @property
    def keys_lock(self) -> Path:
        return self.root / "keys.lock"

    @property
    def settings(self) -> Path:
        return self.root / "settings.json"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def owner(self) -> Path:
        return self.root / "owner.json"

    @property
    def log(self) -> Path:
        return self.root / "gateway.log"

    @property
    def front_log(self) -> Path:
        return self.root / "front.log"

    @property
    def fallback_key(self) -> Path:
        return self.root / "fallback_key"

    @property
    def run_folder(self) -> Path:
        """Short enough for sockets, on this host's own disk, and the same for each start."""
        seed = hashlib.sha256(str(self.root).encode()).hexdigest()[:10]
        return private_root() / f"gateway-{seed}"


@dataclass(frozen=True)
class RunFolder:
    """What the gateway's processes share on their host."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "haproxy.cfg"

    @property
    def front_socket(self) -> Path:
        return self.root / "front.sock"

    @property
    def keys_map(self) -> Path:
        return self.root / "keys.map"

    @property
    def certificate(self) -> Path:
        return self.root / "certificate.pem"

    @property
    def counters(self) -> Path:
        return self.root / "counters"

    def tier_socket(self, index: int) -> Path:
        return self.root / f"tier-{index}.sock"

    def admin_socket(self, pid: int) -> Path:
        return self.root / f"admin-{pid}.sock"


def private_root() -> Path:
    """A folder of this user on this host, whichever state folder a fleet has."""
    return Path("/tmp") / f"launcher-{os.getuid()}"


def port_lock(port: int) -> Path:
    """The lock of a port. Ports belong to a network namespace, and a host may have several."""
    try:
        namespace = Path("/proc/self/ns/net").stat().st_ino
    except OSError:
        namespace = 0
    return private_root() / f"gateway-{namespace}-{port}.lock"
