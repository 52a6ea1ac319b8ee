"""The faults that a host's hardware can be given, by name, with the finding that each must cause.

`python -m tests.cluster gpu HOST INDEX FAULT` gives one, `… gpu HOST - heal` takes all back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import hardware

Change = Callable[[Path, int], None]


@dataclass(frozen=True)
class Fault:
    """One fault: what it does to a host's tree, and what the checks must say about it."""

    name: str
    words: str
    change: Change
    check: str
    device: str  # "{gpu}" is the GPU's index, "{port}" the port's name
    verdict: str = "unhealthy"
    advice: str = ""


def _set(**values: object) -> Change:
    """Values of one GPU; a double underscore stands for a dot."""

    def change(root: Path, index: int) -> None:
        state = hardware.read_state(root)
        for name, value in values.items():
            state[f"gpu.{index}.{name.replace('__', '.')}"] = str(value)
        hardware.write_state(root, state)

    return change


def _whole(**values: object) -> Change:
    """Values of the whole node."""

    def change(root: Path, index: int) -> None:
        state = hardware.read_state(root)
        state |= {name.replace("__", "."): str(value) for name, value in values.items()}
        hardware.write_state(root, state)

    return change


def _port(file: str, text: str) -> Change:
    def change(root: Path, index: int) -> None:
        path = root / f"infiniband/mlx5_{index % hardware.RAILS}/ports/1" / file
        path.write_text(text + "\n")

    return change


def _grows(name: str, file: str, step: int) -> Change:
    """A counter that grows while it is watched."""

    def change(root: Path, index: int) -> None:
        hardware.start_ticking(root, name, index, file, step)

    return change


def _roce(root: Path, index: int) -> None:
    """All rails become RoCE; one of them loses its IPv4 GID."""
    for rail in range(hardware.RAILS):
        port = root / f"infiniband/mlx5_{rail}/ports/1"
        (port / "link_layer").write_text("Ethernet\n")
    port = root / f"infiniband/mlx5_{index % hardware.RAILS}/ports/1"
    (port / "gids/3").write_text("0000:0000:0000:0000:0000:0000:0000:0000\n")


def _xid(code: int, lost: bool = False) -> Change:
    def change(root: Path, index: int) -> None:
        hardware.send_xid(root, index, code)
        if lost:
            _set(rc=15)(root, index)

    return change


def _kernel(text: str) -> Change:
    return lambda root, index: hardware.say_to_kernel(root, text)


def _drive(root: Path, index: int) -> None:
    (root / "nvme/nvme0/state").write_text("dead\n")


