# --- load this node and check what it computes; the order comes on stdin ---------------------------
exec "${ENGINE[@]}" python3 -c "$LAUNCHER_BURN"
