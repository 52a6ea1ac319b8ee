"""The testbed: a real cluster on one machine. Real slurmctld, slurmd and sshd on hosts that are
network + UTS + IPC + mount + PID namespaces and can lose power, link or speed.

By hand: `python -m tests.cluster up --nodes 4`, `… kill h2`, `… down` (root, Debian 12).
"""
