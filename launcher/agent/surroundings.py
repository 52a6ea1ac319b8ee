"""What the agent knows about its node, and the environment of what it starts there."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from launcher.agent.processes import scratch_root
from launcher.documents import Member

# Variables of an enclosing job that would confuse what the engine starts.
_NOT_INHERITED = ("SBATCH_", "LAUNCHER_", "RAY_", "VLLM_", "PYTHON", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Surroundings:
    """What the agent knows about its node that every process of an engine is told."""

    node: str
    base: Path
    logs: Path
    evidence: Path
    cache: Path
    mark: str
    environment: dict[str, str]
    secrets: dict[str, str]

    def environment_in(self, scratch: Path) -> dict[str, str]:
        """What every process of an engine gets, whichever rank it will be; no secret."""
        folder = str(scratch)
        return {
            **self.environment,
            "TMPDIR": folder,
            "VLLM_RPC_BASE_PATH": folder,
            "VLLM_CONFIG_ROOT": str(self.cache / "vllm-config"),
            "LAUNCHER_NODE": self.node,
            "LAUNCHER_TMP": folder,
            "LAUNCHER_BASE": str(self.base),
            "LAUNCHER_CACHE": str(self.cache),
            "LAUNCHER_SECRETS": str(self.base / "secrets"),
            "LAUNCHER_MARK": self.mark,
        }

    def environment_of(self, member: Member, command: str, scratch: Path) -> dict[str, str]:
        """What this command of this rank gets."""
        leader_ports = {f"LEADER_PORT_{k.upper()}": str(v) for k, v in member.ports.items()}
        named = {
            "NODE_RANK": str(member.rank),
            "NODES": str(member.size),
            "NODE_ADDRESS": member.address,
            "LEADER_ADDRESS": member.leader_address,
            "RANKS_PER_NODE": str(member.ranks_per_node),
            **leader_ports,
            **{f"PORT_{k.upper()}": str(v) for k, v in own_ports(member).items()},
        }
        secret = self.secrets_of(member.secret_environment)
        if command != "serve":
            secret.pop("VLLM_API_KEY", None)
        interface = member.interface
        return {
            **self.environment_in(scratch),
            "GLOO_SOCKET_IFNAME": interface,
            "TP_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": f"={interface}",
            **{f"LAUNCHER_{name}": value for name, value in named.items()},
            **secret,
        }

    def secrets_of(self, names: dict[str, str]) -> dict[str, str]:
        """Variables with the secrets that they are to hold, as far as these are known here."""
        return {
            variable: self.secrets[name]
            for variable, name in names.items()
            if name in self.secrets
        }


def clean_environment() -> dict[str, str]:
    """The environment of the node's user, without what belongs to another program or launcher."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)
    }


def own_ports(member: Member) -> dict[str, int]:
    """The ports of this rank: the leader's block, moved where one machine plays several nodes."""
    offset = member.guard_port - member.ports["guard"]
    return {name: port if name == "api" else port + offset for name, port in member.ports.items()}


def scratch_folder(mark: str, use: str) -> Path:
    """A short folder of our own: a Unix socket's path has room for 107 bytes, Ray's need 60."""
    seed = f"{mark}/{use}".encode()
    return scratch_root() / f"fl-{os.getuid()}-{hashlib.sha256(seed).hexdigest()[:8]}"
