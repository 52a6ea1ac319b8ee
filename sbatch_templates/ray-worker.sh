# --- a Ray worker, on every other node; started when the head's raylet listens --------------------
export VLLM_HOST_IP="$LAUNCHER_NODE_ADDRESS" VLLM_PORT="$LAUNCHER_PORT_VLLM_FIRST"

COMMAND=(ray start --block --disable-usage-stats
  --address="$LAUNCHER_LEADER_ADDRESS:$LAUNCHER_LEADER_PORT_RENDEZVOUS"
  --node-ip-address="$LAUNCHER_NODE_ADDRESS"
  --node-manager-port="$LAUNCHER_PORT_NODE_MANAGER"
  --object-manager-port="$LAUNCHER_PORT_OBJECT_MANAGER"
  --runtime-env-agent-port="$LAUNCHER_PORT_RUNTIME_ENV_AGENT"
  --dashboard-agent-listen-port="$LAUNCHER_PORT_DASHBOARD_AGENT_HTTP"
  --dashboard-agent-grpc-port="$LAUNCHER_PORT_DASHBOARD_AGENT_GRPC"
  --metrics-export-port="$LAUNCHER_PORT_METRICS"
  --min-worker-port="$LAUNCHER_PORT_WORKER_FIRST" --max-worker-port="$LAUNCHER_PORT_WORKER_LAST"
  --num-gpus="$LAUNCHER_RANKS_PER_NODE" --num-cpus="$((LAUNCHER_RANKS_PER_NODE + 1))"
  --temp-dir="$LAUNCHER_TMP/r")
# A parked process that becomes this command is told what this script would start.
if [ -n "${LAUNCHER_TELL:-}" ]; then tell "${COMMAND[@]}"; exit 0; fi
exec "${ENGINE[@]}" "${COMMAND[@]}"
