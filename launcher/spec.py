"""The spec: what a user wants of one fleet, as data. Pure; every key refuses what it cannot mean.

A key that is not written has a default that works. Durations are written `90s`, `30m`, `12h`,
`2d` or `1-12:00:00` and held in seconds.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

SPEC_VERSION = 1

# Engine arguments that we set ourselves: addresses, ports, ranks, names, keys.
ENGINE_ARGS_OURS = frozenset(
    {
        *("model", "served-model-name", "revision", "host", "port", "uds", "api-key", "config"),
        *("tensor-parallel-size", "tp", "pipeline-parallel-size", "pp", "nnodes", "n"),
        *("node-rank", "r", "master-addr", "master-port", "headless", "api-server-count"),
        *("distributed-executor-backend", "ssl-keyfile", "ssl-certfile"),
        *("data-parallel-size", "dp", "data-parallel-size-local", "dpl", "data-parallel-rank"),
        *("data-parallel-address", "dpa", "data-parallel-rpc-port", "dpp", "dpn"),
        *("data-parallel-start-rank", "dpr", "data-parallel-backend", "dpb"),
    }
)
# Variables that place a process or hold a secret: ours, or files.
ENVIRONMENT_OURS = re.compile(
    r"(VLLM_HOST_IP|VLLM_PORT|VLLM_API_KEY|VLLM_RPC_BASE_PATH|RAY_ADDRESS|RAY_AUTH_.*|TMPDIR"
    r"|MASTER_ADDR|MASTER_PORT|LAUNCHER_.*)\Z"
)
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL)", re.I)
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)\Z")
_SLURM_TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):(\d{2})(?::(\d{2}))?\Z")


def duration_s(value: Any) -> Any:
    """Seconds of `90`, `90s`, `30m`, `12h`, `2d`, `12:00:00` or `1-12:00:00`."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if match := _DURATION.match(text):
        return int(float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])
    if match := _SLURM_TIME.match(text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    raise ValueError(f"{value!r} is not a duration; write 90s, 30m, 12h or 1-12:00:00")


Duration = Annotated[int, BeforeValidator(duration_s), Field(gt=0, le=366 * 86400)]
FleetName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9\-]{0,38}[a-z0-9])?$")]
# Text that ends up in an #SBATCH line: one line, no blanks at the ends.
Word = Annotated[str, StringConstraints(pattern=r"^[^\s'\"\\`$]+$", max_length=1024)]
Constraint = Annotated[str, StringConstraints(pattern=r"^[^\n\r\x00]+$")]
Directives = tuple[Annotated[str, StringConstraints(pattern=r"^--?[^\n\r\x00]+$")], ...]
Size = Annotated[int, Field(ge=1, le=4096)]
# Slurm warns five minutes before the end, perhaps a minute earlier; the rest is for working.
CONTROLLER_WALLTIME_MIN_S = 600


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parallelism(Section):
    """How many ways the model is cut: tensor within a node, pipeline across nodes, data copies."""

    tensor: Size = 1
    pipeline: Size = 1
    data: Size = 1


class Engine(Section):
    """Arguments of `vllm serve`, passed through: `max-model-len: 32768`, `enforce-eager: true`."""

    args: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_expert_parallel(self) -> bool:
        """Whether experts are spread over ranks, which then talk all to all."""
        names = {name.lstrip("-").replace("_", "-"): value for name, value in self.args.items()}
        return bool(names.get("enable-expert-parallel"))

    @field_validator("args")
    @classmethod
    def _not_ours(cls, args: dict[str, Any]) -> dict[str, Any]:
        for name, value in args.items():
            bare = name.lstrip("-").replace("_", "-")
            if bare in ENGINE_ARGS_OURS:
                raise ValueError(f"{name!r} is set by launcher; remove it")
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9\-_.]*", bare):
                raise ValueError(f"{name!r} is not an argument name")
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{name!r} holds a NUL byte")
        return args


class Container(Section):
    """An image and the folders that the engine must see inside it."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    mounts: tuple[str, ...] = ()
    args: tuple[str, ...] = ()


class Runtime(Section):
    """Where the engine's `vllm` comes from. Nothing written: the PATH of the node."""

    venv: str | None = None
    modules: tuple[str, ...] = ()
    apptainer: Container | None = None
    pyxis: Container | None = None

    @property
    def image_file(self) -> str:
        """The container's image where it is a file on the nodes, else nothing."""
        container = self.apptainer or self.pyxis
        return container.image if container and container.image.startswith("/") else ""

    @model_validator(mode="after")
    def _one_kind(self) -> "Runtime":
        chosen = [
            kind for kind in ("venv", "apptainer", "pyxis") if getattr(self, kind) is not None
        ]
        if len(chosen) > 1:
            raise ValueError(f"write one of {' and '.join(chosen)}, not both")
        return self