GPU = "GPU {gpu}"
PORT = "mlx5_{rail}/1"
FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "lost",
            "the GPU does not answer (NVML 15)",
            _set(rc=15),
            "gpu.lost",
            GPU,
            advice="reboot",
        ),
        Fault(
            "reset-required",
            "NVML asks for a reset (16)",
            _set(rc=16),
            "gpu.lost",
            GPU,
            advice="reset GPU",
        ),
        Fault(
            "xid-79",
            "fallen off the bus",
            _xid(79, lost=True),
            "gpu.xid",
            "GPU 0000:{bus}:00",
            advice="reboot",
        ),
        Fault(
            "xid-95",
            "uncontained ECC error",
            _xid(95),
            "gpu.xid",
            "GPU 0000:{bus}:00",
            advice="reset GPU",
        ),
        Fault(
            "xid-31",
            "page fault of an application",
            _xid(31),
            "gpu.xid",
            "GPU 0000:{bus}:00",
            "degraded",
            "look at the application",
        ),
        Fault(
            "recovery",
            "the driver wants a reboot (field 230)",
            _set(field__230=2),
            "gpu.recovery",
            GPU,
            advice="reboot",
        ),
        Fault(
            "ecc",
            "uncorrectable errors",
            _set(ecc_uncorrected_volatile=3),
            "gpu.ecc",
            GPU,
            advice="reset GPU",
        ),
        Fault(
            "ecc-off",
            "ECC switched off",
            _set(ecc=0, ecc_pending=0),
            "gpu.ecc_mode",
            GPU,
            "degraded",
            "fix configuration",
        ),
        Fault(
            "sram",
            "SRAM threshold exceeded",
            _set(sram_exceeded=1),
            "gpu.sram",
            GPU,
            advice="inspect or RMA",
        ),
        Fault(
            "remap-pending",
            "row remap pending",
            _set(remap_pending=1),
            "gpu.remap_pending",
            GPU,
            "degraded",
            "reset GPU",
        ),
        Fault(
            "remap-failed",
            "row remap failed",
            _set(remap_failed=1),
            "gpu.remap_failed",
            GPU,
            advice="inspect or RMA",
        ),
        Fault(
            "remap-full",
            "no spare rows",
            _set(remap_uncorrected=512),
            "gpu.remap_total",
            GPU,
            advice="inspect or RMA",
        ),
        Fault(
            "retired",
            "64 retired pages",
            _set(retired_single=40, retired_double=24),
            "gpu.retired_pages",
            GPU,
            advice="inspect or RMA",
        ),
        Fault(
            "repair",
            "channel repair pending",
            _set(repair_pending=1),
            "gpu.repair",
            GPU,
            "degraded",
            "reset GPU",
        ),
        Fault(
            "nvlink", "one NVLink down", _set(nvlink__4=0), "gpu.nvlink", GPU, advice="reset GPU"
        ),
        Fault(
            "nvlink-errors",
            "NVLink replays grow",
            _grows("nvml", "nvlink.4.replay", 7),
            "gpu.nvlink_errors",
            GPU,
            "degraded",
            "inspect or RMA",
        ),
        Fault(
            "fabric",
            "fabric manager not done",
            _set(fabric_state=2),
            "gpu.fabric",
            GPU,
            advice="fix configuration",
        ),
        Fault(
            "throttle",
            "hardware thermal slowdown",
            _set(clock_events=0x48),
            "gpu.clocks",
            GPU,
            advice="inspect or RMA",
        ),
        Fault(
            "hot", "beyond the slowdown temperature", _set(thermal_margin=-5), "gpu.thermal", GPU
        ),
        Fault(
            "pcie-width",
            "PCIe x8",
            _set(pcie_width=8),
            "gpu.pcie_width",
            GPU,
            advice="inspect or RMA",
        ),
        Fault(
            "pcie-replay",
            "PCIe replays grow",
            _grows("nvml", "pcie_replay", 40),
            "gpu.pcie_replay",
            GPU,
            "degraded",
            "inspect or RMA",
        ),
        Fault(
            "power-limit",
            "limit lowered",
            _set(power_limit_mw=400_000),
            "gpu.power_limit",
            GPU,
            "degraded",
            "fix configuration",
        ),
        Fault("mig", "MIG on", _set(mig=1), "gpu.mig", GPU, advice="fix configuration"),
        Fault(
            "exclusive",
            "compute mode exclusive",
            _set(compute_mode=3),
            "gpu.compute_mode",
            GPU,
            advice="fix configuration",
        ),
        Fault(
            "persistence",
            "persistence mode off",
            _set(persistence=0),
            "gpu.persistence",
            GPU,
            "degraded",
            "fix configuration",
        ),
        Fault(
            "foreign",
            "somebody's process (PID 1)",
            _set(process=1, process_memory=2 * 1024**3, memory_used=3 * 1024**3),
            "gpu.processes",
            GPU,
            advice="clean up",
        ),
        Fault(
            "memory",
            "memory of no process",
            _set(memory_used=9 * 1024**3),
            "gpu.memory",
            GPU,
            advice="reset GPU",
        ),
        Fault("count", "seven of eight answer", _whole(gpus=7), "gpu.count", "", advice="reboot"),
        Fault(
            "driver", "library and driver differ", _whole(rc=18), "gpu.driver", "", advice="reboot"
        ),
        Fault(
            "hang",
            "an NVML call never returns",
            _whole(hang__nvmlDeviceGetMemoryInfo=1),
            "gpu.hang",
            "",
            advice="reboot",
        ),
        Fault(
            "port-down",
            "port down",
            _port("state", "1: DOWN"),
            "ib.state",
            PORT,
            advice="inspect or RMA",
        ),
        Fault(
            "port-init",
            "no subnet manager",
            _port("state", "2: INIT"),
            "ib.state",
            PORT,
            advice="fix configuration",
        ),
        Fault(
            "port-rate",
            "half rate",
            _port("rate", "200 Gb/sec (4X HDR)"),
            "ib.rate",
            PORT,
            advice="inspect or RMA",
        ),
        Fault(
            "port-errors",
            "symbol errors grow",
            _grows("ib", "counters/symbol_error", 200),
            "ib.errors",
            PORT,
            advice="inspect or RMA",
        ),
        Fault(
            "port-flaps",
            "the link goes down and up",
            _grows("ib", "counters/link_downed", 1),
            "ib.link_downed",
            PORT,
            advice="inspect or RMA",
        ),
        Fault(
            "gid", "RoCE without its IPv4 GID", _roce, "ib.gid", PORT, advice="fix configuration"
        ),
        Fault(
            "mlx5",
            "a dead adapter in the kernel log",
            _kernel("mlx5_core 0000:0c:00.0: unrecoverable hardware error."),
            "kernel.log",
            "",
            advice="reboot",
        ),
        Fault("nvme", "a drive that died", _drive, "nvme.state", "nvme0", advice="inspect or RMA"),
    )
}


def give(host: str, index: int, name: str) -> Fault:
    """Give the host this fault. KeyError for a name that is none."""
    fault = FAULTS[name]
    fault.change(hardware.tree(host), index)
    return fault


def device_of(fault: Fault, index: int) -> str:
    """The device that the finding must name."""
    return fault.device.format(gpu=index, rail=index % hardware.RAILS, bus=f"{index + 1:02x}")
