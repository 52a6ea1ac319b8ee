"""A CPU communicator that uses shared memory only between ranks that share a machine's memory."""

import socket
from pathlib import Path

import torch.distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def memory_identity() -> str:
    """Equal for two processes exactly when they see the same /dev/shm."""
    return f"{socket.gethostname()}/{Path('/dev/shm').stat().st_dev}"


class SameMemoryCpuCommunicator(CpuCommunicator):
    """vLLM compares the names of the segments only, and with Ray these agree across hosts."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        found: list[str | None] = [None] * self.world_size
        torch.distributed.all_gather_object(found, memory_identity(), group=self.cpu_group)
        same_memory = len(set(found)) == 1
        return super()._all_group_ranks_share_shm_group_name() and same_memory
