"""`make acceptance [ONLY=…]`: the full matrix with real engines and the benchmarks.

Writes docs/acceptance.md (what passed, when, on which machine), docs/faults.md (each fault once)
docs/measurements.md and docs/gateway.md (tables).
ONLY selects: `matrix`, `bench`, `faults`, `gateway`, or a pytest -k expression for the matrix.
"""

import json
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.common import machine
from benchmarks.gateway_page import page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ENGINES = {
    "bringup": "From command to first token",
    "recovery": "From the verdict to serving again",
    "parking": "What parking costs the engine beside it",
}
BY_HAND = "<!-- measured by hand; kept by make acceptance -->"


def matrix(chosen: str) -> int:
    """All engine tests, the acceptance-marked ones included; a table of what they did."""
    report = ROOT / ".acceptance.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "engine or acceptance"]
    command += ["-k", chosen] if chosen else []
    code = subprocess.call([*command, f"--junitxml={report}"], cwd=ROOT)
    rows = [
        (case.get("name", ""), _outcome(case), float(case.get("time", "0")))
        for case in ElementTree.parse(report).iter("testcase")
    ]
    report.unlink()
    lines = [
        f"# Acceptance, {_today()}",
        "",
        f"Machine: {machine()}. Repeat: `make acceptance{f' ONLY={chosen}' if chosen else ''}`.",
        "",
    ]
    lines += ["| test | outcome | seconds |", "| --- | --- | --- |"]
    lines += [f"| {name} | {outcome} | {seconds:.0f} |" for name, outcome, seconds in rows]
    (DOCS / "acceptance.md").write_text("\n".join(lines) + "\n")
    return code


def benchmarks() -> int:
    """Each benchmark once, its figures as a table with the command that repeats it."""
    lines = [f"# Measurements, {_today()}", "", f"Machine: {machine()}.", ""]
    for name, title in ENGINES.items():
        lines += engines(name, title, _json(f"benchmarks/{name}.py"))
    command_line = _json("benchmarks/cli.py")
    lines += ["## The command line", "", "`python benchmarks/cli.py`", ""]
    lines += [
        "| command | median, s | against | ratio | bound |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in command_line["rows"]:
        lines += [
            f"| {row['command']} | {row['median_s']} | {row['against']} | {row['ratio']} "
            f"| {row['bound']} |"
        ]
    lines += _preflight(_json("benchmarks/preflight.py"))
    page = DOCS / "measurements.md"
    kept = page.read_text().partition(BY_HAND)[2]
    page.write_text("\n".join(lines) + f"\n\n{BY_HAND}{kept}")
    return 0


def engines(name: str, title: str, found: dict) -> list[str]:
    """Two tables of a benchmark that starts engines: its figures, and their ratios."""
    lines = [
        f"## {title}",
        "",
        f"`python benchmarks/{name}.py` (its `--help` says what each figure is)",
        "",
        "| executor | figure | each round | median |",
        "| --- | --- | --- | --- |",
    ]
    compared = ["| executor | ratio of medians | is | bound |", "| --- | --- | --- | --- |"]
    for executor, figures in found["results"].items():
        for figure, values in figures.items():
            if figure != "ratios":
                each, median = ", ".join(map(str, values)), f"{statistics.median(values):g}"
                lines += [f"| {executor} | {figure} | {each} | {median} |"]
        for row in figures["ratios"]:
            pair, bound = f"{row['of']} / {row['against']}", row["bound"] or "none"
            compared += [f"| {executor} | {pair} | {row['ratio']} | {bound} |"]
    return [*lines, "", *compared, ""]


def _preflight(found: dict) -> list[str]:
    cost = found["continuous"]
    return [
        "",
        "## Preflight",
        "",
        "`python benchmarks/preflight.py` (as root)",
        "",
        "| what | figure | against | ratio | bound |",
        "| --- | --- | --- | --- | --- |",
        f"| passive level, {found['hosts']} hosts over sshd, s | {found['launcher_s']} "
        f"| clush, the same probes: {found['clush_s']} | {found['ratio_of_medians']} | 1.2 |",
        f"| continuous checks, % of a core | {cost['percent_of_a_core']} "
        f"| {cost['cpu_s_of_a_look']} s CPU each {cost['period_s']:.0f} s | - | 0.5 % |",
    ]


def _json(script: str, *arguments: str) -> dict:
    result = subprocess.run(
        [sys.executable, script, "--json", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(result.stdout)


def _outcome(case: ElementTree.Element) -> str:
    for kind in ("failure", "error", "skipped"):
        if case.find(kind) is not None:
            return kind
    return "passed"


def _today() -> str:
    return time.strftime("%Y-%m-%d")


def main() -> int:
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    code = 0
    if only in ("", "faults"):
        code = subprocess.call([sys.executable, "-m", "tests.faults_table"], cwd=ROOT)
    if only in ("", "gateway"):
        figures = _json("benchmarks/gateway.py"), _json("benchmarks/gateway.py", "--churn", "300")
        (DOCS / "gateway.md").write_text(page(figures[0], figures[1]["churn"]))
    if only not in ("bench", "faults", "gateway"):
        code = matrix("" if only == "matrix" else only) or code
    if only in ("", "bench"):
        code = benchmarks() or code
    return code


if __name__ == "__main__":
    sys.exit(main())
