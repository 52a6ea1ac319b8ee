"""Checks of GPUs. Pure. Sources: research/health tables a1 and a2, NVIDIA's deployment guides.

Severity answers one question: can a new engine start here, and must a serving one end? A row remap
that is pending waits for an idle window; a lost GPU waits for nothing.
"""

from collections.abc import Iterator

from health import xids
from health.checks.base import Check, Ground, Said
from health.evidence import Gpu, Gpus, Xid
from health.report import Advice

_RECOVERY: dict[int, tuple[str, Advice]] = {
    1: ("GPU reset", "reset GPU"),
    2: ("node reboot", "reboot"),
    3: ("drain peer-to-peer", "reset GPU"),
    4: ("drain and reset", "reset GPU"),
    5: ("recover IMEX domain", "fix configuration"),
    6: ("bus reset", "reboot"),
    7: ("system reboot", "reboot"),
}
_LOST_ADVICE: dict[str, Advice] = {
    "GPU_IS_LOST": "reboot",
    "RESET_REQUIRED": "reset GPU",
    "CORRUPTED_INFOROM": "inspect or RMA",
    "IRQ_ISSUE": "fix configuration",
}
# NVML's clock event reasons that mean hardware protects itself: HW slowdown 0x8, SW thermal 0x20,
# HW thermal 0x40, HW power brake 0x80. Idle (0x1) and the power cap (0x4) are ordinary.
_SLOWED = {0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal"}
_SLOWED |= {0x80: "power brake"}
_FABRIC_DONE = 3  # NVML_GPU_FABRIC_STATE_COMPLETED
_FABRIC_UNHEALTHY = 2
_COMPUTE_DEFAULT = 0


def _driver(gpus: Gpus, ground: Ground) -> Iterator[Said]:
    if gpus.error:
        mismatch = "mismatch" in gpus.error.lower()
        yield Said(
            "unhealthy",
            f"NVML does not answer: {gpus.error}",
            value=gpus.error,
            advice="reboot" if mismatch else "fix configuration",
            hint="After a driver update the node must boot."
            if mismatch
            else "Is the NVIDIA driver installed and loaded?",
        )


def _count(gpus: Gpus, ground: Ground) -> Iterator[Said]:
    if gpus.error or gpus.count is None:
        return
    needed = ground.needs.gpus
    # Within a job's device cgroup NVML sees the job's GPUs, the PCI bus all of the node's.
    given = len(gpus.visible.split(",")) if gpus.visible else None
    in_job = given is not None and gpus.count >= given
    if gpus.pci_count and gpus.count < gpus.pci_count and not in_job:
        yield Said(
            "unhealthy",
            f"{gpus.count} GPUs answer, {gpus.pci_count} are on the PCI bus",
            value=gpus.count,
            threshold=gpus.pci_count,
            advice="reboot",
        )
    elif needed is not None and gpus.count < needed:
        yield Said(
            "unhealthy",
            f"{gpus.count} GPUs found, {needed} needed",
            value=gpus.count,
            threshold=needed,
            advice="inspect or RMA",
            hint="Check `nvidia-smi` on the node, or correct gpus_per_node.",
        )


def _lost(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.error:
        advice = _LOST_ADVICE.get(gpu.error, "inspect or RMA")
        yield Said("unhealthy", f"does not answer: {gpu.error}", value=gpu.error, advice=advice)


def _recovery(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.recovery_action:
        name, advice = _RECOVERY.get(
            gpu.recovery_action, (f"action {gpu.recovery_action}", "inspect or RMA")
        )
        yield Said("unhealthy", f"the driver asks for: {name}", name, "none", advice)


def _ecc_mode(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.ecc_mode is None:
        return
    current, pending = gpu.ecc_mode
    if current != pending:
        message = "an ECC mode change waits for a reset"
        yield Said("degraded", message, current, pending, "reset GPU")
    elif not current:
        yield Said("degraded", "ECC is off", "off", "on", "fix configuration")


def _ecc(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.ecc_uncorrected_volatile:
        count = gpu.ecc_uncorrected_volatile
        yield Said(
            "degraded" if ground.needs.serving else "unhealthy",
            f"{count} uncorrectable memory errors since the driver started",
            count,
            0,
            "reset GPU",
        )
    corrected = gpu.ecc_corrected_volatile or 0
    if corrected > ground.limits.ecc_corrected_warn:
        message = f"{corrected} corrected memory errors since the driver started"
        yield Said("degraded", message, corrected, ground.limits.ecc_corrected_warn)


def _sram(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.sram_threshold_exceeded:
        message = "SRAM errors are over the driver's threshold"
        yield Said("unhealthy", message, "exceeded", "not exceeded", "inspect or RMA")


def _remap_pending(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    # NVIDIA's guide: work continues unaffected, and new work may start.
    if gpu.remapped_rows and gpu.remapped_rows[2]:
        message = "a row remap waits for the next reset"
        yield Said("degraded", message, "pending", "none", "reset GPU")


def _remap_failed(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.remapped_rows and gpu.remapped_rows[3]:
        yield Said("unhealthy", "row remap failed", "failed", "none", "inspect or RMA")


def _remap_total(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.remapped_rows and gpu.remapped_rows[1] >= ground.limits.remapped_rows_max:
        rows, limit = gpu.remapped_rows[1], ground.limits.remapped_rows_max
        message = f"{rows} rows remapped after uncorrectable errors: no spare is left"
        yield Said("unhealthy", message, rows, limit, "inspect or RMA")


def _retired(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    pages = gpu.retired_pages or 0
    if pages >= ground.limits.retired_pages_max:
        message = f"{pages} memory pages retired"
        limit = ground.limits.retired_pages_max
        yield Said("unhealthy", message, pages, limit, "inspect or RMA")
    elif pages >= ground.limits.retired_pages_warn or gpu.retired_pending:
        message = f"{pages} memory pages retired" + (", more pending" * bool(gpu.retired_pending))
        yield Said("degraded", message, pages, ground.limits.retired_pages_warn, "reset GPU")


def _repair(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.repair_pending:
        yield Said("degraded", "a repair waits for a reset", "pending", "none", "reset GPU")


def _nvlink(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.nvlinks is None:
        return
    down = [number for number, is_up in enumerate(gpu.nvlinks) if not is_up]
    most = max(
        (sum(other.nvlinks) for other in _gpus(ground) if other.nvlinks is not None), default=0
    )
    # All links of all GPUs inactive is how a PCIe card without a bridge looks: healthy.
    if down and most:
        listed = ", ".join(map(str, down[:6]))
        message = f"NVLink {listed} down ({len(gpu.nvlinks) - len(down)} of {len(gpu.nvlinks)} up)"
        yield Said("unhealthy", message, len(gpu.nvlinks) - len(down), most, "reset GPU")


def _nvlink_errors(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    bad = {name: grown for name, grown in gpu.grown.items() if name.startswith("nvlink.")}
    bad = {name: grown for name, grown in bad.items() if grown > ground.limits.nvlink_errors_max}
    for name, grown in sorted(bad.items())[:3]:
        _, link, kind = name.split(".")
        seconds = ground.evidence.gpus.window_s if ground.evidence.gpus else 0
        message = f"NVLink {link}: {grown} {kind} errors within {seconds:.0f} s"
        yield Said("degraded", message, grown, ground.limits.nvlink_errors_max, "inspect or RMA")


def _fabric(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.fabric_state is None or gpu.fabric_state == 0:  # 0: not a fabric GPU
        return
    if gpu.fabric_state != _FABRIC_DONE:
        state = {1: "not started", 2: "in progress"}.get(gpu.fabric_state, str(gpu.fabric_state))
        yield Said(
            "unhealthy",
            f"NVSwitch fabric registration {state}",
            state,
            "completed",
            "fix configuration",
            "Is nvidia-fabricmanager running, of the driver's version?",
        )
    elif gpu.fabric_status:
        message = f"NVSwitch fabric status {gpu.fabric_status}"
        yield Said("unhealthy", message, gpu.fabric_status, 0, "fix configuration")
    elif gpu.fabric_health == _FABRIC_UNHEALTHY:
        yield Said("unhealthy", "NVSwitch fabric unhealthy", "unhealthy", "healthy", "reset GPU")


def _clocks(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    mask = gpu.clock_event_reasons or 0
    reasons = [name for bit, name in _SLOWED.items() if mask & bit]
    if reasons:
        # At rest a node has no reason to slow down; while serving it may be brief.
        yield Said(
            "degraded" if ground.needs.serving else "unhealthy",
            f"clocks are held down: {', '.join(reasons)}",
            hex(mask),
            "none of 0xe8",
            "inspect or RMA",
            "Look at cooling and power supply.",
        )


def _thermal(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.thermal_margin_c is not None and gpu.slowdown_margin_c is not None:
        left = gpu.thermal_margin_c - gpu.slowdown_margin_c
        if left < 0:
            message = f"{-left} °C beyond the slowdown temperature"
            yield Said("unhealthy", message, gpu.thermal_margin_c, gpu.slowdown_margin_c)
        elif left < ground.limits.thermal_margin_warn_c:
            message = f"{left} °C below the slowdown temperature"
            yield Said("degraded", message, left, ground.limits.thermal_margin_warn_c)
    elif (gpu.temperature_c or 0) > ground.limits.temperature_warn_c:
        limit = ground.limits.temperature_warn_c
        yield Said("degraded", f"{gpu.temperature_c} °C", gpu.temperature_c, limit)


def _pcie_width(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    # The generation drops at idle, the width does not.
    if gpu.pcie_width and gpu.pcie_width_max and gpu.pcie_width < gpu.pcie_width_max:
        message = f"PCIe x{gpu.pcie_width} of x{gpu.pcie_width_max}"
        yield Said("unhealthy", message, gpu.pcie_width, gpu.pcie_width_max, "inspect or RMA")


def _pcie_replay(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    grown = gpu.grown.get("pcie.replay", 0)
    seconds = ground.evidence.gpus.window_s if ground.evidence.gpus else 0.0
    limit = ground.limits.pcie_replays_per_minute_max
    per_minute = grown * 60 / seconds if seconds else 0.0
    if per_minute > limit:
        message = f"{per_minute:.0f} PCIe replays per minute"
        yield Said("degraded", message, round(per_minute), limit, "inspect or RMA")


def _power_limit(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if not gpu.power_limit_w or not gpu.power_limit_default_w:
        return
    ratio = gpu.power_limit_w / gpu.power_limit_default_w
    if ratio < ground.limits.power_limit_ratio_min:
        yield Said(
            "degraded",
            f"power limit {gpu.power_limit_w:.0f} W of {gpu.power_limit_default_w:.0f} W",
            round(gpu.power_limit_w),
            round(gpu.power_limit_default_w),
            "fix configuration",
        )


def _mig(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.mig_mode is not None and any(gpu.mig_mode):
        message = "MIG is on" if gpu.mig_mode[0] else "MIG will be on after the next reset"
        yield Said("unhealthy", message, "on", "off", "fix configuration")


def _compute_mode(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.compute_mode is not None and gpu.compute_mode != _COMPUTE_DEFAULT:
        name = {1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}.get(
            gpu.compute_mode, str(gpu.compute_mode)
        )
        yield Said("unhealthy", f"compute mode {name}", name, "default", "fix configuration")


def _persistence(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if gpu.persistence_mode == 0:
        message = "persistence mode is off: each first use costs seconds"
        yield Said("degraded", message, "off", "on", "fix configuration")


def _processes(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    if not _is_wanted(gpu, ground):
        return
    for process in (p for p in gpu.processes or () if not p.ours):
        took = f", {process.memory_bytes // 1024**2} MiB" if process.memory_bytes else ""
        # Where one machine plays several nodes, it may well be our own neighbour.
        yield Said(
            "degraded" if ground.needs.shares_machine else "unhealthy",
            f"in use by {process.name} (pid {process.pid}, {process.user}{took})",
            process.pid,
            "none but ours",
            "clean up",
        )
        return


def _memory(gpu: Gpu, ground: Ground) -> Iterator[Said]:
    limit = ground.limits.gpu_memory_used_bytes_max
    if gpu.processes or gpu.memory_used_bytes is None or not _is_wanted(gpu, ground):
        return  # a process explains it, or it is somebody else's GPU
    if gpu.memory_used_bytes > limit:
        used = gpu.memory_used_bytes
        message = f"{used // 1024**2} MiB in use by no living process"
        yield Said("unhealthy", message, used, limit, "reset GPU")


def _xid(xid: Xid, ground: Ground) -> Iterator[Said]:
    kind = xids.classify(xid.code)
    if kind == "ignore" or ground.evidence.taken_at - xid.at > ground.limits.xid_lookback_s:
        return
    message = f"XID {xid.code}: {xids.meaning(xid.code)}"
    device = f"GPU {xid.gpu}"
    if kind in ("application", "unknown"):
        # Our own process: the engine is at fault, and its end is seen in other ways.
        whose = " (our process)" if xid.ours else ""
        yield Said(
            "degraded", message + whose, xid.code, device=device, advice="look at the application"
        )
        return
    advice: dict[str, Advice] = {
        "reset_gpu": "reset GPU",
        "reboot": "reboot",
        "inspect": "inspect or RMA",
    }
    yield Said("unhealthy", message, xid.code, advice=advice[kind], device=device)


def _is_wanted(gpu: Gpu, ground: Ground) -> bool:
    """Whether the engine would use this GPU: nodes are shared, and what others do on theirs is no
    fault. The engine takes the first that it sees."""
    order = list(_gpus(ground))
    visible = ground.evidence.gpus.visible if ground.evidence.gpus else None
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        order = [one for name in names for one in order if name in (str(one.index), one.uuid)]
    return gpu in order[: ground.needs.gpus]


def _gpus(ground: Ground) -> tuple[Gpu, ...]:
    return ground.evidence.gpus.gpus if ground.evidence.gpus else ()


NODE_CHECKS: tuple[Check[Gpus], ...] = (
    Check("gpu.driver", "NHC; NVML return codes 9, 12, 18", "nvidia-smi", _driver),
    Check(
        "gpu.count", "gpud, DCGM: NVML = PCI = expected", "nvidia-smi -L; lspci -d 10de:", _count
    ),
)
_Q = "nvidia-smi -q -i {device} -d "
GPU_CHECKS: tuple[Check[Gpu], ...] = (
    Check("gpu.lost", "NVML error 15, 16, 14, 11", "nvidia-smi -L", _lost),
    Check(
        "gpu.recovery",
        "NVML field 230, driver 570 and later",
        "nvidia-smi -q -i {device}",
        _recovery,
        "recovery_action",
    ),
    Check("gpu.ecc_mode", "gpud, DCGM", _Q + "ECC", _ecc_mode, "ecc_mode"),
    Check("gpu.ecc", "Meta GCM: > 0; DCGM", _Q + "ECC", _ecc, "ecc_uncorrected_volatile"),
    Check(
        "gpu.sram", "NVIDIA GPU memory error guide", _Q + "ECC", _sram, "sram_threshold_exceeded"
    ),
    Check(
        "gpu.remap_pending",
        "NVIDIA GPU memory error guide",
        _Q + "ROW_REMAPPER",
        _remap_pending,
        "remapped_rows",
    ),
    Check(
        "gpu.remap_failed",
        "NVIDIA RMA criteria",
        _Q + "ROW_REMAPPER",
        _remap_failed,
        "remapped_rows",
    ),
    Check("gpu.remap_total", "DCGM: 512", _Q + "ROW_REMAPPER", _remap_total, "remapped_rows"),
    Check("gpu.retired_pages", "DCGM: 63", _Q + "PAGE_RETIREMENT", _retired, "retired_pages"),
    Check(
        "gpu.repair",
        "NVML repair status, binding 13.580",
        _Q + "REPAIR_STATUS",
        _repair,
        "repair_pending",
    ),
    Check(
        "gpu.nvlink",
        "NVIDIA Health Validation: no inactive link",
        "nvidia-smi nvlink -s",
        _nvlink,
        "nvlinks",
    ),
    Check(
        "gpu.nvlink_errors",
        "DCGM: one replay or recovery",
        "nvidia-smi nvlink -e",
        _nvlink_errors,
        "nvlinks",
    ),
    Check(
        "gpu.fabric",
        "DCGM FABRIC_PROBE_STATE, gpud",
        "nvidia-smi -q -i {device}",
        _fabric,
        "fabric_state",
    ),
    Check(
        "gpu.clocks",
        "Azure healthagent: mask 0xe8",
        _Q + "PERFORMANCE",
        _clocks,
        "clock_event_reasons",
    ),
    Check(
        "gpu.thermal",
        "NVSentinel ADR-042: margin against the GPU's own offset",
        _Q + "TEMPERATURE",
        _thermal,
        "temperature_c",
    ),
    Check("gpu.pcie_width", "DCGM", "nvidia-smi -q -i {device}", _pcie_width, "pcie_width"),
    Check(
        "gpu.pcie_replay", "DCGM: bit error rate 1e-12", "nvidia-smi -q -i {device}", _pcie_replay
    ),
    Check(
        "gpu.power_limit", "NVIDIA Health Validation", _Q + "POWER", _power_limit, "power_limit_w"
    ),
    Check("gpu.mig", "DCGM", "nvidia-smi -q -i {device}", _mig, "mig_mode"),
    Check("gpu.compute_mode", "nccl-tests#369", _Q + "COMPUTE", _compute_mode, "compute_mode"),
    Check(
        "gpu.persistence",
        "NVIDIA Health Validation",
        "nvidia-smi -q -i {device}",
        _persistence,
        "persistence_mode",
    ),
    Check("gpu.processes", "Meta GCM: no living process", "nvidia-smi", _processes, "processes"),
    Check("gpu.memory", "Meta GCM", _Q + "MEMORY", _memory, "memory_used_bytes"),
)
XID_CHECKS: tuple[Check[Xid], ...] = (
    Check("gpu.xid", f"NVIDIA XID catalogue, {xids.CATALOG_DATE}", "dmesg | grep NVRM", _xid),
)
