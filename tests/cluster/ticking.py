"""Counters that grow while somebody watches: a small process that counts up, until told to stop.

python -m tests.cluster.ticking ROOT KIND INDEX FILE STEP
"""

import sys
import time
from pathlib import Path

from tests.cluster import hardware

TICK_S = 0.2


def main() -> None:
    root, kind, index, file, step = sys.argv[1:]
    path = Path(root) / f"infiniband/mlx5_{int(index) % hardware.RAILS}/ports/1" / file
    value = 0
    while Path(root).is_dir():
        value += int(step)
        if kind == "ib":
            scratch = path.with_name(".scratch")
            scratch.write_text(f"{value}\n")
            scratch.replace(path)
        else:
            state = hardware.read_state(Path(root))
            state[f"gpu.{index}.{file}"] = str(value)
            hardware.write_state(Path(root), state)
        time.sleep(TICK_S)


if __name__ == "__main__":
    main()
