# --- an engine process that imports everything, and waits for its order on stdin -------------------
COMMAND=(python3 -c 'import os; exec(os.environ["LAUNCHER_PARK"])')
tell "${COMMAND[@]}"
exec "${ENGINE[@]}" "${COMMAND[@]}"
