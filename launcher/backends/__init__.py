"""Backends: which nodes are there, get agents onto them, what became of them, give them back."""

from launcher.backends.base import Backend
from launcher.paths import FleetPaths
from launcher.spec import FleetSpec


def make_backend(spec: FleetSpec, paths: FleetPaths) -> Backend:
    """The backend that the spec names. Imports are late: paramiko alone costs 0.2 s."""
    if spec.backend.ssh:
        from launcher.backends.ssh import SshHosts

        return SshHosts(spec, paths)
    if spec.backend.slurm:
        from launcher.backends.slurm import Slurm

        return Slurm(spec, paths)
    from launcher.backends.local import LocalBackend

    return LocalBackend(spec)
