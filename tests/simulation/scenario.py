"""One fleet and its misfortunes, drawn from a seed."""

import random
from dataclasses import dataclass, field
from functools import lru_cache

from launcher import render
from launcher.layout import ModelFacts, choose_layout
from launcher.spec import FleetSpec
from launcher.steps import Context
from tests.simulation.backends import Mischief

FAULTS_FOR_S = 150.0


@dataclass(frozen=True)
class Fault:
    at_s: float
    kind: str
    node: str = ""
    for_s: float = 0.0
    value: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """kind: ssh or slurm. faults in the order of their time."""

    seed: int
    kind: str
    nodes: int
    replicas: int
    size: int
    spares: int
    reschedule: str
    faults: tuple[Fault, ...]
    mischief: Mischief
    crash_chance: float = 0.0
    walltime_s: float = 0.0  # of every job, while there are faults; 0: none
    ends_down: bool = field(default=False)

    def __str__(self) -> str:
        return (
            f"{self.kind}, {self.nodes} nodes, {self.replicas} × {self.size} + {self.spares} "
            f"spares, {self.reschedule}, {len(self.faults)} faults"
        )


def draw(seed: int) -> Scenario:
    """A scenario; the same for the same seed."""
    rng = random.Random(seed)
    replicas, size = rng.choice([(1, 1), (1, 2), (1, 3), (2, 2), (2, 1), (3, 2), (2, 3)])
    spares = rng.choice([0, 0, 1, 1, 2])
    nodes = replicas * size + spares + rng.choice([0, 1, 3])
    names = [f"h{number}" for number in range(1, nodes + 1)]
    quiet = rng.random() < 0.1
    kind = rng.choice(["ssh", "slurm"])
    policies = ["auto", "auto", "auto", "top_up", "resubmit", *(["in_place"] if spares else [])]
    faults = [] if quiet else [_fault(rng, names) for _ in range(rng.randint(1, 6))]
    calls = 0.0 if quiet else rng.choice([0.0, 0.02, 0.1])
    return Scenario(
        seed=seed,
        kind=kind,
        nodes=nodes,
        replicas=replicas,
        size=size,
        spares=spares,
        reschedule=rng.choice(policies),
        faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
        mischief=Mischief(
            lost_before=calls * rng.random(),
            lost_after=calls * rng.random(),
            killed=0.0 if quiet else rng.choice([0.0, 0.0, 0.02]),
        ),
        crash_chance=rng.choice([0.0, 0.0, 0.0, 0.01]),
        ends_down=rng.random() < 0.3,
        walltime_s=rng.choice([0.0, 0.0, 60.0, 120.0]) if kind == "slurm" and not quiet else 0.0,
    )


_KINDS = (
    ("power", 5),
    ("cut", 4),
    ("agent", 3),
    ("engine", 4),
    ("deaf", 2),
    ("unfit", 2),
    ("cordon", 2),
    ("restart", 2),
    ("clock", 1),
    ("scheduler", 2),
    ("controller", 3),
    ("stubborn", 2),
    ("disk", 1),
    ("switch", 1),
    ("rollout", 1),
)


def _fault(rng: random.Random, names: list[str]) -> Fault:
    kind = rng.choices([name for name, _ in _KINDS], [weight for _, weight in _KINDS])[0]
    return Fault(
        at_s=rng.uniform(2.0, FAULTS_FOR_S),
        kind=kind,
        node=rng.choice(names),
        for_s=rng.choice([3.0, 12.0, 40.0, 90.0]),
        value=rng.choice([-3600.0, 3600.0, 30.0]),
    )


@lru_cache(maxsize=256)
def context_of(
    kind: str, nodes: int, replicas: int, size: int, spares: int, reschedule: str
) -> Context:
    """The planner's context; scripts are rendered once for all seeds."""
    spec = FleetSpec.model_validate(
        {
            "name": "sim",
            "model": "org/model",
            "replicas": replicas,
            "nodes": size,
            "spares": spares,
            "reschedule": reschedule,
            "gpus_per_node": 1,
            "parallelism": {"pipeline": size},
            "preflight": "passive",
            "limits": {"agents": 60, "start": 300, "drain": 5},
            "backend": {"ssh": {"inventory": "x"}} if kind == "ssh" else {"slurm": {}},
        }
    )
    layout = choose_layout(spec, 1, ModelFacts())
    names = tuple(f"h{number}" for number in range(1, nodes + 1))
    return Context(
        spec=spec,
        layout=layout,
        scripts=render.engine_scripts(spec, layout),
        user_id=1000,
        pool=names if kind == "ssh" else (),
        known=names,
        secret_names={"VLLM_API_KEY": "engine_key"},
    )
