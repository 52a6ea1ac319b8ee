"""Collective checks over the nodes of a replica: rounds, the program, the verdicts."""
