"""Evidence: what the probes of one node saw, raw, before anybody judges it. Pure data.

It is recorded whole by `launcher preflight --record` and judged again by `--replay`. A value
that could not be read is None, with the reason in `unread`; a probe that gave no answer at all is
in `outcomes`. Counters carry what they grew by during `window_s`: a lifetime value says nothing.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Level = Literal["passive", "quick", "fabric", "deep"]
LEVELS: tuple[Level, ...] = ("passive", "quick", "fabric", "deep")


class Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class Outcome(Model):
    """How one probe ended. `absent`: the node has no such thing, which is an answer."""

    status: Literal["ok", "absent", "error", "timeout", "skipped"]
    detail: str = ""
    took_s: float = 0.0


class GpuProcess(Model):
    pid: int
    name: str
    user: str
    memory_bytes: int | None
    ours: bool


class Gpu(Model):
    """One GPU by NVML. `error` is set when even its handle does not answer (a lost GPU)."""

    index: int
    error: str = ""
    unread: dict[str, str] = Field(default_factory=dict)
    uuid: str | None = None
    name: str | None = None
    serial: str | None = None
    bus_id: str | None = None
    vbios: str | None = None
    recovery_action: int | None = None
    ecc_mode: tuple[int, int] | None = None  # current, pending
    ecc_uncorrected_volatile: int | None = None
    ecc_uncorrected_aggregate: int | None = None
    ecc_corrected_volatile: int | None = None
    sram_threshold_exceeded: bool | None = None
    remapped_rows: tuple[int, int, int, int] | None = (
        None  # corrected, uncorrected, pending, failed
    )
    retired_pages: int | None = None
    retired_pending: bool | None = None
    repair_pending: bool | None = None
    nvlinks: tuple[bool, ...] | None = None
    fabric_state: int | None = None
    fabric_status: int | None = None
    fabric_clique: str | None = None
    fabric_health: int | None = None
    clock_event_reasons: int | None = None
    thermal_margin_c: int | None = None
    slowdown_margin_c: int | None = None
    temperature_c: int | None = None
    power_limit_w: float | None = None
    power_limit_default_w: float | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_generation_max: int | None = None
    mig_mode: tuple[int, int] | None = None  # current, pending
    compute_mode: int | None = None
    persistence_mode: int | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    processes: tuple[GpuProcess, ...] | None = None
    counters: dict[str, int] = Field(default_factory=dict)  # "nvlink.3.replay", "pcie.replay"
    grown: dict[str, int] = Field(default_factory=dict)  # by how much in the window


class Xid(Model):
    """One error event of the NVIDIA driver. `pid` is the process that it names, if any."""

    at: float
    code: int
    gpu: str  # the index, or the PCI address
    pid: int | None = None
    ours: bool = False
    text: str = ""


class Gpus(Model):
    vendor: Literal["nvidia", "amd", "none"]
    error: str = ""  # why NVML as a whole does not answer
    driver: str | None = None
    cuda_driver: str | None = None
    count: int | None = None
    pci_count: int | None = None
    window_s: float = 0.0
    visible: str | None = None  # CUDA_VISIBLE_DEVICES, where a scheduler or the user has set it
    gpus: tuple[Gpu, ...] = ()


class Gid(Model):
    index: int
    type: str
    netdev: str
    is_ipv4: bool


class Port(Model):
    """One InfiniBand or RoCE port from /sys/class/infiniband."""

    device: str
    port: int
    state: str
    physical_state: str
    rate_gbps: float | None
    link_layer: str
    firmware: str = ""
    board: str = ""
    numa_node: int | None = None
    netdevs: tuple[str, ...] = ()
    gids: tuple[Gid, ...] = ()
    counters: dict[str, int] = Field(default_factory=dict)
    grown: dict[str, int] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.device}/{self.port}"


class Infiniband(Model):
    ports: tuple[Port, ...] = ()
    window_s: float = 0.0
    peermem: bool | None = None
    dmabuf: bool | None = None
    default_route_netdev: str = ""


class Folder(Model):
    """A place that the fleet writes to or reads from."""

    path: str
    purpose: Literal["scratch", "weights", "model", "shm"]
    error: str = ""
    free_bytes: int | None = None
    total_bytes: int | None = None
    free_inodes: int | None = None


class Nvme(Model):
    name: str
    state: str
    model: str = ""
    critical_warning: int | None = None
    percentage_used: int | None = None


class Mount(Model):
    path: str
    type: str
    took_s: float | None  # None: it did not answer


class Storage(Model):
    folders: tuple[Folder, ...] = ()
    nvmes: tuple[Nvme, ...] = ()
    read_rate_bytes_s: float | None = None


class Interface(Model):
    name: str
    ip: str
    prefix: int
    mtu: int
    speed_mbps: int
    is_up: bool


class Host(Model):
    kernel: str
    cpus: int
    memory_total_bytes: int
    memory_available_bytes: int
    swap_total_bytes: int
    swap_used_bytes: int
    memlock_bytes: int | None  # None: unlimited
    open_files: int
    clock_synchronized: bool | None
    clock_error_s: float | None
    stuck_processes: int
    interfaces: tuple[Interface, ...] = ()
    busy_ports: tuple[int, ...] = ()
    address: str = ""


class KernelLine(Model):
    at: float
    kind: str
    text: str


class KernelLog(Model):
    xids: tuple[Xid, ...] = ()
    lines: tuple[KernelLine, ...] = ()


class Software(Model):
    """What the engine's own environment holds; `tail` is what it said when it did not start."""

    versions: dict[str, str] | None = None
    tail: str = ""
    model_error: str = ""


class NodeEvidence(Model):
    """All probes of one node at one time. `taken_at` is the node's own clock."""

    version: Annotated[int, Field(ge=1)] = 1
    node: str
    boot_id: str
    level: Level
    taken_at: float
    took_s: float
    cpu_s: float = 0.0  # what the probes themselves cost
    outcomes: dict[str, Outcome] = Field(default_factory=dict)
    gpus: Gpus | None = None
    infiniband: Infiniband | None = None
    storage: Storage | None = None
    mounts: tuple[Mount, ...] | None = None
    host: Host | None = None
    kernel: KernelLog | None = None
    software: Software | None = None


class Asked(Model):
    """What the probes need to know of the fleet; the defaults are for a node without one."""

    level: Level = "passive"
    node: str = ""
    mark: str = ""  # LAUNCHER_MARK of our own processes
    scratch: str = ""
    model_folder: str = ""
    image: str = ""  # the engine's container, where it is a file
    weights_folders: tuple[str, ...] = ()
    address: str = "0.0.0.0"
    ports: tuple[int, ...] = ()
    probe_script: str = ""  # a file that runs the engine's probe in its own environment
    sysfs: str = "/sys"
    kernel_log: str = "/dev/kmsg"
