"""Lines about the weights that nodes have, folded over nodes that have the same. Pure."""

from inventory import nodeset
from launcher.cli.output import size
from launcher.documents import Weights
from launcher.status import Status


def lines(status: Status) -> list[str]:
    """Nothing of a fleet that has ended, nor of nodes that have not looked yet."""
    if status.phase == "stopped":
        return []
    nodes = [(node.node, node.weights) for one in status.replicas for node in one.nodes]
    nodes += [(spare.node, spare.weights) for spare in status.spares if spare.node]
    alike: dict[tuple[str, str], list[tuple[str, Weights]]] = {}
    for name, weights in nodes:
        if weights is not None:
            alike.setdefault((_on_disk(weights), _share(weights)), []).append((name, weights))
    return [_line(there, share, found) for (there, share), found in sorted(alike.items())]


def _line(there: str, share: str, found: list[tuple[str, Weights]]) -> str:
    nodes = nodeset.fold([name for name, _ in found])
    if not there:
        return f"weights of {nodes}: not known: {share}"
    if share == "some":
        cached = [weights.page_cache_bytes or 0 for _, weights in found]
        share = " to ".join(dict.fromkeys((size(min(cached)), size(max(cached)))))
    return f"weights of {nodes}: {there}" + (f", {share} of it in page cache" if share else "")


def _on_disk(weights: Weights) -> str:
    """Empty where that is not known."""
    if weights.total_bytes is None or weights.disk_bytes is None:
        return ""
    total, there = size(weights.total_bytes), size(weights.disk_bytes)
    much = total if there == total else f"{there} of {total}"
    place = "over the network" if weights.over_network else "on disk"
    kind = f" ({weights.file_system})" if weights.file_system else ""
    missing = f" ({weights.missing})" if weights.missing else ""
    return f"{much} {place}{kind}{missing}"


def _share(weights: Weights) -> str:
    """How much of it is cached: all, none, some, nothing where that is not known; without a
    figure of what is on disk, why there is none."""
    if weights.total_bytes is None:
        return weights.reason
    if weights.page_cache_bytes is None:
        return ""
    if weights.is_all_cached:
        return "all"
    return "some" if weights.page_cache_bytes else "none"
