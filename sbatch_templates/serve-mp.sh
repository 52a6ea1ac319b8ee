# --- vLLM on one node of its own multi-node mode; rank 0 has the API server ------------------------
export VLLM_HOST_IP="$LAUNCHER_NODE_ADDRESS" VLLM_PORT="$LAUNCHER_PORT_VLLM_FIRST"

# The engine answers its gateway only, on every path (vLLM's own key leaves some open).
mkdir -p "$LAUNCHER_TMP/guard"
printf '%s' "$LAUNCHER_GUARD" >"$LAUNCHER_TMP/guard/launcher_guard.py"
export PYTHONPATH="$LAUNCHER_TMP/guard${PYTHONPATH:+:$PYTHONPATH}"
unset LAUNCHER_GUARD

if [ "$LAUNCHER_NODE_RANK" -eq 0 ]; then
  ROLE=(--host "$LAUNCHER_NODE_ADDRESS" --port "$LAUNCHER_PORT_API")
  ROLE+=(--middleware launcher_guard.Guard)
else
  ROLE=(--headless)
fi
if [ "$LAUNCHER_NODES" -gt 1 ]; then
  ROLE+=(--nnodes "$LAUNCHER_NODES" --node-rank "$LAUNCHER_NODE_RANK"
    --master-addr "$LAUNCHER_LEADER_ADDRESS" --master-port "$LAUNCHER_LEADER_PORT_RENDEZVOUS")
fi
if [ "$LAUNCHER_DATA_PARALLEL" -gt 1 ]; then
  ROLE+=(--data-parallel-rpc-port "$LAUNCHER_LEADER_PORT_DATA_PARALLEL_RPC")
fi

COMMAND=(vllm serve "$LAUNCHER_MODEL" --distributed-executor-backend mp "${ROLE[@]}"
  "${LAUNCHER_ENGINE_ARGS[@]}")
# A parked process that becomes this command is told what this script would start.
if [ -n "${LAUNCHER_TELL:-}" ]; then tell "${COMMAND[@]}"; exit 0; fi
exec "${ENGINE[@]}" "${COMMAND[@]}"
