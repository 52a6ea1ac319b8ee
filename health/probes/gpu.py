"""GPUs by NVML (the package nvidia-ml-py) and by the PCI bus. I/O.

Every getter may be missing in an older driver or not apply to a GPU: its value is then None and
the reason is in `unread`. Counters are read twice, a window apart.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pynvml as nvml

from health.evidence import Asked, Gpu, GpuProcess, Gpus
from health.probes.files import entries, text

WINDOW_S = 1.0
_NVIDIA, _AMD = "0x10de", "0x1002"
_GPU_CLASSES = ("0x0302", "0x0300", "0x0380", "0x1200")
_LINK_ERRORS = {
    "replay": nvml.NVML_NVLINK_ERROR_DL_REPLAY,
    "recovery": nvml.NVML_NVLINK_ERROR_DL_RECOVERY,
    "crc": nvml.NVML_NVLINK_ERROR_DL_CRC_FLIT,
}
# In the order of nvml.h: the fields that have no getter of their own.
_RECOVERY_ACTION, _SLOWDOWN_TLIMIT = 230, 194
# Errors of a handle that mean the GPU itself is gone, not that a value does not exist.
LOST = {
    nvml.NVML_ERROR_GPU_IS_LOST: "GPU_IS_LOST",
    nvml.NVML_ERROR_RESET_REQUIRED: "RESET_REQUIRED",
    nvml.NVML_ERROR_CORRUPTED_INFOROM: "CORRUPTED_INFOROM",
    nvml.NVML_ERROR_IRQ_ISSUE: "IRQ_ISSUE",
}


def read_gpus(asked: Asked) -> Gpus | None:
    """All GPUs of this node; None where there is neither a GPU nor NVML."""
    pci = _pci_gpus(Path(asked.sysfs))
    vendor = "nvidia" if _NVIDIA in pci else "amd" if _AMD in pci else "none"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if vendor != "nvidia":
            return None if vendor == "none" else Gpus(vendor="amd", pci_count=pci.count(_AMD))
        return Gpus(vendor="nvidia", error=_said(error), pci_count=pci.count(_NVIDIA))
    try:
        count = nvml.nvmlDeviceGetCount()
        first = [_counters(index) for index in range(count)]
        began = time.monotonic()
        gpus = [_read(index, asked.mark) for index in range(count)]
        time.sleep(max(0.0, WINDOW_S - (time.monotonic() - began)))
        window_s = time.monotonic() - began
        gpus = [_with_growth(gpu, before) for gpu, before in zip(gpus, first, strict=True)]
        return Gpus(
            vendor="nvidia",
            driver=_quiet(nvml.nvmlSystemGetDriverVersion),
            cuda_driver=_cuda(_quiet(nvml.nvmlSystemGetCudaDriverVersion)),
            count=count,
            pci_count=pci.count(_NVIDIA) or None,
            window_s=round(window_s, 3),
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            gpus=tuple(gpus),
        )
    except nvml.NVMLError as error:
        return Gpus(vendor="nvidia", error=_said(error), pci_count=pci.count(_NVIDIA))
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def count_gpus() -> int | None:
    """How many GPUs NVML sees; None where there is no NVML to ask."""
    try:
        nvml.nvmlInit()
        return int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _read(index: int, mark: str) -> Gpu:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError as error:
        return Gpu(index=index, error=_said(error))
    values: dict[str, Any] = {}
    unread: dict[str, str] = {}
    lost = ""
    for name, getter in _GETTERS.items():
        try:
            values[name] = getter(handle)
        except nvml.NVMLError as error:
            unread[name] = _said(error)
            if error.value in LOST:
                lost = _said(error)
                break
    if not lost:
        with contextlib.suppress(nvml.NVMLError):
            values["processes"] = _processes(handle, mark)
    return Gpu(index=index, error=lost, unread=unread, **values)


def _with_growth(gpu: Gpu, before: dict[str, int]) -> Gpu:
    after = {} if gpu.error else _counters(gpu.index)
    grown = {name: after[name] - value for name, value in before.items() if name in after}
    return gpu.model_copy(update={"counters": after, "grown": grown})


def _counters(index: int) -> dict[str, int]:
    counters: dict[str, int] = {}
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        with contextlib.suppress(nvml.NVMLError):
            counters["pcie.replay"] = nvml.nvmlDeviceGetPcieReplayCounter(handle)
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            nvml.nvmlDeviceGetNvLinkState(handle, link)
            for name, which in _LINK_ERRORS.items():
                with contextlib.suppress(nvml.NVMLError):
                    value = nvml.nvmlDeviceGetNvLinkErrorCounter(handle, link, which)
                    counters[f"nvlink.{link}.{name}"] = value
    except nvml.NVMLError:
        pass  # no such link, or the GPU is lost: its state says so
    return counters


def _links(handle: Any) -> tuple[bool, ...] | None:
    """The state of each link that the GPU has; None where it has none."""
    states = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            states.append(bool(nvml.nvmlDeviceGetNvLinkState(handle, link)))
        except nvml.NVMLError as error:
            if error.value in LOST:
                raise
            break
    return tuple(states) or None


def _fabric(handle: Any) -> Any:
    info = nvml.c_nvmlGpuFabricInfo_v3_t()
    nvml.nvmlDeviceGetGpuFabricInfoV(handle, nvml.byref(info))
    return info


def _fabric_clique(handle: Any) -> str:
    info = _fabric(handle)
    return f"{bytes(info.clusterUuid).hex()}/{info.cliqueId}"


def _field(handle: Any, field: int) -> int:
    value = nvml.nvmlDeviceGetFieldValues(handle, [field])[0]
    if value.nvmlReturn != nvml.NVML_SUCCESS:
        raise nvml.NVMLError(value.nvmlReturn)
    return int(value.value.uiVal)


def _sram(handle: Any) -> bool:
    status = nvml.c_nvmlEccSramErrorStatus_v1_t()
    nvml.nvmlDeviceGetSramEccErrorStatus(handle, nvml.byref(status))
    return bool(status.bThresholdExceeded)


def _retired(handle: Any) -> int:
    causes = (
        nvml.NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS,
        nvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR,
    )
    return sum(len(nvml.nvmlDeviceGetRetiredPages(handle, cause)) for cause in causes)


def _ecc(handle: Any, kind: int, counter: int) -> int:
    return int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter))


def _slowdown(handle: Any) -> int:
    value = _field(handle, _SLOWDOWN_TLIMIT)
    return value - 2**32 if value >= 2**31 else value  # the field is a signed offset


_GETTERS: dict[str, Callable[[Any], Any]] = {
    "uuid": nvml.nvmlDeviceGetUUID,
    "name": nvml.nvmlDeviceGetName,
    "serial": nvml.nvmlDeviceGetSerial,
    "bus_id": lambda h: nvml.nvmlDeviceGetPciInfo(h).busId,
    "vbios": nvml.nvmlDeviceGetVbiosVersion,
    "recovery_action": lambda h: _field(h, _RECOVERY_ACTION),
    "ecc_mode": lambda h: tuple(nvml.nvmlDeviceGetEccMode(h)),
    "ecc_uncorrected_volatile": lambda h: _ecc(
        h, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    ),
    "ecc_uncorrected_aggregate": lambda h: _ecc(
        h, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_AGGREGATE_ECC
    ),
    "ecc_corrected_volatile": lambda h: _ecc(
        h, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC
    ),
    "sram_threshold_exceeded": _sram,
    "remapped_rows": lambda h: tuple(int(v) for v in nvml.nvmlDeviceGetRemappedRows(h)),
    "retired_pages": _retired,
    "retired_pending": lambda h: bool(nvml.nvmlDeviceGetRetiredPagesPendingStatus(h)),
    "repair_pending": lambda h: any(nvml.nvmlDeviceGetRepairStatus(h)),
    "nvlinks": _links,
    "fabric_state": lambda h: int(_fabric(h).state),
    "fabric_status": lambda h: int(_fabric(h).status),
    "fabric_clique": _fabric_clique,
    "fabric_health": lambda h: int(_fabric(h).healthSummary),
    "clock_event_reasons": nvml.nvmlDeviceGetCurrentClocksEventReasons,
    "thermal_margin_c": nvml.nvmlDeviceGetMarginTemperature,
    "slowdown_margin_c": _slowdown,
    "temperature_c": lambda h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU),
    "power_limit_w": lambda h: nvml.nvmlDeviceGetEnforcedPowerLimit(h) / 1000,
    "power_limit_default_w": lambda h: nvml.nvmlDeviceGetPowerManagementDefaultLimit(h) / 1000,
    "pcie_width": nvml.nvmlDeviceGetCurrPcieLinkWidth,
    "pcie_width_max": nvml.nvmlDeviceGetMaxPcieLinkWidth,
    "pcie_generation_max": nvml.nvmlDeviceGetMaxPcieLinkGeneration,
    "mig_mode": lambda h: tuple(nvml.nvmlDeviceGetMigMode(h)),
    "compute_mode": nvml.nvmlDeviceGetComputeMode,
    "persistence_mode": nvml.nvmlDeviceGetPersistenceMode,
    "memory_total_bytes": lambda h: int(nvml.nvmlDeviceGetMemoryInfo(h).total),
    "memory_used_bytes": lambda h: int(
        nvml.nvmlDeviceGetMemoryInfo(h, version=nvml.nvmlMemory_v2).used
    ),
}


def _processes(handle: Any, mark: str) -> tuple[GpuProcess, ...]:
    """Living processes with a context on this GPU. A dead one is the driver's own leftover."""
    found = []
    for seen in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
        try:
            process = psutil.Process(seen.pid)
            name, user = process.name(), process.username()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            name, user = "?", "?"
        found.append(
            GpuProcess(
                pid=seen.pid,
                name=name,
                user=user,
                memory_bytes=seen.usedGpuMemory,
                ours=is_ours(seen.pid, mark),
            )
        )
    return tuple(found)


def is_ours(pid: int, mark: str) -> bool:
    """Whether this process carries the mark of our own allocation in its environment."""
    if not mark:
        return False
    try:
        return f"LAUNCHER_MARK={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _pci_gpus(sysfs: Path) -> list[str]:
    """The vendor of every display or 3D controller on the PCI bus."""
    vendors = []
    for device in entries(sysfs / "bus/pci/devices"):
        vendor, kind = text(device / "vendor"), text(device / "class")[:6]
        if vendor in (_NVIDIA, _AMD) and kind in _GPU_CLASSES:
            vendors.append(vendor)
    return vendors


def _quiet(getter: Callable[[], Any]) -> Any:
    try:
        return getter()
    except nvml.NVMLError:
        return None


def _cuda(version: int | None) -> str | None:
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def _said(error: Any) -> str:
    return LOST.get(error.value, str(error))
