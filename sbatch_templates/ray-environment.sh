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
