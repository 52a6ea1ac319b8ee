"""Every fault once: is it found, named and classified, and what does `up` do about it?

    python -m tests.faults_table [--only NAME…]      (needs the testbed; writes docs/faults.md)

Four hosts of eight simulated H100s; the fault is given to h2. `up` runs the fake engine.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance import machine
from tests.cluster import bed, faults, hardware
from tests.cluster.hostfaults import HOST_FAULTS
from tests.conftest import LAUNCHER, ROOT, Cli, make_fake_engine
from tests.launcher.fleets import FleetUnderTest, fake_spec

HOSTS = ("h1", "h2", "h3", "h4")
VICTIM, INDEX = "h2", 3


@dataclass(frozen=True)
class Row:
    name: str
    words: str
    found: str
    seconds: float
    up: str
    is_right: bool


@contextlib.contextmanager
def hardware_fault(name: str) -> Iterator[None]:
    bed.fault(VICTIM, INDEX, name)
    try:
        yield
    finally:
        bed.gpus(VICTIM)


def cases() -> Iterator[tuple[str, str, contextlib.AbstractContextManager[None], dict[str, str]]]:
    """Name, words, how to give it, and what must be found."""
    for name, fault in faults.FAULTS.items():
        expected = {
            "check": fault.check,
            "device": faults.device_of(fault, INDEX),
            "verdict": fault.verdict,
            "level": "passive",
        }
        yield name, fault.words, hardware_fault(name), expected
    for name, host_fault in HOST_FAULTS.items():
        expected = {
            "check": host_fault.check,
            "device": host_fault.device,
            "verdict": "unhealthy",
            "level": host_fault.level,
        }
        yield name, host_fault.words, host_fault.given(VICTIM), expected


def try_one(fleet: FleetUnderTest, name: str, words: str, given, expected) -> Row:
    with given:
        began = time.monotonic()
        looked = fleet.cli("preflight", "-f", fleet.file, "--json", "--level", expected["level"])
        seconds = time.monotonic() - began
        document = json.loads(looked.stdout)
        found = [
            f
            for f in document["nodes"][VICTIM]["findings"]
            if (f["check"], f["device"], f["verdict"])
            == (expected["check"], expected["device"], expected["verdict"])
        ]
        code, after = fleet.up()
    fleet.down()
    subprocess.run(
        [str(LAUNCHER), "uncordon", VICTIM, "--force", "-f", fleet.file],
        env=fleet.cli.environment,
        capture_output=True,
        check=False,
    )
    (Path(fleet.cli.environment["LAUNCHER_STATE_DIR"]) / ".cordons-ssh.json").unlink(
        missing_ok=True
    )
    nodes = [node["node"] for one in after["replicas"] for node in one["nodes"]]
    if code == 0:
        did = "swapped" if VICTIM not in nodes else "serves with it"
    else:
        did = f"refused, exit {code}"
    unfit = expected["verdict"] == "unhealthy"
    named = f"{found[0]['device'] or 'node'}: {found[0]['message']}" if found else "not found"
    right = bool(found) and (looked.returncode == 3) == unfit
    right = right and did in (
        ("swapped", "refused, exit 3", "refused, exit 5") if unfit else ("serves with it",)
    )
    return Row(name, words, named, seconds, did, right)


def write(rows: list[Row]) -> None:
    lines = [
        f"# Faults, {time.strftime('%Y-%m-%d')}",
        "",
        f"Machine: {machine()}. Repeat: `python -m tests.faults_table` (four hosts of the",
        "testbed, eight simulated H100s each; the fault is given to h2; `up` runs the fake engine",
        "on two hosts over SSH). Time is that of `launcher preflight` over all four hosts.",
        "",
        f"{sum(row.is_right for row in rows)} of {len(rows)} as they should be.",
        "",
        "| fault | what | found and named | s | `up` |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.name} | {row.words} | {row.found.replace(str(ROOT), '…')} "
        f"| {row.seconds:.1f} | {row.up}{'' if row.is_right else ' (wrong)'} |"
        for row in rows
    ]
    (ROOT / "docs/faults.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    bed.up(4)
    make_fake_engine()
    folder = ROOT / ".testbed/tmp/faults"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text('{"num_hidden_layers": 4, "num_attention_heads": 8}')
    (folder / "model/model.safetensors").write_bytes(b"\0" * 64 * 1024**2)
    for host in HOSTS:
        bed.gpus(host)
    backend = {"ssh": {"inventory": str(ROOT / ".testbed/inventory.yaml")}}
    spec = fake_spec(backend, folder / "model", ROOT / ".testbed-engine")
    spec |= {"gpus_per_node": 8, "parallelism": {"tensor": 8, "pipeline": 2}}
    cli = Cli({**os.environ, "LAUNCHER_STATE_DIR": str(folder / "state")}, folder)
    fleet = FleetUnderTest(folder, cli, "faults", spec)
    ready = cli("bootstrap", "-f", fleet.file, timeout=300)
    assert ready.returncode == 0, ready.stderr
    rows = []
    for name, words, given, expected in cases():
        if arguments.only and name not in arguments.only:
            continue
        rows.append(try_one(fleet, name, words, given, expected))
        mark = "ok   " if rows[-1].is_right else "WRONG"
        print(f"{mark} {name:16} {rows[-1].up:16} {rows[-1].found}", file=sys.stderr, flush=True)
    for host in HOSTS:
        hardware.clear(host)
    if not arguments.only:
        write(rows)
    return 0 if all(row.is_right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
