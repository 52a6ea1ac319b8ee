"""What exists: nodes, pools, and how their names are written. Imports neither of the others."""
