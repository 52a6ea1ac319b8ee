"""The options that stand for keys of the spec: the same for every command that takes a spec."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

SpecFile = Annotated[
    Path | None, typer.Option("-f", "--file", help="The spec; ./fleet.yaml if it is there.")
]
FleetOption = Annotated[str | None, typer.Option("--fleet", help="The fleet's name.")]
Model = Annotated[str | None, typer.Option(help="A model folder or a Hugging Face id.")]


def _flags(
    fleet: FleetOption = None,
    model: Model = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes per replica.")] = None,
    replicas: Annotated[int | None, typer.Option(help="How many replicas.")] = None,
    spares: Annotated[
        int | None, typer.Option(help="Nodes kept ready to take a lost one's place.")
    ] = None,
    executor: Annotated[
        str | None, typer.Option(help="ray or mp (vLLM's own multi-node mode).")
    ] = None,
    tensor: Annotated[int | None, typer.Option(help="Tensor-parallel size.")] = None,
    pipeline: Annotated[int | None, typer.Option(help="Pipeline-parallel size.")] = None,
    data: Annotated[int | None, typer.Option(help="Data-parallel size.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs that a replica uses on each node.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the fleet's address (the gateway).")
    ] = None,
) -> dict[str, Any]:
    """The flags that were given, nested like the spec."""
    plain = {
        "name": fleet,
        "model": model,
        "nodes": nodes,
        "replicas": replicas,
        "spares": spares,
        "executor": executor,
        "gpus_per_node": gpus_per_node,
        "port": port,
    }
    flags: dict[str, Any] = {key: value for key, value in plain.items() if value is not None}
    sizes = {"tensor": tensor, "pipeline": pipeline, "data": data}
    if any(size is not None for size in sizes.values()):
        # Sizes given together replace the file's: --tensor 2 means tensor 2 and nothing else.
        flags["parallelism"] = {name: size or 1 for name, size in sizes.items()}
    return flags


def takes_spec(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options. It is called with the file, the flags, and its own options."""
    shared = inspect.signature(_flags).parameters
    own = list(inspect.signature(command).parameters.values())[2:]  # after file and flags
    file = inspect.Parameter(
        "file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=SpecFile
    )
    options = [file, *shared.values(), *own]

    @functools.wraps(command)
    def called(file: Path | None, **values: Any) -> None:
        flags = _flags(**{name: values.pop(name) for name in shared})
        command(file, flags, **values)

    # Typer reads the options from what a function says of itself.
    keyword = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.Signature([one.replace(kind=keyword) for one in options])
    called.__signature__ = signature  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in options}
    return called
