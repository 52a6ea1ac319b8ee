"""The agent: one process on each node of a fleet, run as `python -m launcher.agent`."""
