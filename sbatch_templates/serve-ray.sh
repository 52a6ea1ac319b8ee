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
