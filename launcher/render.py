"""From spec and layout to the exact scripts that run. Pure, but for reading our own templates.

A script is a rendered header (exports and arrays, all quoted) and a static body from
sbatch_templates/. What differs between nodes is read from the environment by the body, so that one
script serves all nodes of a replica and `launcher render` can print it before a node is known.
"""

from importlib import resources
from pathlib import PurePath

from health.engine import PROBE
from launcher import __version__, quoting
from launcher.agent import caches
from launcher.documents import Command
from launcher.layout import Layout
from launcher.spec import ControllerJob, FleetSpec, SlurmBackend

SIGNAL_LEAD_S = 120
CONTROLLER_SIGNAL_LEAD_S = 300
# Programs of ours that need the engine's torch: they travel inside their script.
_TORCH_PROGRAMS = {"collective": "worker.py", "burn": "burn.py"}
# From the first moment in which it listens, where its helpers come from a parked process: 0.2 s
# with two cores. Where they start plainly so does the worker, which takes longer than they.
_RAYLET_REGISTERS_WITHIN_S = 0.3
# Scripts that start a process of the engine.
_STARTING = ("park", "ray-head", "ray-worker", "serve-mp", "serve-ray")


def template(name: str) -> str:
    """The text of one static body."""
    return resources.files("sbatch_templates").joinpath(name).read_text(encoding="utf-8")


def engine_scripts(spec: FleetSpec, layout: Layout) -> dict[str, str]:
    """All scripts that agents run, by file name."""
    bodies = ("ray-head", "ray-worker", "serve-ray") if layout.executor == "ray" else ("serve-mp",)
    scripts = {f"{name}.sh": _engine_script(name, spec, layout) for name in bodies}
    if spec.warm == "auto":
        scripts["park.sh"] = _engine_script("park", spec, layout)
    for name in ("engine-probe", *_TORCH_PROGRAMS):
        scripts[f"{name}.sh"] = _engine_script(name, spec, layout)
    return scripts


def commands_of(
    rank: int,
    layout: Layout,
    ports: dict[str, int],
    scripts: dict[str, str],
    raylets: tuple[tuple[str, int], ...] = (),
) -> tuple[Command, ...]:
    """The processes of one rank, in the order in which they start. One of them may be parked.

    ports: the leader's. raylets: where those of the other ranks are going to listen.
    """

    def command(name: str, script: str, after: int | None = None) -> Command:
        parkable = name != "ray-head" and "park.sh" in scripts
        return Command(name=name, script=scripts[script], after_port=after, parkable=parkable)

    if layout.executor == "mp":
        return (command("headless" if rank else "serve", "serve-mp.sh"),)
    # Whoever asks the head before it listens waits ever longer between tries; a worker that asks
    # for the head's raylet before it has registered waits two seconds; and an engine that was
    # parked is so quick that it would warn of too few GPUs.
    if rank > 0:
        worker = command("ray-worker", "ray-worker.sh", ports["node_manager"])
        return (worker.model_copy(update={"after_s": _RAYLET_REGISTERS_WITHIN_S}),)
    serve = command("serve", "serve-ray.sh", ports["rendezvous"])
    return (
        command("ray-head", "ray-head.sh"),
        serve.model_copy(update={"after_others": raylets}),
    )


def served_names(spec: FleetSpec) -> list[str]:
    """The names under which clients ask for the model: the fleet's name and the model's id."""
    folder_name = spec.model.rstrip("/").rsplit("/", 1)[-1]
    model_id = folder_name if spec.model.startswith("/") else spec.model
    return list(dict.fromkeys([spec.name, model_id]))


