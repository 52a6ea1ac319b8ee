"""What a node and a pool are: frozen records, the same for every backend. Pure."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

NodeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.\-]{0,252})$")]


class Record(BaseModel):
    """Base of every record: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SshAddress(Record):
    """How a host is reached. What is not written comes from the user's ssh_config."""

    host: str
    user: str | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    key_file: str | None = None
    jump_host: str | None = None


class Node(Record):
    """One machine. `state` is filled by observation; unknown is a value."""

    name: NodeName
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    gpu_type: str | None = None
    ssh: SshAddress | None = None
    nvme: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    switch: str | None = None
    rack: str | None = None
    state: Literal["idle", "busy", "draining", "down", "unknown"] = "unknown"
    state_reason: str = ""


class Pool(Record):
    """Nodes of one kind: a Slurm partition or a host list. `limit_s` is its walltime limit."""

    name: str
    nodes: tuple[Node, ...]
    limit_s: int | None = None

    def named(self, name: str) -> Node | None:
        return next((node for node in self.nodes if node.name == name), None)


class Inventory(Record):
    """All pools that we know."""

    pools: tuple[Pool, ...]
    ssh_config_path: Path | None = None

    def pool(self, name: str) -> Pool | None:
        return next((pool for pool in self.pools if pool.name == name), None)
