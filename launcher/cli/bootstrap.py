"""`launcher bootstrap`: the agent onto SSH hosts; under Slurm a proof that it runs on a node."""

from pathlib import Path
from typing import Any

from inventory import nodeset
from launcher.backends import make_backend
from launcher.cli import output
from launcher.errors import RemoteError, UsageError
from launcher.paths import FleetPaths
from launcher.specfile import load


def bootstrap(
    file: Path | None, flags: dict[str, Any], *, wheels: Path | None, as_json: bool
) -> int:
    spec = load(file, flags).spec
    backend = make_backend(spec, FleetPaths.of(spec.name))
    if backend.kind == "local":
        raise UsageError("this machine runs launcher already", where="backend.local")
    results: dict[str, str | RemoteError]
    if backend.kind == "ssh":
        results = _onto_hosts(backend, wheels)
    else:
        from launcher.backends.slurm_probe import probe_one_node

        results = dict([probe_one_node(spec)])
    failed = {name: error for name, error in results.items() if isinstance(error, RemoteError)}
    if as_json:
        nodes = {
            name: output.error_of(answer) if isinstance(answer, RemoteError) else answer
            for name, answer in results.items()
        }
        output.document({"version": 1, "nodes": nodes})
    groups: dict[str, list[str]] = {}
    for name, answer in results.items():
        groups.setdefault(str(answer), []).append(name)
    for words, names in groups.items():
        output.say(f"{nodeset.fold(names)}: {words}")
    return next(iter(failed.values())).exit_code if failed else 0


def _onto_hosts(backend: Any, wheels: Path | None) -> dict[str, str | RemoteError]:
    from launcher.bootstrap import gather_wheels, install

    folder = wheels or gather_wheels()
    try:
        names = [node.name for node in backend.pool().nodes]
        return install(backend.fleet(), names, folder)
    finally:
        backend.close()
