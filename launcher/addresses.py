"""Which address of each node the engine uses: one that its peers have reached. Pure."""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.documents import NetAddress


@dataclass(frozen=True)
class Choice:
    ip: str
    interface: str


@dataclass(frozen=True)
class NoPath:
    """No network joins all nodes, as far as they have found out. is_final: nor will one, ever."""

    message: str
    is_final: bool = False


def choose(
    wanted: str,
    found: Mapping[str, Sequence[NetAddress]],
    reach: Mapping[str, Mapping[str, Sequence[str]]],
    heard_by_controller: Mapping[str, Sequence[str]],
) -> dict[str, Choice] | NoPath:
    """One address for each node, all in one network, each reached by every peer.

    wanted: the spec's `interface`, "auto" or a name. found: node → its addresses. reach: node →
    peer → the peer's addresses that answered. Among several networks the widest common one that
    the controller has reached, too, is taken, then the first by interface name.
    """
    candidates: dict[str, dict[str, Choice]] = {}
    for node, addresses in found.items():
        for address in addresses:
            if wanted not in ("auto", address.interface):
                continue
            if len(found) > 1 and not _reached_by_all(node, address.ip, found, reach):
                continue
            network = str(ipaddress.ip_network(f"{address.ip}/{address.prefix}", strict=False))
            choices = candidates.setdefault(network, {})
            choices.setdefault(node, Choice(address.ip, address.interface))
    complete = [
        (net, by_node) for net, by_node in candidates.items() if len(by_node) == len(found)
    ]
    if not complete and len(found) > 1:
        complete = _across_networks(candidates, found)
    if not complete:
        return _why_not(wanted, found)

    def preference(item: tuple[str, dict[str, Choice]]) -> tuple[int, str, str]:
        network, by_node = item
        heard = sum(by_node[node].ip in heard_by_controller.get(node, ()) for node in by_node)
        return (-heard, next(iter(by_node.values())).interface, network)

    return min(complete, key=preference)[1]


def _across_networks(
    candidates: Mapping[str, Mapping[str, Choice]], found: Mapping[str, Sequence[NetAddress]]
) -> list[tuple[str, dict[str, Choice]]]:
    """Routed clusters have no common subnet: any address that all peers reached will do."""
    by_node: dict[str, Choice] = {}
    for choices in candidates.values():
        for node, choice in choices.items():
            by_node.setdefault(node, choice)
    return [("routed", by_node)] if len(by_node) == len(found) else []


def _reached_by_all(
    node: str,
    ip: str,
    found: Mapping[str, Sequence[NetAddress]],
    reach: Mapping[str, Mapping[str, Sequence[str]]],
) -> bool:
    return all(ip in reach.get(peer, {}).get(node, ()) for peer in found if peer != node)


def _why_not(wanted: str, found: Mapping[str, Sequence[NetAddress]]) -> NoPath:
    if wanted != "auto":
        without = [n for n, all_ in found.items() if all(a.interface != wanted for a in all_)]
        if without:
            where = ", ".join(without)
            return NoPath(f"no interface {wanted} with an IPv4 address on {where}", is_final=True)
        return NoPath(f"the nodes do not reach each other over {wanted}")
    return NoPath("no network was found over which all nodes reach each other")
