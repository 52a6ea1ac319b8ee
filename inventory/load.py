"""Read an inventory file (YAML) into an Inventory. I/O at the edge; errors name file and key.

version: 1
defaults: {user: ml, gpus: 8, nvme: [/nvme0, /nvme1]}
pools:
  default:
    - gpu-a[001-004]                       # folded names take every default
    - {name: gpu-b1, host: 10.0.0.9, port: 2222, gpus: 4, switch: sw2}
"""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from inventory import nodeset
from inventory.errors import InventoryError
from inventory.model import Inventory, Node, Pool, SshAddress

FILE_MAX_BYTES = 4 * 1024 * 1024


class _Entry(BaseModel):
    """One host, or a folded range of hosts, as written in the file."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    host: str | None = None
    user: str | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    key_file: str | None = None
    jump_host: str | None = None
    gpus: Annotated[int, Field(ge=0, le=64)] | None = None
    gpu_type: str | None = None
    nvme: tuple[str, ...] | None = None
    labels: dict[str, str] | None = None
    switch: str | None = None
    rack: str | None = None


def _named(entry: Any) -> Any:
    """`gpu-a[001-004]` is short for `{name: gpu-a[001-004]}`."""
    return {"name": entry} if isinstance(entry, str) else entry


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(ge=1, le=1)] = 1
    ssh_config: str | None = None
    defaults: _Entry = _Entry()
    pools: dict[str, list[Annotated[_Entry, BeforeValidator(_named)]]]


def load(path: Path) -> Inventory:
    """The inventory in this file. Raises InventoryError with file and key."""
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise InventoryError(f"is larger than {FILE_MAX_BYTES} bytes", where=str(path))
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InventoryError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            hint="Name the file in backend.ssh.inventory.",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InventoryError(f"is not YAML: {error}", where=str(path)) from error
    try:
        file = _File.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InventoryError(f"{key}: {first['msg']}", where=str(path)) from error
    pools = tuple(
        Pool(name=name, nodes=tuple(_nodes(name, entries, file.defaults, path)))
        for name, entries in file.pools.items()
    )
    if not pools:
        raise InventoryError(
            "has no pools", where=str(path), hint="Write `pools: {default: […]}`."
        )
    config = (path.parent / Path(file.ssh_config).expanduser()) if file.ssh_config else None
    if config is not None and not config.is_file():
        raise InventoryError(f"ssh_config: there is no {config}", where=str(path))
    return Inventory(pools=pools, ssh_config_path=config.absolute() if config else None)


def _nodes(pool: str, entries: list[_Entry], defaults: _Entry, path: Path) -> list[Node]:
    nodes: dict[str, Node] = {}
    for position, entry in enumerate(entries):
        where = f"{path}: pools.{pool}[{position}]"
        if not entry.name:
            raise InventoryError("has no name", where=where)
        try:
            names = nodeset.expand(entry.name)
        except InventoryError as error:
            raise InventoryError(str(error), where=where) from error
        if len(names) > 1 and entry.host:
            raise InventoryError("a range of names cannot share one host", where=where)
        for name in names:
            if name in nodes:
                raise InventoryError(f"{name} is listed twice", where=where)
            nodes[name] = _node(name, entry, defaults, path.parent)
    return list(nodes.values())


def _node(name: str, entry: _Entry, defaults: _Entry, folder: Path) -> Node:
    def value(field: str) -> Any:
        own = getattr(entry, field)
        return own if own is not None else getattr(defaults, field)

    key_file = value("key_file")
    return Node(
        name=name,
        gpus=value("gpus") or 0,
        gpu_type=value("gpu_type"),
        nvme=value("nvme") or (),
        labels={**(defaults.labels or {}), **(entry.labels or {})},
        switch=value("switch"),
        rack=value("rack"),
        ssh=SshAddress(
            host=entry.host or name,
            user=value("user"),
            port=value("port"),
            key_file=str((folder / Path(key_file).expanduser()).absolute()) if key_file else None,
            jump_host=value("jump_host"),
        ),
    )
