"""How a model is cut over the nodes of a replica, and why. Pure."""

from dataclasses import dataclass, field

from launcher.errors import SpecError
from launcher.spec import FleetSpec, Parallelism


@dataclass(frozen=True)
class ModelFacts:
    """What config.json says, where it could be read. Unknown stays None."""

    architecture: str | None = None
    layers: int | None = None
    attention_heads: int | None = None
    weights_bytes: int | None = None


@dataclass(frozen=True)
class Layout:
    """Sizes of one replica: tensor × pipeline × data ranks over `nodes` nodes."""

    nodes: int
    tensor: int
    pipeline: int
    data: int
    ranks_per_node: int
    executor: str
    reasons: tuple[str, ...] = field(default=())

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def choose_layout(spec: FleetSpec, gpus_per_node: int, model: ModelFacts) -> Layout:
    """The layout of each replica of this fleet. Raises SpecError for an impossible one.

    gpus_per_node: what the inventory has; the spec's own value has been applied by the caller.
    """
    reasons: list[str] = []
    if spec.parallelism == "auto":
        sizes = _automatic(spec.nodes, gpus_per_node, model, reasons)
    else:
        sizes = spec.parallelism
        reasons.append("parallelism as written")
    world = sizes.tensor * sizes.pipeline * sizes.data
    _check(spec, sizes, world, gpus_per_node, model)
    executor = spec.executor
    if executor is None:
        executor = "ray" if spec.nodes > 1 else "mp"
        why = "spans nodes" if spec.nodes > 1 else "stays on one node"
        reasons.append(f"executor {executor}, for the replica {why}")
    return Layout(
        nodes=spec.nodes,
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        data=sizes.data,
        ranks_per_node=world // spec.nodes,
        executor=executor,
        reasons=tuple(reasons),
    )


def _automatic(
    nodes: int, gpus_per_node: int, model: ModelFacts, reasons: list[str]
) -> Parallelism:
    """Tensor parallel within a node's fast links, pipeline parallel across nodes."""
    tensor = gpus_per_node
    if model.attention_heads:
        while tensor > 1 and (model.attention_heads % tensor or gpus_per_node % tensor):
            tensor -= 1
    pipeline = nodes * (gpus_per_node // tensor)
    if tensor == gpus_per_node:
        reasons.append(f"tensor {tensor}: all {gpus_per_node} GPUs of a node, over its fast links")
    else:
        reasons.append(
            f"tensor {tensor}: the largest size up to {gpus_per_node} that divides "
            f"{model.attention_heads} attention heads"
        )
    if pipeline > 1:
        reasons.append(f"pipeline {pipeline}: across nodes, where links are slower")
    return Parallelism(tensor=tensor, pipeline=pipeline)


def _check(
    spec: FleetSpec, sizes: Parallelism, world: int, gpus_per_node: int, model: ModelFacts
) -> None:
    written = f"tensor {sizes.tensor} × pipeline {sizes.pipeline} × data {sizes.data}"
    if world % spec.nodes:
        raise SpecError(
            f"{written} makes {world} ranks, which do not divide over {spec.nodes} nodes",
            where="parallelism",
            hint="Change nodes or parallelism so that every node gets the same number of ranks.",
        )
    if world // spec.nodes > gpus_per_node:
        raise SpecError(
            f"{written} needs {world // spec.nodes} GPUs on each of {spec.nodes} nodes, "
            f"and a node has {gpus_per_node}",
            where="parallelism",
            hint="Take more nodes, or write gpus_per_node if that count is wrong.",
        )
    if model.attention_heads and model.attention_heads % sizes.tensor:
        raise SpecError(
            f"tensor {sizes.tensor} does not divide the model's {model.attention_heads} heads",
            where="parallelism.tensor",
            hint="Choose a divisor.",
        )
    if model.layers and sizes.pipeline > model.layers:
        raise SpecError(
            f"pipeline {sizes.pipeline} is more than the model's {model.layers} layers",
            where="parallelism.pipeline",
            hint="Choose a smaller size.",
        )
