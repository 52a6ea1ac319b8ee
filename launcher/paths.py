"""Where everything of a fleet lies. Pure but for the environment of the caller's home.

$LAUNCHER_STATE_DIR (~/.local/state/launcher)
├── cache/engines/             compile caches, kept between runs: VERSIONS/GPU TYPE/MODEL
└── FLEET/
    ├── wish.json              what the user wants (the CLI writes, the controller reads)
    ├── status.json            what is (the controller writes, the CLI reads)
    ├── controller.json        who drives: host, pid, beat
    ├── controller-job.json    the Slurm job that it was asked for in, where it has one
    ├── secrets/               mode 0700: api_key, engine_key, agent_token, HF_TOKEN …
    ├── gateway/               the one address (launcher/gateway/places.py)
    └── runs/RUN/              one life of the fleet, from `up` to `down`
        ├── spec.json  record.json  journal.ndjson  controller.log
        ├── rendered/          byte for byte what `launcher render` writes
        └── r1.a1/             one allocation: what its agents see (their base folder)
            ├── agent.json     for every agent
            ├── secrets/       what agents and engine need
            └── nodes/NODE/    assignment.json  report.json  segments.json  logs/  evidence/
"""

import os
from dataclasses import dataclass
from pathlib import Path

from launcher.gateway.places import GatewayPaths

RUNS_KEPT = 5


def state_root() -> Path:
    """The folder of all fleets of this user."""
    named = os.environ.get("LAUNCHER_STATE_DIR")
    return Path(named).expanduser().absolute() if named else Path.home() / ".local/state/launcher"


@dataclass(frozen=True)
class NodePaths:
    """What lies in the folder of one node; the same on every backend."""

    root: Path

    @property
    def assignment(self) -> Path:
        return self.root / "assignment.json"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    @property
    def segments(self) -> Path:
        """What the engine has mapped in shared memory (launcher/agent/segments.py)."""
        return self.root / "segments.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def evidence(self) -> Path:
        """A folder for each generation that stalled or lost a peer (launcher/agent/bundle.py)."""
        return self.root / "evidence"


@dataclass(frozen=True)
class BasePaths:
    """What the agents of one allocation see: on a shared file system or on the node's own disk."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "agent.json"

    @property
    def secrets(self) -> Path:
        return self.root / "secrets"

    def node(self, name: str) -> NodePaths:
        return NodePaths(self.root / "nodes" / name)


@dataclass(frozen=True)
class RunPaths:
    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "spec.json"

    @property
    def record(self) -> Path:
        return self.root / "record.json"

    @property
    def journal(self) -> Path:
        return self.root / "journal.ndjson"

    @property
    def controller_log(self) -> Path:
        return self.root / "controller.log"

    @property
    def rendered(self) -> Path:
        return self.root / "rendered"

    def base(self, allocation: str) -> BasePaths:
        return BasePaths(self.root / allocation)


@dataclass(frozen=True)
class FleetPaths:
    root: Path

    @classmethod
    def of(cls, fleet: str) -> "FleetPaths":
        return cls(state_root() / fleet)

    @property
    def wish(self) -> Path:
        return self.root / "wish.json"

    @property
    def wish_lock(self) -> Path:
        return self.root / "wish.lock"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def controller(self) -> Path:
        return self.root / "controller.json"

    @property
    def lock(self) -> Path:
        return self.root / "controller.lock"

    @property
    def controller_job(self) -> Path:
        return self.root / "controller-job.json"

    @property
    def controller_job_lock(self) -> Path:
        return self.root / "controller-job.lock"

    @property
    def heir(self) -> Path:
        """Which job of the controller waits for the wheel."""
        return self.root / "controller-heir.json"

    @property
    def secrets(self) -> Path:
        return self.root / "secrets"

    @property
    def gateway(self) -> GatewayPaths:
        return GatewayPaths(self.root / "gateway")

    @property
    def api_key(self) -> Path:
        return self.secrets / "api_key"

    def run(self, number: int) -> RunPaths:
        return RunPaths(self.root / "runs" / str(number))
