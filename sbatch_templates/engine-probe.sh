# --- what the engine's environment holds, as one line of JSON -----------------------------------
exec "${ENGINE[@]}" python3 -c "$LAUNCHER_PROBE"
