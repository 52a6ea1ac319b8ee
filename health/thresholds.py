"""The limits that checks compare with, each with the source of its number. Data.

`launcher preflight --replay DIR --thresholds FILE` judges recorded evidence with other limits.
"""

from pydantic import BaseModel, ConfigDict, Field

GIB = 1024**3
MIB = 1024**2


class Thresholds(BaseModel):
    """Every limit by name; the description says who uses this number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    remapped_rows_max: int = Field(
        default=512,
        description="spare rows per GPU; DCGM and AzureHPC health checks warn from 512 on",
    )
    retired_pages_max: int = Field(default=63, description="DCGM: 64 retired pages are the end")
    retired_pages_warn: int = Field(default=10, description="Meta GCM")
    pcie_replays_per_minute_max: float = Field(
        default=31.0, description="DCGM: bit error rate 1e-12 per lane on Gen5 x16"
    )
    nvlink_errors_max: int = Field(
        default=0, description="DCGM fails on one replay or recovery in its window"
    )
    gpu_memory_used_bytes_max: int = Field(
        default=1 * GIB, description="driver and persistence take up to 0.6 GiB on H100; ours"
    )
    power_limit_ratio_min: float = Field(
        default=0.99,
        description="enforced limit against the default limit; NVIDIA Health Validation",
    )
    thermal_margin_warn_c: int = Field(
        default=5, description="ours: degrees above the slowdown offset at which we warn"
    )
    temperature_warn_c: int = Field(
        default=93, description="Azure healthagent, without a margin sensor"
    )
    xid_lookback_s: float = Field(
        default=7200.0, description="AzureHPC health checks forget an XID after 2 h"
    )
    ecc_corrected_warn: int = Field(
        default=20_000_000, description="AzureHPC health checks, DRAM correctable errors"
    )
    link_downed_max: int = Field(
        default=0, description="NVSentinel: any growth while running is fatal"
    )
    symbol_errors_per_s_max: float = Field(default=10.0, description="NVSentinel warns above 10/s")
    symbol_errors_per_s_fatal: float = Field(
        default=50.0, description="ours: five times the warning; a link with PAM4 always has some"
    )
    link_recoveries_per_minute_max: float = Field(default=5.0, description="NVSentinel")
    receive_errors_per_s_max: float = Field(default=10.0, description="NVSentinel")
    scratch_free_bytes_min: int = Field(
        default=256 * MIB, description="logs, sockets and compile caches of one engine, measured"
    )
    weights_headroom_ratio: float = Field(
        default=1.1, description="ours: model size and a tenth for the partial file and metadata"
    )
    shm_free_bytes_min: int = Field(
        default=512 * MIB,
        description="vLLM 0.32 takes 160 to 240 MiB for each engine process, measured",
    )
    memlock_bytes_min: int = Field(
        default=64 * GIB, description="RDMA registers GPU buffers; NCCL asks for unlimited"
    )
    open_files_min: int = Field(
        default=16384, description="ours: an API server with thousands of clients, and its engine"
    )
    memory_available_ratio_min: float = Field(
        default=0.1, description="ours: Ray kills workers from 95 % memory use on"
    )
    swap_used_ratio_max: float = Field(
        default=0.5, description="ours; imbue wants swap off altogether"
    )
    clock_offset_s_max: float = Field(
        default=2.0,
        description="ours: tokens, leases in logs and certificates are compared by time",
    )
    mount_s_warn: float = Field(
        default=0.5, description="ours: a healthy mount answers in milliseconds"
    )
    stuck_processes_max: int = Field(default=50, description="Azure healthagent, per machine")
    read_rate_ratio_min: float = Field(
        default=0.7, description="ours, against the median of the peers' drives"
    )
    compute_ratio_min: float = Field(
        default=0.9, description="ours, against the median of the set; SuperBench uses 0.95"
    )
    bandwidth_ratio_min: float = Field(
        default=0.7,
        description="ours, against the median of the pairs; SuperBench uses 0.95 on one class",
    )
