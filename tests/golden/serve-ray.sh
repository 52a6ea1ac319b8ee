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

# What is about to be exec'ed, for the agent to read: how many words, the words, the environment.
tell() {
  printf 'LAUNCHER-TELL\0'
  printf '%s\0' "$#" "$@"
  env -0
  printf 'LAUNCHER-TOLD\0'
}

# Ray's own variables, the same for all its processes: a parked one has read them long before.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$LAUNCHER_SECRETS/ray_token"
# Idle workers, which vLLM's actors never use: the first driver would wait until they are there.
export RAY_prestart_worker_first_driver=0

# Ray's workers are made by the twin of a parked process, where there is one (see ray_hook.py).
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
