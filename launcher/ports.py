"""Every port that a replica uses on a node, in blocks below the ephemeral range. Pure.

20000 to 31999 is cut into 120 blocks of 100. A replica takes the block that its name falls on
and, when a port of it is busy, the next; each node proves the block free before the engine starts
and holds its last port while it works, so that two fleets never settle on the same block. When
one machine plays several nodes, each takes a block of its own.
"""

import hashlib

FIRST = 20_000
BLOCK = 100
SLOTS = 120
COLLECTIVE = FIRST - 1  # where nodes meet that no fleet uses yet

_OFFSETS = {
    "rendezvous": 0,  # Ray's GCS, or vLLM's --master-port
    "api": 1,
    "node_manager": 2,
    "object_manager": 3,
    "runtime_env_agent": 4,
    "dashboard_agent_http": 5,
    "dashboard_agent_grpc": 6,
    "metrics": 7,
    "ray_client": 8,
    "dashboard": 9,
    "data_parallel_rpc": 11,
    "collective": 12,
    "vllm_first": 15,  # vLLM counts up from here
    "worker_first": 40,
    "worker_last": 98,
    "guard": 99,
}
# Those that must be free before anything starts; the ranges are taken as needed.
_CHECKED = tuple(name for name in _OFFSETS if name not in ("vllm_first", "worker_first"))


def preferred_slot(user_id: int, fleet: str, replica: str) -> int:
    """The block that this replica tries first: the same each time, different between fleets."""
    digest = hashlib.sha256(f"{user_id}/{fleet}/{replica}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % SLOTS


def block(slot: int) -> dict[str, int]:
    """Port by purpose."""
    base = FIRST + (slot % SLOTS) * BLOCK
    return {name: base + offset for name, offset in _OFFSETS.items()}


def to_check(ports: dict[str, int], *, leader: bool) -> tuple[int, ...]:
    """The ports that must be free on a node before the engine starts there."""
    return tuple(ports[name] for name in _CHECKED if leader or name != "api")
