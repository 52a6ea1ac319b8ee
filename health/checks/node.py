"""Checks of the host, its disks, its kernel log and the engine's environment. Pure."""

from collections.abc import Iterator

from health.checks.base import Check, Ground, Said
from health.engine import engine_faults
from health.evidence import Folder, Host, KernelLog, Mount, Nvme, Software
from health.report import Advice, Verdict

MIB = 1024**2
GIB = 1024**3
# What the kernel's lines of each kind mean for a new engine.
_LOG: dict[str, tuple[Verdict, Advice]] = {
    "mlx5_dead": ("unhealthy", "reboot"),
    "mlx5_warning": ("degraded", "inspect or RMA"),
    "nvme_dead": ("unhealthy", "inspect or RMA"),
    "nvme_timeout": ("degraded", "inspect or RMA"),
    "filesystem": ("unhealthy", "inspect or RMA"),
    "hung_task": ("degraded", "none"),
    "out_of_memory": ("degraded", "look at the application"),
    "nfs": ("degraded", "fix configuration"),
    "pcie": ("degraded", "inspect or RMA"),
}
_LIVE_STATES = ("live", "")


def _machine_wide(ground: Ground) -> Verdict:
    """Where this machine plays several nodes its own limits are the user's to know."""
    return "degraded" if ground.needs.shares_machine else "unhealthy"


def _folder(folder: Folder, ground: Ground) -> Iterator[Said]:
    if folder.error:
        verdict: Verdict = "unknown" if folder.purpose == "shm" else "unhealthy"
        yield Said(verdict, f"cannot be looked at: {folder.error}", advice="fix configuration")
        return
    if folder.free_inodes == 0:
        yield Said("unhealthy", "no free inodes left", 0, 1, "clean up")
    free = folder.free_bytes or 0
    if folder.purpose == "shm":
        if free < ground.limits.shm_free_bytes_min:
            yield _short(
                folder,
                free,
                ground.limits.shm_free_bytes_min,
                _machine_wide(ground),
                "Remove stale segments, or enlarge it (container: --shm-size).",
            )
    elif folder.purpose == "weights":
        model = ground.needs.weights_bytes or 0
        need = int(model * ground.limits.weights_headroom_ratio)
        if free < need:
            yield _short(folder, free, need, "unhealthy", "Remove models that nobody serves.")
    elif free < ground.limits.scratch_free_bytes_min:
        yield _short(
            folder,
            free,
            ground.limits.scratch_free_bytes_min,
            "unhealthy",
            "Free some space there, or set LAUNCHER_STATE_DIR to another disk.",
        )


def _short(folder: Folder, free: int, need: int, verdict: Verdict, hint: str) -> Said:
    message = f"{free // MIB} MiB free, {need // MIB} MiB are needed"
    return Said(verdict, message, free, need, "clean up", hint)


def _nvme_state(drive: Nvme, ground: Ground) -> Iterator[Said]:
    if drive.state not in _LIVE_STATES:
        yield Said(
            "unhealthy", f"the drive is {drive.state}", drive.state, "live", "inspect or RMA"
        )


def _nvme_smart(drive: Nvme, ground: Ground) -> Iterator[Said]:
    if drive.critical_warning:
        message = f"SMART critical warning {drive.critical_warning:#x}"
        yield Said("unhealthy", message, drive.critical_warning, 0, "inspect or RMA")


def _mount(mount: Mount, ground: Ground) -> Iterator[Said]:
    if mount.took_s is None:
        message = f"this {mount.type} mount does not answer"
        yield Said(
            "unhealthy",
            message,
            "no answer",
            "an answer",
            "fix configuration",
            "Is its server up? A process that touches it hangs.",
        )
    elif mount.took_s > ground.limits.mount_s_warn:
        message = f"answered after {mount.took_s:.1f} s"
        yield Said("degraded", message, mount.took_s, ground.limits.mount_s_warn)


def _memlock(host: Host, ground: Ground) -> Iterator[Said]:
    limit = ground.limits.memlock_bytes_min
    if host.memlock_bytes is None or host.memlock_bytes >= limit:
        return
    fabric = ground.evidence.infiniband
    if not fabric or not fabric.ports:
        return  # only RDMA pins memory in such amounts
    yield Said(
        _machine_wide(ground),
        f"memlock limit is {host.memlock_bytes // 1024} KiB",
        host.memlock_bytes,
        "unlimited",
        "fix configuration",
        "`* - memlock unlimited` in /etc/security/limits.conf, LimitMEMLOCK=infinity for slurmd.",
    )


def _open_files(host: Host, ground: Ground) -> Iterator[Said]:
    limit = ground.limits.open_files_min
    if host.open_files != -1 and host.open_files < limit:
        message = f"at most {host.open_files} open files"
        yield Said("degraded", message, host.open_files, limit, "fix configuration")


