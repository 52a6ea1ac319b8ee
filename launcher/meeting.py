"""Where nodes meet that no agent has connected yet: the network that all of them have. Pure.

A proposal, no proof: the collective check that meets there proves it, or names who did not come.
Where agents run, their heartbeats have proven a path already (launcher.addresses).
"""

import ipaddress
from dataclasses import dataclass

from health.evidence import Interface, NodeEvidence
from launcher import ports


@dataclass(frozen=True)
class Meeting:
    """One address and interface for each node, and the port of the first node's store."""

    addresses: dict[str, str]
    interfaces: dict[str, str]
    port: int


@dataclass(frozen=True)
class NoMeeting:
    reason: str


def find_meeting(evidence: dict[str, NodeEvidence], wanted: str) -> Meeting | NoMeeting:
    """The fastest network that all nodes are in; `wanted` is the spec's interface or "auto"."""
    networks: dict[str, dict[str, Interface]] = {}
    for node, one in evidence.items():
        for interface in one.host.interfaces if one.host else ():
            if not interface.is_up or interface.ip.startswith("127."):
                continue
            if wanted not in ("auto", interface.name):
                continue
            network = ipaddress.ip_network(f"{interface.ip}/{interface.prefix}", strict=False)
            networks.setdefault(str(network), {})[node] = interface
    common = [(net, of) for net, of in networks.items() if len(of) == len(evidence)]
    if not common:
        named = "" if wanted == "auto" else f" over {wanted}"
        return NoMeeting(f"no network{named} that all nodes are in")

    def preference(item: tuple[str, dict[str, Interface]]) -> tuple[int, str, str]:
        network, of = item
        slowest = min(interface.speed_mbps for interface in of.values())
        return (-slowest, next(iter(of.values())).name, network)

    chosen = min(common, key=preference)[1]
    return Meeting(
        {node: interface.ip for node, interface in chosen.items()},
        {node: interface.name for node, interface in chosen.items()},
        ports.COLLECTIVE,
    )
