"""Partitions and nodes, from sinfo and scontrol. The parsers are pure."""

import re
from typing import Literal

from inventory import nodeset
from inventory.errors import InventoryError
from inventory.model import Node, Pool
from launcher.errors import SlurmError, SpecError
from launcher.slurm_tools import runner

SINFO_FORMAT = "%N|%T|%G|%l|%R|%E"
State = Literal["idle", "busy", "draining", "down", "unknown"]
_STATES: dict[str, State] = {
    "idle": "idle",
    "allocated": "busy",
    "mixed": "busy",
    "completing": "busy",
    "planned": "busy",
    "reserved": "busy",
    "draining": "draining",
    "drained": "draining",
    "maint": "draining",
    "down": "down",
    "fail": "down",
    "failing": "down",
    "error": "down",
    "future": "down",
    "powered_down": "down",
    "powering_down": "down",
    "powering_up": "down",
    "reboot": "down",
    "reboot_issued": "down",
}
# One symbol after the state: * no answer, $ maintenance, @ ^ reboot, ~ # % ! power, - planned.
_SUFFIXES: dict[str, State] = {
    "*": "down",
    "$": "draining",
    "@": "draining",
    "^": "down",
    "~": "idle",
    "#": "down",
    "%": "down",
    "!": "down",
    "-": "idle",
}


def read_partition(name: str | None) -> Pool:
    """The partition's nodes; the default partition where no name is given.

    Raises SpecError for a partition that does not exist, naming those that do.
    """
    pools = parse_sinfo(runner.run(["sinfo", "-h", "-N", "-o", SINFO_FORMAT]))
    if name is None:
        name = _default_partition()
    if name in pools:
        return pools[name]
    known = ", ".join(sorted(pools)) or "none"
    if name is None:
        raise SpecError(
            "the cluster has no default partition",
            where="backend.slurm.partition",
            hint=f"Write one of: {known}.",
        )
    raise SpecError(
        f"there is no partition {name!r}",
        where="backend.slurm.partition",
        hint=f"Partitions here: {known}.",
    )


def parse_sinfo(output: str) -> dict[str, Pool]:
    """Pools by partition name from `sinfo -N` rows of SINFO_FORMAT."""
    found: dict[str, dict[str, Node]] = {}
    limits: dict[str, int | None] = {}
    for line in output.splitlines():
        if not line.strip():
            continue
        fields = line.split("|", 5)
        if len(fields) != 6:
            raise SlurmError(f"sinfo printed a row that cannot be read: {line[:200]!r}")
        names, state, gres, limit, partition, reason = (field.strip() for field in fields)
        gpus, gpu_type = parse_gres(gres)
        try:
            expanded = nodeset.expand(names)
        except InventoryError as error:
            raise SlurmError(f"sinfo printed a node list that cannot be read: {error}") from error
        for name in expanded:
            found.setdefault(partition, {})[name] = Node(
                name=name,
                gpus=gpus,
                gpu_type=gpu_type,
                state=translate_state(state),
                state_reason="" if reason in ("none", "None") else reason,
            )
        limits[partition] = parse_limit(limit)
    return {
        name: Pool(
            name=name,
            nodes=tuple(sorted(nodes.values(), key=lambda node: nodeset.natural(node.name))),
            limit_s=limits[name],
        )
        for name, nodes in found.items()
    }


def translate_state(state: str) -> State:
    """Slurm's node state in our words; what we do not know is not usable."""
    text = state.lower()
    suffix = text[-1:] if text[-1:] in _SUFFIXES else ""
    base = _STATES.get(text.rstrip("".join(_SUFFIXES)), "unknown")
    if suffix and base == "idle":
        return _SUFFIXES[suffix]
    return "down" if suffix == "*" else base


def parse_gres(gres: str) -> tuple[int, str | None]:
    """`gpu:8`, `gpu:h100:8(S:0-1)`, `gpu:a100:4,shard:8` → (count, type); no GPU is 0."""
    total, kind = 0, None
    for part in re.split(r",(?![^(]*\))", gres):
        match = re.fullmatch(r"gpu(?::([A-Za-z][\w.\-]*))?(?::(\d+))?(?:\(.*\))?", part.strip())
        if match:
            total += int(match[2] or 1)
            kind = match[1] or kind
    return total, kind


def parse_limit(text: str) -> int | None:
    """`infinite`, `1-00:00:00`, `12:00:00`, `30:00` → seconds."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _default_partition() -> str | None:
    """The partition that sinfo marks with a star."""
    for row in runner.run(["sinfo", "-h", "-o", "%P"]).split():
        if row.endswith("*"):
            return row.rstrip("*")
    return None
