"""Everything that stays the same during a run, gathered once from spec and backend. I/O."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from inventory import nodeset
from launcher import __version__, cordons, render
from launcher.backends import make_backend
from launcher.backends.base import Allocation, Backend
from launcher.documents import AgentConfig, ModelPlace, Park
from launcher.errors import CapacityError, StateError
from launcher.layout import choose_layout
from launcher.model_folder import read_model_facts
from launcher.paths import FleetPaths, state_root
from launcher.record import AllocationRecord
from launcher.secretstore import WEBHOOK_FILE
from launcher.spec import FleetSpec
from launcher.steps import Context

# What clients, the gateway and the controller know; no node needs it.
SECRETS_KEPT_HERE = ("api_key", "fallback_key", WEBHOOK_FILE)
# What says where huggingface_hub keeps its cache.
_HUB_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME")


@dataclass(frozen=True)
class Ground:
    """A fleet's spec with the backend that it runs on and the context for the planner."""

    spec: FleetSpec
    backend: Backend
    context: Context
    paths: FleetPaths

    def allocation(self, run: int, held: AllocationRecord) -> Allocation:
        """One allocation of this fleet, as every part describes it."""
        return make_allocation(self.paths, self.spec, run, held, self.backend.kind)

    def rendered(self, run: int, held: AllocationRecord) -> dict[str, str]:
        """Every script of one allocation, by file name: what `render` writes and what runs."""
        return {**self.context.scripts, **self.backend.commands(self.allocation(run, held))}


def make_allocation(
    paths: FleetPaths, spec: FleetSpec, run: int, held: AllocationRecord, backend: str
) -> Allocation:
    """An allocation with its folder, mark, agent configuration and secrets."""
    base = paths.run(run).base(held.name)
    seed = f"{os.getuid()}/{paths.root}/{run}/{held.name}"
    config = AgentConfig(
        fleet=spec.name,
        mark=hashlib.sha256(seed.encode()).hexdigest()[:16],
        package_version=__version__,
        orphan_timeout_s=spec.limits.orphan,
        cache_folder=str(state_root() / "cache") if backend != "ssh" else "",
        model=model_place(spec),
    )
    return Allocation(
        fleet=spec.name,
        run=run,
        owner=held.owner,
        number=held.number,
        size=held.size,
        nodes=held.nodes,
        exclude=held.exclude,
        base=base,
        config=config,
        secrets={
            name: value
            for name, value in read_secrets(paths.secrets).items()
            if name not in SECRETS_KEPT_HERE
        },
    )


def model_place(spec: FleetSpec) -> ModelPlace:
    """Where the engine will look for its weights."""
    arguments = {
        key.lstrip("-").replace("_", "-"): value for key, value in spec.engine.args.items()
    }
    return ModelPlace(
        model=spec.model,
        revision=spec.revision or "",
        download_folder=str(arguments.get("download-dir") or ""),
        environment={name: spec.env[name] for name in _HUB_VARIABLES if name in spec.env},
        in_container=spec.runtime.pyxis is not None,
    )


def make_ground(spec: FleetSpec, paths: FleetPaths, *, check: bool) -> Ground:
    """Gather backend, pool and layout. Raises the FleetError that says why it cannot work.

    check: whether the backend is asked if it can take the fleet now. `up` does; a controller that
    adopts a running fleet must not be stopped by a host that is away.
    """
    backend = make_backend(spec, paths)
    if check:
        backend.check()
    pool = backend.pool()
    gpus = spec.gpus_per_node or min((node.gpus for node in pool.nodes if node.gpus), default=1)
    facts = read_model_facts(spec.model)
    layout = choose_layout(spec, gpus, facts)
    wanted = spec.nodes * spec.replicas + spec.spares
    barred: set[str] = set()
    if check:  # a fleet that runs keeps its nodes, whoever was cordoned since
        barred = cordons.read(backend.kind).cordons.keys() & {node.name for node in pool.nodes}
    if len(pool.nodes) - len(barred) < wanted:
        told = f", {len(barred)} of them cordoned ({nodeset.fold(list(barred))})" if barred else ""
        raise CapacityError(
            f"{spec.replicas} × {spec.nodes} nodes{_and_spares(spec)} asked for, {pool.name} has "
            f"{len(pool.nodes)}{told}",
            where=f"backend.{backend.kind}",
            hint="Ask for fewer nodes or replicas, name another pool, or `launcher uncordon`.",
        )
    secret_names = {"VLLM_API_KEY": "engine_key", **{name: name for name in spec.secrets}}
    scripts = render.engine_scripts(spec, layout)
    context = Context(
        spec=spec,
        layout=layout,
        scripts=scripts,
        user_id=os.getuid(),
        pool=() if backend.chooses_nodes else tuple(node.name for node in pool.nodes),
        known=tuple(node.name for node in pool.nodes),
        places={
            node.name: (node.switch or "", node.rack or "")
            for node in pool.nodes
            if node.switch or node.rack
        },
        shares_machine=backend.shares_machine,
        gpus_per_node=gpus,
        secret_names=secret_names,
        weights_folders={node.name: node.nvme for node in pool.nodes},
        weights_bytes=facts.weights_bytes,
        park=_park(scripts, secret_names),
    )
    return Ground(spec, backend, context, paths)


def _park(scripts: dict[str, str], secret_names: dict[str, str]) -> Park | None:
    """The order for a parked engine process: with every secret but the API server's key, which
    only the leader has."""
    if "park.sh" not in scripts:
        return None
    known = {name: file for name, file in secret_names.items() if name != "VLLM_API_KEY"}
    return Park(script=scripts["park.sh"], secret_environment=known)


def _and_spares(spec: FleetSpec) -> str:
    return f" and {spec.spares} spare{'s' if spec.spares > 1 else ''}" if spec.spares else ""


def read_secrets(folder: Path) -> dict[str, str]:
    """All secrets of a fleet by name. Raises StateError where a file cannot be read."""
    try:
        return {
            file.name: file.read_text(encoding="utf-8").strip()
            for file in sorted(folder.iterdir())
            if file.is_file() and not file.name.startswith(".")
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StateError(f"cannot be read: {error.strerror}", where=str(folder)) from error
