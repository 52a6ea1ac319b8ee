"""The testbed by hand.

python -m tests.cluster up --nodes N | down | status | exec HOST [--user U] -- CMD…
                        kill HOST | start HOST | cut HOST | heal HOST | slow HOST RATE
                        gpu --list | gpu HOST h100|a100|b200|none | gpu HOST INDEX FAULT
"""

import argparse
import os
import subprocess
import sys

from tests.cluster import bed, faults, hardware


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="make the cluster, or complete the one that is there")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--no-slurm", action="store_true", help="hosts and sshd only")
    verbs.add_parser("down", help="remove everything that up made, also after a crash")
    verbs.add_parser("status", help="hosts, daemons, Slurm's view")
    execute = verbs.add_parser("exec", help="run a command on a host")
    execute.add_argument("host")
    execute.add_argument("--user")
    execute.add_argument("command", nargs=argparse.REMAINDER)
    for verb, words in (
        ("kill", "power failure"),
        ("start", "boot again"),
        ("cut", "link down"),
        ("heal", "link up, at full speed"),
        ("slow", "shape the link"),
    ):
        one = verbs.add_parser(verb, help=words)
        one.add_argument("host")
        if verb == "slow":
            one.add_argument("rate", help="such as 100mbit")
    gpu = verbs.add_parser("gpu", help="simulated GPUs: a kind for all eight, or a fault of one")
    gpu.add_argument("--list", action="store_true", help="the faults, by name")
    gpu.add_argument("words", nargs="*", metavar="HOST [KIND | INDEX FAULT]")
    arguments = parser.parse_args()
    if arguments.verb == "gpu" and arguments.list:
        return _list_faults()
    if os.geteuid() != 0:
        print("the testbed needs root: it makes network and PID namespaces", file=sys.stderr)
        return 2
    match arguments.verb:
        case "up":
            bed.up(arguments.nodes, with_slurm=not arguments.no_slurm)
        case "down":
            bed.down()
        case "status":
            print(bed.status())
        case "exec":
            command = [word for word in arguments.command if word != "--"]
            return subprocess.call(bed.on(arguments.host, *command, user=arguments.user))
        case "slow":
            bed.slow(arguments.host, arguments.rate)
        case "gpu":
            return _gpu(arguments.words)
        case verb:
            getattr(bed, verb)(arguments.host)
    return 0


def _list_faults() -> int:
    for name, one in faults.FAULTS.items():
        print(f"{name:16} {one.words:42} → {one.check}, {one.verdict}")
    return 0


def _gpu(words: list[str]) -> int:
    match words:
        case [host, "none"]:
            hardware.clear(host)
        case [host, kind] if kind in hardware.PROFILES:
            bed.gpus(host, kind)
        case [host, index, name] if name in faults.FAULTS:
            bed.fault(host, int(index), name)
        case _:
            kinds = ", ".join(hardware.PROFILES)
            print(f"gpu HOST {kinds} or none; gpu HOST INDEX FAULT (gpu --list)", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
