"""Evidence of one node → findings, coverage and traits. Pure: a live node and a replay alike.

Unknown is a value: a probe that gave no answer is a finding of its own, never a pass, and no fault
of the node, but where hanging is itself the fault (NVML).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from health.checks import gpu, network, node
from health.checks.base import Check, Ground, Needs, Subject
from health.evidence import NodeEvidence, Outcome
from health.report import Coverage, Finding, NodeFacts
from health.thresholds import Thresholds

# What its silence means, for probes where silence is evidence.
_HANGS = {
    "gpus": ("gpu.hang", "NVML hangs: {detail}", "reboot"),
}
ALL_CHECKS: tuple[Check[Any], ...] = (
    *gpu.NODE_CHECKS,
    *gpu.GPU_CHECKS,
    *gpu.XID_CHECKS,
    *network.PORT_CHECKS,
    *network.FABRIC_CHECKS,
    *node.HOST_CHECKS,
    *node.FOLDER_CHECKS,
    *node.NVME_CHECKS,
    *node.MOUNT_CHECKS,
    *node.LOG_CHECKS,
    *node.SOFTWARE_CHECKS,
)
BY_NAME = {check.name: check for check in ALL_CHECKS}


def judge(
    evidence: NodeEvidence, needs: Needs | None = None, limits: Thresholds | None = None
) -> NodeFacts:
    """All findings about one node, worst first, with what was and what was not covered."""
    ground = Ground(evidence, needs or Needs(), limits or Thresholds())
    findings = [*_findings(ground), *_silent(evidence)]
    findings.sort(key=lambda found: (found.verdict != "unhealthy", found.check, found.device))
    gpus = evidence.gpus.count if evidence.gpus else None
    return NodeFacts(
        findings=tuple(findings) or (Finding(check="node", verdict="healthy", message=""),),
        traits=traits_of(evidence),
        coverage=tuple(_coverage(evidence)),
        gpus=gpus,
        boot_id=evidence.boot_id,
        taken_at=evidence.taken_at,
        level=evidence.level,
    )


def _findings(ground: Ground) -> Iterator[Finding]:
    evidence = ground.evidence
    if evidence.gpus:
        yield from _each(gpu.NODE_CHECKS, [("", evidence.gpus)], ground)
        named = [(f"GPU {one.index}", one) for one in evidence.gpus.gpus]
        yield from _each(gpu.GPU_CHECKS, named, ground)
    if evidence.infiniband:
        ports = [(port.name, port) for port in evidence.infiniband.ports]
        yield from _each(network.PORT_CHECKS, ports, ground)
        yield from _each(network.FABRIC_CHECKS, [("", evidence.infiniband)], ground)
    if evidence.host:
        yield from _each(node.HOST_CHECKS, [("", evidence.host)], ground)
    if evidence.storage:
        folders = [(folder.path, folder) for folder in evidence.storage.folders]
        yield from _each(node.FOLDER_CHECKS, folders, ground)
        drives = [(drive.name, drive) for drive in evidence.storage.nvmes]
        yield from _each(node.NVME_CHECKS, drives, ground)
    mounts = [(mount.path, mount) for mount in evidence.mounts or ()]
    yield from _each(node.MOUNT_CHECKS, mounts, ground)
    if evidence.kernel:
        yield from _each(node.LOG_CHECKS, [("", evidence.kernel)], ground)
        yield from _each(gpu.XID_CHECKS, [("", xid) for xid in evidence.kernel.xids], ground)
    if evidence.software:
        yield from _each(node.SOFTWARE_CHECKS, [("", evidence.software)], ground)


def _each(
    checks: Iterable[Check[Subject]], subjects: list[tuple[str, Subject]], ground: Ground
) -> Iterator[Finding]:
    for check in checks:
        for device, subject in subjects:
            yield from check.findings(subject, device, ground)


def _silent(evidence: NodeEvidence) -> Iterator[Finding]:
    for probe, outcome in evidence.outcomes.items():
        if outcome.status == "timeout" and probe in _HANGS:
            check, message, advice = _HANGS[probe]
            yield Finding.model_validate(
                {
                    "check": check,
                    "verdict": "unhealthy",
                    "message": message.format(detail=outcome.detail),
                    "advice": advice,
                    "value": "no answer",
                    "threshold": "an answer",
                }
            )
        elif outcome.status in ("timeout", "error") and not _is_refused(outcome):
            message = f"not checked: {outcome.detail}"
            yield Finding(check=f"probe.{probe}", verdict="unknown", message=message)


def _is_refused(outcome: Outcome) -> bool:
    """An ordinary user may not read the kernel log in most places: not covered, and no doubt."""
    return outcome.detail.startswith("PermissionError")


_PROBE_OF = {"gpu": "gpus", "ib": "infiniband", "disk": "storage", "nvme": "storage"}
_PROBE_OF |= {"mount": "storage", "host": "host", "kernel": "kernel"}
_PROBE_OF |= {"engine": "software", "model": "software"}


def _coverage(evidence: NodeEvidence) -> Iterator[Coverage]:
    """For every check there is: was it looked at, and if not, why."""
    for check in ALL_CHECKS:
        probe = "kernel" if check.name == "gpu.xid" else _PROBE_OF[check.name.split(".")[0]]
        outcome = evidence.outcomes.get(probe)
        if outcome is None:
            yield Coverage(check=check.name, state="skipped", reason="not asked for")
        elif outcome.status == "absent":
            yield Coverage(check=check.name, state="not applicable", reason=f"no {probe} here")
        elif outcome.status != "ok":
            yield Coverage(check=check.name, state="checker error", reason=outcome.detail)
        elif why := _unread(check, evidence):
            yield Coverage(check=check.name, state="not applicable", reason=why)
        else:
            yield Coverage(check=check.name, state="covered")


def _unread(check: Check[Any], evidence: NodeEvidence) -> str:
    """Why no device of this node could be asked for what the check reads."""
    if evidence.gpus and evidence.gpus.vendor != "nvidia" and check.name.startswith("gpu."):
        return f"{evidence.gpus.vendor} GPUs are not read by NVML"
    if check.name == "nvme.smart" or not check.reads or not evidence.gpus:
        drives = evidence.storage.nvmes if evidence.storage else ()
        unread = check.name == "nvme.smart" and all(d.critical_warning is None for d in drives)
        return "SMART is not readable here" if unread else ""
    reasons = [one.unread.get(check.reads, "") for one in evidence.gpus.gpus if not one.error]
    values = [getattr(one, check.reads) for one in evidence.gpus.gpus if not one.error]
    if values and all(value is None for value in values):
        return next(filter(None, reasons), "not supported")
    return ""


def traits_of(evidence: NodeEvidence) -> dict[str, str]:
    """What nodes of one replica must agree on. A trait that could not be read is left out."""
    traits: dict[str, str] = {}
    if evidence.software and evidence.software.versions:
        hidden = ("vllm_command", "ray_command")
        traits |= {k: v for k, v in evidence.software.versions.items() if k not in hidden}
    if evidence.host:
        memlock = evidence.host.memlock_bytes
        traits["kernel"] = evidence.host.kernel
        traits["memlock"] = "unlimited" if memlock is None else str(memlock)
    if evidence.gpus and not evidence.gpus.error:
        traits |= _gpu_traits(evidence)
    for port in evidence.infiniband.ports if evidence.infiniband else ():
        traits[f"ib.{port.name}.link_layer"] = port.link_layer
        traits[f"ib.{port.name}.firmware"] = port.firmware
        traits[f"ib.{port.name}.state"] = port.state
        if port.rate_gbps is not None:
            traits[f"ib.{port.name}.rate"] = f"{port.rate_gbps:g} Gb/s"
        indices = [gid.index for gid in port.gids if gid.type == "RoCE v2" and gid.is_ipv4]
        if indices:
            traits[f"ib.{port.name}.gid_index"] = str(indices[0])
    return {name: value for name, value in traits.items() if value}


def _gpu_traits(evidence: NodeEvidence) -> dict[str, str]:
    gpus = evidence.gpus
    assert gpus is not None
    several: dict[str, set[str | None]] = {
        "gpu.name": {one.name for one in gpus.gpus},
        "gpu.vbios": {one.vbios for one in gpus.gpus},
        "gpu.ecc": {str(one.ecc_mode[0]) for one in gpus.gpus if one.ecc_mode},
        "gpu.memory": {
            f"{one.memory_total_bytes // 1024**3} GiB"
            for one in gpus.gpus
            if one.memory_total_bytes
        },
    }
    traits = {
        name: "/".join(sorted(value for value in values if value))
        for name, values in several.items()
    }
    traits["gpu.count"] = str(gpus.count or "")
    traits["driver"] = gpus.driver or ""
    traits["cuda_driver"] = gpus.cuda_driver or ""
    return traits
