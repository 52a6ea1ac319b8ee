# --- ranks of a collective check on one node; orders come on stdin ---------------------------------
exec "${ENGINE[@]}" python3 -c "$LAUNCHER_COLLECTIVE"
