"""What the benchmarks share: options, rounds, scratch folders, and how a result is told."""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.cli.output import table

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = str(Path(sys.executable).with_name("launcher"))


def options(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; --rounds where it repeats what it measures."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="beside a first, uncounted")
    parser.add_argument("--json", action="store_true", help="one document, and nothing else")
    return parser


def alternate(
    measures: list[Callable[[], dict[str, float]]], rounds: int, about: str = ""
) -> dict[str, list[float]]:
    """Each in turn, round by round; the first round makes caches warm and does not count."""
    figures: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for measure in measures:
            found = measure()
            told = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
            say(f"{about} {f'round {number}' if number else 'warm-up'}: {told}".strip())
            for name, value in found.items() if number else ():
                figures.setdefault(name, []).append(value)
    return figures


def ratios(
    figures: dict[str, list[float]], wanted: dict[tuple[str, str], float | None]
) -> list[dict[str, Any]]:
    """Ratios of medians, each with its bound, of what was measured."""
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return [
        {
            "of": of,
            "against": against,
            "ratio": round(medians[of] / medians[against], 3),
            "bound": bound,
        }
        for (of, against), bound in wanted.items()
        if of in medians and against in medians
    ]


def tables(results: dict[str, dict[str, Any]]) -> str:
    """For people: the figures of each executor, and their ratios."""
    figures = [["executor", "figure", "median", "each round"]]
    compared = [["executor", "ratio of medians", "is", "at most"]]
    for executor, found in results.items():
        for name, values in found.items():
            if isinstance(values, list) and name != "ratios":
                each = ", ".join(map(str, values))
                figures.append([executor, name, f"{statistics.median(values):.1f}", each])
        for row in found["ratios"]:
            bound = "-" if row["bound"] is None else f"{row['bound']:.2f}"
            pair = f"{row['of']} / {row['against']}"
            compared.append([executor, pair, f"{row['ratio']:.2f}", bound])
    return f"{table(figures)}\n\n{table(compared)}"


def document(name: str, **found: Any) -> dict[str, Any]:
    """The result of a benchmark, for programs."""
    today = time.strftime("%Y-%m-%d")
    return {"benchmark": name, "date": today, "machine": machine(), **found}


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024**3
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()} cores, {memory} GiB, {platform.system()} {kernel}"


def show(found: dict[str, Any], text: str, *, as_json: bool) -> None:
    print(json.dumps(found, indent=1) if as_json else text)


def say(text: str) -> None:
    """How far it is; not part of the result."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def scratch(prefix: str = "lb-") -> Iterator[Path]:
    """A folder with a short name: a Unix socket's path has room for 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
