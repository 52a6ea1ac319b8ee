"""What the deep level found: DCGM's diagnosis, products, memory, read rates. Pure.

Broken is what computes or remembers wrongly; slow is what falls behind the median of its peers,
for no number is right for every kind of GPU and drive.
"""

import json
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from health.engine import last_line
from health.report import Finding
from health.thresholds import Thresholds

MARK = "LAUNCHER-BURN "


@dataclass(frozen=True)
class Burned:
    """What one node's burn printed."""

    devices: dict[str, dict[str, Any]] = field(default_factory=dict)
    dcgm_failed: tuple[str, ...] = ()
    done: bool = False
    problem: str = ""
    bus_gb_s: float | None = None  # nccl-tests inside the node
    nccl_error: str = ""


def parse(output: str) -> Burned:
    """The rows of one node; `problem` where there are none."""
    if MARK not in output:
        return Burned(problem=last_line(output) or "printed nothing")
    devices: dict[str, dict[str, Any]] = {}
    failed: tuple[str, ...] = ()
    done = False
    bus, nccl_error = None, ""
    for line in output.splitlines():
        if not line.startswith(MARK):
            continue
        try:
            row = json.loads(line.removeprefix(MARK))
        except ValueError:
            continue
        if row.get("kind") == "device":
            devices[str(row["device"])] = row
        elif row.get("kind") == "dcgm":
            failed = tuple(_dcgm_failures(row.get("answer")))
        elif row.get("kind") == "nccl":
            bus, nccl_error = row.get("bus_gb_s"), str(row.get("error", ""))
        done = done or row.get("kind") == "done"
    return Burned(devices, failed, done, bus_gb_s=bus, nccl_error=nccl_error)


def conclude(
    burned: dict[str, Burned], rates: dict[str, float], limits: Thresholds
) -> dict[str, tuple[Finding, ...]]:
    """Findings by node. rates: node → bytes/s read from the model's largest file."""
    found: dict[str, list[Finding]] = {node: [] for node in {**burned, **rates}}
    speeds = [
        float(row["flops"])
        for one in burned.values()
        for row in one.devices.values()
        if "flops" in row
    ]
    usual = median(speeds) if speeds else 0.0
    buses = {node: one.bus_gb_s for node, one in burned.items() if one.bus_gb_s is not None}
    fastest = median(buses.values()) if len(buses) > 2 else 0.0
    for node, bus in buses.items():
        if bus < fastest * limits.bandwidth_ratio_min:
            message = f"{bus:.0f} GB/s inside the node where its peers have {fastest:.0f}"
            found[node].append(_bad("deep.nccl", "", message, "inspect or RMA"))
    for node, one in burned.items():
        if one.nccl_error:
            said = f"nccl-tests failed: {one.nccl_error}"
            found[node].append(Finding(check="deep.nccl", verdict="unknown", message=said))
        if one.problem:
            said = f"the burn did not run: {one.problem}"
            found[node].append(Finding(check="deep.burn", verdict="unknown", message=said))
        elif not one.done:
            found[node].append(_bad("deep.burn", "", "the burn did not end", "reboot"))
        for failed in one.dcgm_failed:
            found[node].append(_bad("deep.dcgm", "", failed, "inspect or RMA"))
        for device, row in one.devices.items():
            found[node] += _device(device, row, usual, limits)
    if len(rates) > 2:
        middle = median(rates.values())
        for node, rate in rates.items():
            if rate < middle * limits.read_rate_ratio_min:
                message = f"reads {rate / 1e6:.0f} MB/s where its peers read {middle / 1e6:.0f}"
                found[node].append(_slow("deep.read_rate", "", message, rate, middle))
    return {node: tuple(findings) for node, findings in found.items() if findings}


def _device(device: str, row: dict[str, Any], usual: float, limits: Thresholds) -> list[Finding]:
    if row.get("error"):
        return [_bad("deep.burn", device, str(row["error"]), "inspect or RMA")]
    found = []
    if row.get("differing"):
        message = f"{row['differing']} of {row['products']} equal products differed"
        found.append(_bad("deep.compute", device, message, "inspect or RMA"))
    if row.get("memory_changed"):
        message = f"{row['memory_changed']} bytes of memory came back changed"
        found.append(_bad("deep.memory", device, message, "inspect or RMA"))
    speed = float(row.get("flops", 0.0))
    if usual and speed < usual * limits.compute_ratio_min:
        message = f"{speed / 1e12:.2f} TFLOP/s where the others have {usual / 1e12:.2f}"
        found.append(_slow("deep.compute", device, message, speed, usual))
    return found


def _bad(check: str, device: str, message: str, advice: str) -> Finding:
    return Finding.model_validate(
        {
            "check": check,
            "verdict": "unhealthy",
            "message": message,
            "device": device,
            "advice": advice,
        }
    )


def _slow(check: str, device: str, message: str, value: float, usual: float) -> Finding:
    return Finding(
        check=check,
        verdict="degraded",
        message=message,
        device=device,
        value=f"{value:.3g}",
        threshold=f"the others' median {usual:.3g}",
        advice="inspect or RMA",
    )


def _dcgm_failures(answer: Any) -> list[str]:
    """The tests that `dcgmi diag -j` reports as failed (DCGM 3 and 4 documentation)."""
    if not isinstance(answer, dict):
        return []
    diagnosis = answer.get("DCGM Diagnostic") or answer.get("DCGM GPU Diagnostic") or {}
    failed = []
    for category in diagnosis.get("test_categories", ()):
        for test in category.get("tests", ()):
            for result in test.get("results", ()):
                if str(result.get("status", "")).lower() == "fail":
                    which = result.get("gpu_id", result.get("entity_id", "?"))
                    failed.append(f"DCGM test {test.get('name')} failed on GPU {which}")
    return failed
