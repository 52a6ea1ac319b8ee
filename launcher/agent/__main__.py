"""`python -m launcher.agent --base DIR --node NAME`: started by srun, SSH or as a child."""

import argparse
import sys
from pathlib import Path

from launcher import __version__
from launcher.agent.core import Agent
from launcher.agent.sweep import sweep
from launcher.errors import StateError
from launcher.paths import BasePaths


def main() -> int:
    parser = argparse.ArgumentParser(prog="launcher.agent", description=__doc__)
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("--base", type=Path, help="the allocation's folder (holds agent.json)")
    parser.add_argument("--node", help="the name of this node")
    parser.add_argument("--sweep", metavar="MARK", help="kill what carries this mark, and leave")
    arguments = parser.parse_args()
    if arguments.version:
        print(__version__)
        return 0
    if arguments.sweep:
        nodes = [BasePaths(arguments.base).node(arguments.node)] if arguments.node else []
        print(sweep(arguments.sweep, nodes))
        return 0
    try:
        Agent(BasePaths(arguments.base.absolute()), arguments.node).run()
    except StateError as error:
        print(f"launcher.agent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
