"""GPU probes by NVML. Never raise; a missing driver is `unknown`, not healthy and not broken."""

from typing import Any

from health.report import Finding


def count_gpus() -> int | None:
    """How many GPUs NVML sees; None where there is no NVML to ask."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def check_gpu_count(found: int | None, needed: int) -> Finding:
    """Whether the node has the GPUs that its ranks need."""
    if found is None:
        return Finding(
            check="gpus", verdict="unknown", message="NVML does not answer; GPUs not counted"
        )
    if found < needed:
        return Finding(
            check="gpus",
            verdict="unhealthy",
            message=f"{found} GPUs found, {needed} needed",
            hint="Check `nvidia-smi` on the node, or correct gpus_per_node.",
        )
    return Finding(check="gpus", verdict="healthy", message=f"{found} GPUs")


def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