class SecretSource(Section):
    """Where a secret comes from: a file of mode 0600 or a variable of the caller's environment."""

    file: str | None = None
    env: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "SecretSource":
        if (self.file is None) == (self.env is None):
            raise ValueError("write exactly one of file and env")
        return self


class Limits(Section):
    """Deadlines. Each wait is for an observed fact and ends with a message that names it.

    ttl: the fleet ends by itself so long after its `up`. idle: when nobody asked it anything for
    so long. Nothing written: never.
    """

    queue: Duration = 24 * 3600
    agents: Duration = 120
    start: Duration = 1800
    drain: Duration = 30
    orphan: Duration = 1800
    ttl: Duration | None = None
    idle: Duration | None = None
    restarts: Annotated[int, Field(ge=0, le=1000)] = 5  # in an hour; node losses are not counted


class Tls(Section):
    """A certificate (with its chain) and its key, PEM files; a changed file is taken at once."""

    certificate: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    key: Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class Fallback(Section):
    """A smaller model that serves when no replica is left; its answers say so in a header."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://\S+$", max_length=1024)]
    model: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    key: SecretSource | None = None


class Gateway(Section):
    """The one address of the fleet. host: what clients call it; auto finds it."""

    host: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,253}$")] = "auto"
    processes: Annotated[int, Field(ge=1, le=8)] = 2
    tls: Tls | None = None
    body_max_bytes: Annotated[int, Field(ge=1024, le=2**31)] = 64 * 1024 * 1024
    waiting_max: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    hold: Duration = 300
    continue_streams: bool = False
    fallback: Fallback | None = None


class Webhook(Section):
    """An address that gets a POST: `url`, or where it holds a secret the `file` or `env` of it."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]", max_length=2048)] | None = (
        None
    )
    file: str | None = None
    env: str | None = None

    @property
    def source(self) -> SecretSource | None:
        return SecretSource(file=self.file, env=self.env) if self.url is None else None

    @field_validator("url")
    @classmethod
    def _no_secret(cls, url: str | None) -> str | None:
        if url is not None and ("?" in url or "#" in url or "@" in url.split("/")[2]):
            raise ValueError("may hold a secret; write `webhook: {env: NAME}` or `{file: PATH}`")
        return url

    @model_validator(mode="after")
    def _one_source(self) -> "Webhook":
        if sum(value is not None for value in (self.url, self.file, self.env)) != 1:
            raise ValueError("write an address, or exactly one of file and env")
        return self


