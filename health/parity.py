"""Parity: what differs between the nodes of one replica, on which of them, is it allowed. Pure.

Nobody's golden file: the set is compared with itself. Where most nodes agree the others are named;
where they do not, no node can be blamed and the set as a whole is.
"""

import re
from collections import Counter
from dataclasses import dataclass

from health.report import Finding, Verdict

# By the trait's name: what a difference means. The first pattern that matches counts. Ranks of
# one engine must be the same program on the same hardware; firmware and kernels may differ.
_RULES: tuple[tuple[str, Verdict, str], ...] = (
    (
        r"vllm|ray|torch|transformers|python|nccl|cuda",
        "unhealthy",
        "Install the same versions on all nodes.",
    ),
    (r"image", "unhealthy", "The nodes have different builds of the image."),
    (r"model", "unhealthy", "The nodes see different revisions of the model."),
    (r"driver|cuda_driver", "unhealthy", "Install the same driver on all nodes."),
    (r"gpu\.(name|count|memory)", "unhealthy", "Choose nodes of one kind (pool, constraint)."),
    (r"ib\..*\.(link_layer|rate|state)", "unhealthy", "Look at the cable and the switch port."),
    (r"ib\..*\.gid_index", "unhealthy", "Set NCCL_IB_GID_INDEX, or give the same addresses."),
    (r"gpu\.(vbios|ecc)|ib\..*\.firmware|kernel|memlock", "degraded", "Allowed; update one day."),
)


@dataclass(frozen=True)
class Odd:
    """A finding with the nodes that it is about: the odd ones out, or all where none can be."""

    nodes: tuple[str, ...]
    blamed: bool
    finding: Finding


def compare(traits: dict[str, dict[str, str]]) -> tuple[Odd, ...]:
    """What differs between these nodes (node → trait → value), worst first."""
    found = []
    for name in sorted({name for of_node in traits.values() for name in of_node}):
        rule = next((r for r in _RULES if re.fullmatch(r[0], name)), None)
        if rule is None:
            continue
        values = {node: of_node.get(name, "none") for node, of_node in traits.items()}
        if len(set(values.values())) > 1:
            found.append(_odd(name, values, rule[1], rule[2]))
    return tuple(sorted(found, key=lambda odd: odd.finding.verdict != "unhealthy"))


def _odd(name: str, values: dict[str, str], verdict: Verdict, hint: str) -> Odd:
    usual, votes = Counter(values.values()).most_common(1)[0]
    device = name.split(".")[1] if name.startswith("ib.") else ""
    word = name.rpartition(".")[2] if device else name
    if votes * 2 > len(values):
        odd = tuple(sorted(node for node, value in values.items() if value != usual))
        theirs = ", ".join(sorted({values[node] for node in odd}))
        message = f"{word} {theirs} where the other nodes have {usual}"
        blamed = True
    else:
        odd, theirs = tuple(sorted(values)), "differs"
        groups: dict[str, list[str]] = {}
        for node, value in sorted(values.items()):
            groups.setdefault(value, []).append(node)
        told = "; ".join(f"{value} on {', '.join(on)}" for value, on in groups.items())
        message, blamed = f"{word} differs: {told}", False
    finding = Finding.model_validate(
        {
            "check": f"parity.{name}",
            "verdict": verdict,
            "message": message,
            "hint": hint,
            "device": device,
            "advice": "fix configuration",
            "value": theirs,
            "threshold": usual if blamed else "the same on all nodes",
        }
    )
    return Odd(odd, blamed, finding)
