"""Cost of the command line: --help against a bare two-command Typer app, status against --help.

python benchmarks/cli.py [--rounds 15] [--json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

LAUNCHER = str(Path(sys.executable).with_name("launcher"))
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


def timed(command: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, env=environment, capture_output=True, check=False)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bare.py").write_text(BARE)
        environment = {**os.environ, "LAUNCHER_STATE_DIR": folder}
        write_status(Path(folder))
        commands = {
            "bare": [sys.executable, f"{folder}/bare.py", "--help"],
            "launcher --help": [LAUNCHER, "--help"],
            "launcher status": [LAUNCHER, "status", "--fleet", "bench"],
        }
        figures: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(arguments.rounds + 1):
            for name, command in commands.items():
                figures[name].append(timed(command, environment))
    medians = {name: statistics.median(values[1:]) for name, values in figures.items()}
    rows = [
        row("launcher --help", "bare", medians, 1.5),
        row("launcher status", "launcher --help", medians, 2.0),
    ]
    document = {"benchmark": "cli", "date": date.today().isoformat(), "rows": rows}  # noqa: DTZ011
    if arguments.json:
        print(json.dumps(document, indent=1))
    else:
        for one in rows:
            print(f"{one['command']}: {one['median_s']} s, {one['ratio']} of {one['against']}")
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
