"""Run a Slurm command: argument list, cleaned environment, a deadline, a typed failure. I/O."""

import os
import subprocess
from collections.abc import Sequence

from launcher.errors import SlurmError

TIMEOUT_S = 30.0
# What a surrounding job would leak into what we submit (a job's own --gpus-per-node, say).
_LEAKING = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_")
_KEPT = ("SLURM_CONF",)
_CONTROLLER_AWAY = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Slurm backup controller",
    "Zero Bytes were transmitted",
)


def clean_environment() -> dict[str, str]:
    """The caller's environment without any Slurm variable of an enclosing job."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not name.startswith(_LEAKING)
    }


def minimal_environment() -> dict[str, str]:
    """What a job inherits: who and where, nothing of the shell that happened to submit it."""
    wanted = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LAUNCHER_STATE_DIR", *_KEPT)
    return {name: os.environ[name] for name in wanted if name in os.environ}


def run(
    command: Sequence[str], *, text: str | None = None, environment: dict[str, str] | None = None
) -> str:
    """The command's standard output. Raises SlurmError; `unreachable` where nothing is known."""
    try:
        result = subprocess.run(
            list(command),
            input=text if text is not None else None,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            env=environment if environment is not None else clean_environment(),
            check=False,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {command[0]} here",
            where="backend.slurm",
            hint="Run launcher where Slurm's commands are, such as a login node.",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command[0]} did not answer within {TIMEOUT_S:.0f} s", unreachable=True
        ) from error
    if result.returncode != 0:
        said = result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}"
        away = any(sign in said for sign in _CONTROLLER_AWAY)
        raise SlurmError(f"{command[0]}: {said[:500]}", unreachable=away)
    return result.stdout
