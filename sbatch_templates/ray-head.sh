# --- the Ray head, on the leader ------------------------------------------------------------------
export VLLM_HOST_IP="$LAUNCHER_NODE_ADDRESS" VLLM_PORT="$LAUNCHER_PORT_VLLM_FIRST"

exec "${ENGINE[@]}" ray start --head --block --disable-usage-stats \
  --node-ip-address="$LAUNCHER_NODE_ADDRESS" \
  --port="$LAUNCHER_PORT_RENDEZVOUS" \
  --node-manager-port="$LAUNCHER_PORT_NODE_MANAGER" \
  --object-manager-port="$LAUNCHER_PORT_OBJECT_MANAGER" \
  --runtime-env-agent-port="$LAUNCHER_PORT_RUNTIME_ENV_AGENT" \
  --dashboard-agent-listen-port="$LAUNCHER_PORT_DASHBOARD_AGENT_HTTP" \
  --dashboard-agent-grpc-port="$LAUNCHER_PORT_DASHBOARD_AGENT_GRPC" \
  --metrics-export-port="$LAUNCHER_PORT_METRICS" \
  --ray-client-server-port="$LAUNCHER_PORT_RAY_CLIENT" \
  --no-monitor --include-dashboard=false --dashboard-port="$LAUNCHER_PORT_DASHBOARD" \
  --min-worker-port="$LAUNCHER_PORT_WORKER_FIRST" --max-worker-port="$LAUNCHER_PORT_WORKER_LAST" \
  --num-gpus="$LAUNCHER_RANKS_PER_NODE" --num-cpus="$((LAUNCHER_RANKS_PER_NODE + 1))" \
  --temp-dir="$LAUNCHER_TMP/r"