def _engine_script(name: str, spec: FleetSpec, layout: Layout) -> str:
    runtime = spec.runtime
    lines = [
        "#!/bin/bash",
        f"# {name} of fleet {spec.name}, rendered by launcher {__version__}",
        "",
    ]
    lines += [quoting.export(key, value) for key, value in sorted(_engine_environment().items())]
    lines += [quoting.export(key, value) for key, value in spec.env.items()]
    lines += [quoting.export("LAUNCHER_MODEL", spec.model)]
    lines += [quoting.export("LAUNCHER_DATA_PARALLEL", str(layout.data))]
    if name == "engine-probe":
        lines += [quoting.export("LAUNCHER_PROBE", PROBE)]
    if name == "park":
        lines += [quoting.export("LAUNCHER_PARK", _of_the_agent("parked.py"))]
        if layout.executor == "ray":
            lines += [quoting.export("LAUNCHER_PARK_TWIN", _of_the_agent("ray_twin.py"))]
    if name in ("ray-head", "ray-worker") and spec.warm == "auto":
        lines += [quoting.export("LAUNCHER_RAY_HOOK", _of_the_agent("ray_hook.py"))]
    if name in _TORCH_PROGRAMS:
        program = resources.files("health.collective").joinpath(_TORCH_PROGRAMS[name])
        text = program.read_text(encoding="utf-8")
        lines += [quoting.export(f"LAUNCHER_{name.upper()}", text)]
    if runtime.venv:
        lines += [quoting.export("VIRTUAL_ENV", runtime.venv)]
        lines += [f'export PATH={quoting.word(runtime.venv + "/bin")}:"$PATH"']
    lines += [quoting.array("LAUNCHER_MODULES", runtime.modules)]
    lines += [quoting.array("LAUNCHER_APPTAINER", _apptainer_words(spec))]
    lines += [quoting.array("LAUNCHER_PYXIS", _pyxis_words(spec))]
    mounts = "".join(f",{mount}" for mount in _mounts(spec)) if runtime.pyxis else ""
    lines += [quoting.export("LAUNCHER_PYXIS_MOUNTS", mounts)]
    if name.startswith("serve"):
        lines += [quoting.array("LAUNCHER_ENGINE_ARGS", _engine_words(spec, layout))]
        lines += [quoting.export("LAUNCHER_GUARD", _of_the_agent("guard.py"))]
    parts = ["preamble"]
    if name in _STARTING:
        kept = " ".join(variable for variable in spec.env if variable in caches.FOLDERS)
        lines += [quoting.export("LAUNCHER_CACHES_KEPT", kept)]
        lines += [quoting.export("LAUNCHER_CACHES", _of_the_agent("caches.py"))]
        parts += ["caches", "tell"]
        parts += ["ray-environment"] if layout.executor == "ray" else []
    return "\n".join([*lines, "", *(template(f"{part}.sh") for part in [*parts, name])])


def _of_the_agent(name: str) -> str:
    """A program of ours that runs inside the engine's environment: it travels in a script."""
    return resources.files("launcher.agent").joinpath(name).read_text(encoding="utf-8")


