"""Cost of the command line: --help against a bare two-command Typer app, status against --help.

python benchmarks/cli.py [--rounds 15] [--json]
"""

import functools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import LAUNCHER, alternate, document, options, scratch, show

BARE = """
import typer
app = typer.Typer()

@app.command()
def one(count: int = 1) -> None:
    "One."

@app.command()
def two() -> None:
    "Two."

app()
"""


def timed(name: str, command: list[str], environment: dict[str, str]) -> dict[str, float]:
    began = time.perf_counter()
    subprocess.run(command, env=environment, capture_output=True, check=False)
    return {name: time.perf_counter() - began}


def main() -> int:
    arguments = options(__doc__, rounds=15).parse_args()
    with scratch() as folder:
        (folder / "bare.py").write_text(BARE)
        environment = {**os.environ, "LAUNCHER_STATE_DIR": str(folder)}
        write_status(folder)
        commands = {
            "bare": [sys.executable, f"{folder}/bare.py", "--help"],
            "launcher --help": [LAUNCHER, "--help"],
            "launcher status": [LAUNCHER, "status", "--fleet", "bench"],
        }
        measures = [functools.partial(timed, *one, environment) for one in commands.items()]
        figures = alternate(measures, arguments.rounds)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    rows = [
        row("launcher --help", "bare", medians, 1.5),
        row("launcher status", "launcher --help", medians, 2.0),
    ]
    told = [
        f"{one['command']}: {one['median_s']} s, {one['ratio']} of {one['against']}"
        for one in rows
    ]
    show(document("cli", rows=rows), "\n".join(told), as_json=arguments.json)
    return 0


def row(name: str, against: str, medians: dict[str, float], bound: float) -> dict[str, object]:
    return {
        "command": name,
        "median_s": round(medians[name], 3),
        "against": against,
        "ratio": round(medians[name] / medians[against], 2),
        "bound": bound,
    }


def write_status(folder: Path) -> None:
    """The status of a small local fleet, as its controller would have left it."""
    from launcher.status import Status
    from launcher.wish import Wish

    fleet = folder / "bench"
    fleet.mkdir()
    wish = Wish(run=1, desired="up", at=time.time())
    (fleet / "wish.json").write_text(wish.model_dump_json())
    status = Status(
        fleet="bench",
        run=1,
        desired="up",
        phase="serving",
        endpoint="http://127.0.0.2:20201/v1",
        api_key_file="key",
        model="tiny",
        backend="local",
        replicas=[],
        waiting_for=[],
        updated_at=time.time(),
    )
    (fleet / "status.json").write_text(status.model_dump_json())


if __name__ == "__main__":
    sys.exit(main())