def _memory(host: Host, ground: Ground) -> Iterator[Said]:
    share = host.memory_available_bytes / max(1, host.memory_total_bytes)
    if share < ground.limits.memory_available_ratio_min:
        free, total = host.memory_available_bytes // GIB, host.memory_total_bytes // GIB
        message = f"{free} of {total} GiB memory available"
        limit = ground.limits.memory_available_ratio_min
        yield Said(_machine_wide(ground), message, round(share, 3), limit, "clean up")


def _swap(host: Host, ground: Ground) -> Iterator[Said]:
    if not host.swap_total_bytes:
        return
    share = host.swap_used_bytes / host.swap_total_bytes
    if share > ground.limits.swap_used_ratio_max:
        message = f"{share:.0%} of the swap is used"
        yield Said("degraded", message, round(share, 2), ground.limits.swap_used_ratio_max)


def _ports(host: Host, ground: Ground) -> Iterator[Said]:
    if host.busy_ports:
        listed = ", ".join(str(port) for port in host.busy_ports[:5])
        yield Said(
            "unhealthy",
            f"port {listed} in use on {host.address}",
            listed,
            "free",
            "clean up",
            "Stop what listens there, or write another `port:`.",
        )


def _stuck(host: Host, ground: Ground) -> Iterator[Said]:
    if host.stuck_processes > ground.limits.stuck_processes_max:
        message = f"{host.stuck_processes} processes hang in the kernel"
        yield Said(
            "degraded", message, host.stuck_processes, ground.limits.stuck_processes_max, "reboot"
        )


def _log(log: KernelLog, ground: Ground) -> Iterator[Said]:
    seen = set()
    for line in reversed(log.lines):
        old = ground.evidence.taken_at - line.at > ground.limits.xid_lookback_s
        if line.kind in seen or old:
            continue
        seen.add(line.kind)
        verdict, advice = _LOG.get(line.kind, ("degraded", "none"))
        yield Said(verdict, f"kernel: {line.text[:160]}", line.kind, "no such line", advice)


def _engine(software: Software, ground: Ground) -> Iterator[Said]:
    for message, hint in engine_faults(software, ground.needs.executor):
        yield Said("unhealthy", message, advice="fix configuration", hint=hint)


def _model(software: Software, ground: Ground) -> Iterator[Said]:
    if software.model_error:
        yield Said(
            "unhealthy",
            f"the model folder's config.json: {software.model_error}",
            software.model_error,
            "readable",
            "fix configuration",
            "Put the model on a shared file system or at the same path on every node.",
        )


def _has_gpus(software: Software, ground: Ground) -> Iterator[Said]:
    """An engine built for CUDA on a node without a GPU."""
    needed, gpus = ground.needs.gpus, ground.evidence.gpus
    answered = ground.evidence.outcomes.get("gpus")
    absent = answered is not None and answered.status == "absent"
    if needed and absent and gpus is None and software.versions and not ground.engine_is_cpu:
        yield Said(
            "unhealthy",
            f"no GPU found, {needed} needed",
            0,
            needed,
            "inspect or RMA",
            "Check `nvidia-smi` on the node, or correct gpus_per_node.",
        )


HOST_CHECKS: tuple[Check[Host], ...] = (
    Check("host.memlock", "NCCL guide: unlimited", "ulimit -l", _memlock),
    Check("host.open_files", "an API server's clients, counted", "ulimit -Hn", _open_files),
    Check("host.memory", "Ray's memory monitor", "free -h", _memory),
    Check("host.swap", "imbue", "free -h", _swap),
    Check("host.ports", "the engine binds them", "ss -ltnp", _ports),
    Check("host.stuck", "Azure healthagent", "ps -eo state,pid,cmd | grep ^D", _stuck),
)
FOLDER_CHECKS: tuple[Check[Folder], ...] = (
    Check(
        "disk.free",
        "what one engine writes, measured; the model's size",
        "df -h {device}",
        _folder,
    ),
)
NVME_CHECKS: tuple[Check[Nvme], ...] = (
    Check("nvme.state", "Linux sysfs", "cat /sys/class/nvme/{device}/state", _nvme_state),
    Check(
        "nvme.smart",
        "NVMe specification, critical warning",
        "nvme smart-log /dev/{device}",
        _nvme_smart,
        "critical_warning",
    ),
)
MOUNT_CHECKS: tuple[Check[Mount], ...] = (
    Check("mount", "gpud", "timeout 2 stat -f {device}", _mount),
)
LOG_CHECKS: tuple[Check[KernelLog], ...] = (
    Check("kernel.log", "gpud, NVSentinel", "dmesg -T | tail -200", _log),
)
SOFTWARE_CHECKS: tuple[Check[Software], ...] = (
    Check("engine", "vLLM's and Ray's own metadata", "python -m pip list", _engine),
    Check("model", "every rank reads it", "ls -l {device}", _model),
    Check("gpu.present", "engine built for CUDA", "nvidia-smi -L", _has_gpus),
)