def _short_webhook(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class Notify(Section):
    """Who is told when the fleet does not serve as it should, and when it does again.

    command: gets the notice as JSON on stdin; the words of one command, never a shell's line.
    """

    command: tuple[Annotated[str, StringConstraints(max_length=4096)], ...] = ()
    webhook: Annotated[Webhook | None, BeforeValidator(_short_webhook)] = None

    @field_validator("command")
    @classmethod
    def _plain_words(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        if command and not command[0]:
            raise ValueError("its first word is a program's name")
        if any("\0" in word for word in command):
            raise ValueError("holds a NUL byte")
        return command

    @model_validator(mode="after")
    def _somebody(self) -> "Notify":
        if not self.command and self.webhook is None:
            raise ValueError("write a command, a webhook, or both")
        return self


class ControllerJob(Section):
    """The Slurm job of controller and gateway. Empty: as the replicas' jobs, or the site's own."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    walltime: Duration | None = None
    constraint: Constraint | None = None
    cpus_per_task: Size | None = 2
    mem: Word | None = "2G"
    directives: Directives = ()

    @field_validator("walltime")
    @classmethod
    def _long_enough(cls, walltime: int | None) -> int | None:
        if walltime is not None and walltime < CONTROLLER_WALLTIME_MIN_S:
            raise ValueError("write 10m or more: its successor is asked for 5 minutes before")
        return walltime


def _short_controller(value: Any) -> Any:
    return {"slurm": {}} if value in ("slurm", {"slurm": None}) else value


class Controller(Section):
    """Where the controller runs, and the gateway beside it: in a Slurm job of its own."""

    slurm: ControllerJob


class LocalBackend(Section):
    """This machine plays all nodes, each with a loopback address of its own."""


class SshBackend(Section):
    inventory: str
    pool: str | None = None
    nodes: str | None = None


class SlurmBackend(Section):
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    walltime: Duration | None = None
    gres: Word | None = None
    gpu_option: Literal["gres", "gpus-per-node", "none"] = "gres"
    constraint: Constraint | None = None
    exclude: Word | None = None
    nodelist: Word | None = None
    reservation: Word | None = None
    cpus_per_task: Size | None = None
    mem: Word | None = None
    exclusive: bool = False
    directives: Directives = ()


class Backend(Section):
    """Exactly one of local, ssh and slurm."""

    local: LocalBackend | None = None
    ssh: SshBackend | None = None
    slurm: SlurmBackend | None = None

    @model_validator(mode="after")
    def _one_backend(self) -> "Backend":
        written = [kind for kind in ("local", "ssh", "slurm") if getattr(self, kind) is not None]
        if len(written) != 1:
            raise ValueError("write exactly one of local, ssh and slurm")
        return self

    @property
    def kind(self) -> Literal["local", "ssh", "slurm"]:
        return "ssh" if self.ssh else "slurm" if self.slurm else "local"


def _short_backend(value: Any) -> Any:
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict) and len(value) == 1:  # `slurm:` with nothing below it
        return {kind: {} if block is None else block for kind, block in value.items()}
    return value


def _off(value: Any) -> Any:
    return "off" if value is False else value  # what YAML makes of a bare `off`


class FleetSpec(Section):
    """One model, served by R replicas of N nodes each, on one backend."""

    version: Annotated[int, Field(ge=1, le=SPEC_VERSION)] = SPEC_VERSION
    name: FleetName
    model: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    revision: Word | None = None
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    nodes: Annotated[int, Field(ge=1, le=512)] = 1
    spares: Annotated[int, Field(ge=0, le=512)] = 0
    reschedule: Literal["auto", "in_place", "top_up", "resubmit"] = "auto"
    gpus_per_node: Annotated[int, Field(ge=1, le=64)] | None = None
    parallelism: Literal["auto"] | Parallelism = "auto"
    executor: Literal["ray", "mp"] | None = None
    engine: Engine = Engine()
    env: dict[str, str] = Field(default_factory=dict)
    secrets: dict[str, SecretSource] = Field(default_factory=dict)
    runtime: Runtime = Runtime()
    interface: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:\-]{1,15}$")] = "auto"
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    preflight: Literal["passive", "quick"] = "quick"
    warm: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = "auto"
    gateway: Gateway = Gateway()
    limits: Limits = Limits()
    notify: Notify | None = None
    backend: Annotated[Backend, BeforeValidator(_short_backend)] = Backend(local=LocalBackend())
    controller: Annotated[Controller | None, BeforeValidator(_short_controller)] = None

    @property
    def controller_job(self) -> ControllerJob | None:
        """The job that the controller runs in; None: in the background of whoever starts it."""
        return self.controller.slurm if self.controller else None

    @field_validator("controller")
    @classmethod
    def _nodes_elsewhere(
        cls, controller: Controller | None, info: ValidationInfo
    ) -> Controller | None:
        backend = info.data.get("backend")
        if controller is not None and backend is not None and backend.kind == "local":
            raise ValueError(
                "needs `backend: ssh` or `slurm`; with local the nodes would be on the machine "
                "where Slurm puts the controller"
            )
        return controller

    @field_validator("model")
    @classmethod
    def _printable_model(cls, model: str) -> str:
        if any(ord(letter) < 32 for letter in model):
            raise ValueError("holds a control character (a line break?)")
        return model

    @field_validator("env", mode="before")
    @classmethod
    def _plain_env(cls, env: Any) -> Any:
        if not isinstance(env, dict):
            return env
        return {
            name: str(value) if isinstance(value, int | float) else value
            for name, value in env.items()
        }

    @field_validator("env")
    @classmethod
    def _safe_env(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            _check_environment_name(name)
            if _SECRET_NAME.search(name) and value:
                raise ValueError(f"{name} looks like a secret; name its source under `secrets:`")
            if "\0" in value:
                raise ValueError(f"{name} holds a NUL byte")
        return env

    @field_validator("secrets")
    @classmethod
    def _safe_secrets(cls, secrets: dict[str, SecretSource]) -> dict[str, SecretSource]:
        for name in secrets:
            _check_environment_name(name)
        return secrets


def _check_environment_name(name: str) -> None:
    if not _ENVIRONMENT_NAME.match(name):
        raise ValueError(f"{name!r} is not a variable name")
    if ENVIRONMENT_OURS.match(name):
        raise ValueError(f"{name} is set by launcher; remove it")


# Keys that may change while the fleet runs; every other difference needs new engines.
CHANGES_IN_PLACE = frozenset({"limits", "preflight", "gateway", "notify", "controller"})


def differences(old: FleetSpec, new: FleetSpec) -> list[str]:
    """The top-level keys, written as `key: old → new`, whose change needs a restart."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return [
        f"{key}: {before[key]} → {after[key]}"
        for key in before
        if key not in CHANGES_IN_PLACE and before[key] != after[key]
    ]


def is_folder(model: str) -> bool:
    """A model is a folder when it is written as a path; `org/name` is a Hugging Face id."""
    return model.startswith(("/", "./", "../", "~"))
