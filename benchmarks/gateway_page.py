"""docs/gateway.md from the figures of benchmarks/gateway.py."""

import json
import sys

ROWS = (
    ("c1_p50_ms", "p50, 1 client, ms", 2),
    ("c1_p99_ms", "p99, 1 client, ms", 2),
    ("c32_p50_ms", "p50, 32 clients, ms", 1),
    ("c32_p99_ms", "p99, 32 clients, ms", 1),
    ("c32_per_s", "requests a second, 32 clients", 0),
    ("cpu_us_per_request", "CPU for a request, µs", 0),
    ("cpu_us_per_chunk", "CPU for a chunk of a stream, µs", 0),
    ("first_token_ms", "first token, engine 20 ms, ms", 1),
    ("memory_mb", "memory (USS), MB", 0),
    ("start_s", "start, s", 1),
)


def page(found: dict, churn: dict) -> str:
    """The tables, with the commands that repeat them."""
    names = list(found["results"])
    lines = [
        f"# The gateway, measured {found['date']}",
        "",
        f"Machine: {found['machine']}; engines, gateway and client share it, so that figures of",
        "one run are comparable with each other only. See `benchmarks/gateway.py` for each row.",
        "",
        "## What it adds",
        "",
        "`python benchmarks/gateway.py --no-faults`",
        "",
        f"| | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for key, label, digits in ROWS:
        cells = (f"{found['results'][name][key]:.{digits}f}" for name in names)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| ratio or difference (its bound) | figure |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in found["ratios"].items()]
    lines += [
        "",
        "## What a fault costs",
        "",
        "`python benchmarks/gateway.py --no-overhead`",
        "",
        "Three engines, 30 requests a second, every other one a stream, a fault at the first",
        "engine after two seconds; a hung engine is declared dead three seconds later, where a",
        "gateway can be told. Each cell: requests lost without a token / streams broken off after",
        "their tokens had begun / stuck for eight seconds or more, of 180; in brackets the",
        "longest request in seconds.",
        "",
    ]
    gateways = [name for name in names if name != "direct"]
    lines += [f"| fault | {' | '.join(gateways)} |", f"| --- |{' --- |' * len(gateways)}"]
    for fault, by_name in found["faults"].items():
        lines.append(f"| {fault} | {' | '.join(_cell(by_name[name]) for name in gateways)} |")
    lines += [
        "",
        "## Coming and going",
        "",
        f"`python benchmarks/gateway.py --churn {churn['seconds']:.0f}`",
        "",
        "Members added, drained and removed, one each second, and restarts of the gateway, under",
        "200 requests a second.",
        "",
        "| seconds | changes | restarts | answered | lost | broken | stuck | longest drain, s |",
        f"| --- |{' --- |' * 7}",
        f"| {churn['seconds']:.0f} | {churn['changes']} | {churn['restarts']} "
        f"| {churn['ok']} of {churn['of']} | {churn['lost']} | {churn['begun']} "
        f"| {churn['stuck']} | {churn['longest_drain_s']} |",
        "",
    ]
    return "\n".join(lines)


def _cell(row: dict) -> str:
    return f"{row['lost']} / {row['begun']} / {row['stuck']} ({row['longest_s']:.0f})"


if __name__ == "__main__":
    with open(sys.argv[1]) as first, open(sys.argv[2]) as second:
        sys.stdout.write(page(json.load(first), json.load(second)["churn"]))