def _engine_environment() -> dict[str, str]:
    """What every engine gets unless the spec's `env:` says otherwise (later lines win)."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _engine_words(spec: FleetSpec, layout: Layout) -> list[str]:
    words = ["--served-model-name", *served_names(spec)]
    words += ["--tensor-parallel-size", str(layout.tensor)]
    words += ["--pipeline-parallel-size", str(layout.pipeline)]
    if layout.data > 1:
        words += ["--data-parallel-size", str(layout.data)]
        words += ["--data-parallel-backend", layout.executor]
    if spec.revision:
        words += ["--revision", spec.revision]
    return words + quoting.engine_arguments(spec.engine.args)


def _mounts(spec: FleetSpec) -> list[str]:
    container = spec.runtime.apptainer or spec.runtime.pyxis
    own = list(container.mounts) if container else []
    if spec.model.startswith("/"):
        own.append(f"{spec.model}:{spec.model}:ro")
    return own


def _apptainer_words(spec: FleetSpec) -> list[str]:
    container = spec.runtime.apptainer
    if container is None:
        return []
    words = ["--nv"] if "--rocm" not in container.args else []
    for mount in _mounts(spec):
        words += ["--bind", mount]
    return [*words, *container.args, container.image]


def _pyxis_words(spec: FleetSpec) -> list[str]:
    container = spec.runtime.pyxis
    return [f"--container-image={container.image}", *container.args] if container else []


def sbatch_script(
    spec: FleetSpec,
    *,
    owner: str,
    number: int,
    size: int,
    base: str,
    python: str,
    gpus_per_node: int,
    mark: str,
    exclude: tuple[str, ...] = (),
) -> str:
    """The batch script of one allocation job: a replica's, a spare's, or a top-up of either."""
    slurm = spec.backend.slurm or SlurmBackend()
    name = f"{spec.name}.{owner}.a{number}"
    options = [
        f"--job-name={name}",
        f"--comment={mark}",  # by which we tell our job from another of the same name
        f"--nodes={size}",
        "--ntasks-per-node=1",
        "--no-requeue",
        "--no-kill",
        "--open-mode=append",
        f"--signal=B:USR1@{SIGNAL_LEAD_S}",
        f"--output={_escaped_pattern(base)}/supervisor.log",
    ]
    options += _options(slurm, "partition", "account", "qos", "constraint", "reservation")
    if size == spec.nodes and owner.startswith("r"):
        # Slurm allocates all that is on this list: it is for whole replicas only.
        options += _options(slurm, "nodelist")
    barred = [*([slurm.exclude] if slurm.exclude else []), *exclude]
    options += [f"--exclude={','.join(barred)}"] if barred else []
    options += _options(slurm, "walltime")
    options += _gpu_options(slurm, gpus_per_node)
    options += _options(slurm, "cpus_per_task", "mem")
    options += ["--exclusive"] if slurm.exclusive else []
    options += slurm.directives
    exports = {"LAUNCHER_PYTHON": python, "LAUNCHER_BASE": base}
    return _batch_script(f"allocation {name}", options, exports, "replica.sbatch")


def controller_script(
    spec: FleetSpec, job: ControllerJob, *, root: PurePath, log: PurePath, python: str, mark: str
) -> str:
    """The batch script of the controller's own job; root is the fleet's folder."""
    name = controller_job_name(spec.name)
    near = spec.backend.slurm or SlurmBackend()
    options = [
        f"--job-name={name}",
        f"--comment={mark}",
        "--nodes=1",
        "--ntasks=1",
        "--requeue",  # after a node failure it comes back by itself
        "--open-mode=append",
        f"--signal=B:USR1@{CONTROLLER_SIGNAL_LEAD_S}",
        f"--output={_escaped_pattern(str(log))}",
    ]
    sites = ("partition", "account", "qos")
    placed = job.model_copy(update={key: getattr(job, key) or getattr(near, key) for key in sites})
    options += _options(placed, *sites, "constraint", "walltime", "cpus_per_task", "mem")
    options += job.directives
    exports = {
        "LAUNCHER_PYTHON": python,
        "LAUNCHER_STATE_DIR": str(root.parent),
        "LAUNCHER_FLEET": str(root),
    }
    return _batch_script(f"controller of fleet {spec.name}", options, exports, "controller.sbatch")


def controller_job_name(fleet: str) -> str:
    return f"{fleet}.controller"


def _options(block: SlurmBackend | ControllerJob, *keys: str) -> list[str]:
    """What the block says of these keys, in sbatch's words."""
    return [_option(key, value) for key in keys if (value := getattr(block, key))]


def _option(key: str, value: str | int) -> str:
    if key == "walltime":
        return f"--time={_slurm_time(int(value))}"
    return f"--{key.replace('_', '-')}={value}"


def _gpu_options(slurm: SlurmBackend, gpus_per_node: int) -> list[str]:
    if slurm.gres:
        return [f"--gres={slurm.gres}"]
    if slurm.gpu_option == "gres":
        return [f"--gres=gpu:{gpus_per_node}"]
    if slurm.gpu_option == "gpus-per-node":
        return [f"--gpus-per-node={gpus_per_node}"]
    return []


def _batch_script(what: str, options: list[str], exports: dict[str, str], body: str) -> str:
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {_directive(option)}" for option in options]
    lines += [f"# {what}, rendered by launcher {__version__}"]
    lines += [quoting.export(name, value) for name, value in exports.items()]
    return "\n".join(lines) + "\n\n" + template(body)


def _directive(option: str) -> str:
    """Slurm splits #SBATCH lines like a shell: quote what holds blanks or quotes."""
    return option if not set(option) & set(" \t'\"\\#") else quoting.word(option)


def _escaped_pattern(path: str) -> str:
    """A path in --output, where % starts a pattern."""
    return path.replace("%", "%%")


def _slurm_time(seconds: int) -> str:
    """Slurm counts in minutes; round up, so that nobody gets less than was asked."""
    minutes = -(-seconds // 60)
    days, rest = divmod(minutes, 24 * 60)
    return f"{days}-{rest // 60:02d}:{rest % 60:02d}:00"
