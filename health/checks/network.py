"""Checks of InfiniBand and RoCE ports. Pure. Sources: research/health table a3.

A port that was never cabled is no fault, and management and storage ports differ from those that
carry collectives: a port is compared with the same-looking ports of its own node first.
"""

from collections import Counter
from collections.abc import Iterator

from health.checks.base import Check, Ground, Said
from health.evidence import Infiniband, Port
from health.report import Verdict

_WAITS = ("INIT", "ARMED")  # up, but the subnet manager has not configured it


def _ports(ground: Ground) -> tuple[Port, ...]:
    return ground.evidence.infiniband.ports if ground.evidence.infiniband else ()


def is_management(port: Port, ground: Ground) -> bool:
    """An Ethernet port that holds the default route carries ssh and storage, no collectives."""
    fabric = ground.evidence.infiniband
    netdev = fabric.default_route_netdev if fabric else ""
    return port.link_layer == "Ethernet" and bool(netdev) and netdev in port.netdevs


def _same_role(port: Port, ground: Ground) -> list[Port]:
    return [
        other
        for other in _ports(ground)
        if other.link_layer == port.link_layer
        and other.board == port.board
        and not is_management(other, ground)
    ]


def _state(port: Port, ground: Ground) -> Iterator[Said]:
    if is_management(port, ground) or port.state == "ACTIVE":
        return
    if port.state in _WAITS and port.link_layer == "InfiniBand":
        message = f"{port.state}: waiting for the subnet manager"
        yield Said("unhealthy", message, port.state, "ACTIVE", "fix configuration")
        return
    active = [other for other in _same_role(port, ground) if other.state == "ACTIVE"]
    # Where no port of this kind is up, none may be meant to be: parity over the nodes tells.
    verdict: Verdict = "unhealthy" if active else "degraded"
    message = f"port is {port.state or 'unreadable'} ({port.physical_state})"
    yield Said(verdict, message, port.state, "ACTIVE", "inspect or RMA", "Look at the cable.")


def _physical(port: Port, ground: Ground) -> Iterator[Said]:
    if port.state == "ACTIVE" and port.physical_state == "LinkErrorRecovery":
        message = "the link is recovering from errors"
        yield Said("degraded", message, port.physical_state, "LinkUp", "inspect or RMA")


def _rate(port: Port, ground: Ground) -> Iterator[Said]:
    if port.state != "ACTIVE" or port.rate_gbps is None or is_management(port, ground):
        return
    rates = Counter(
        other.rate_gbps for other in _same_role(port, ground) if other.state == "ACTIVE"
    )
    (usual, votes), *others = rates.most_common(2)
    if others and others[0][1] == votes:
        return  # a tie says nothing about which of them is wrong
    if usual is not None and port.rate_gbps < usual:
        yield Said(
            "unhealthy",
            f"{port.rate_gbps:g} Gb/s where the others have {usual:g}",
            port.rate_gbps,
            usual,
            "inspect or RMA",
            "Re-seat the cable, then look at the switch port.",
        )


def _downed(port: Port, ground: Ground) -> Iterator[Said]:
    grown = port.grown.get("link_downed", 0)
    if grown > ground.limits.link_downed_max:
        limit = ground.limits.link_downed_max
        yield Said(
            "unhealthy", f"went down {grown} times just now", grown, limit, "inspect or RMA"
        )


def _errors(port: Port, ground: Ground) -> Iterator[Said]:
    fabric = ground.evidence.infiniband
    window_s = fabric.window_s if fabric else 0.0
    if not window_s:
        return
    limits = ground.limits
    symbols = port.grown.get("symbol_error", 0) / window_s
    if symbols > limits.symbol_errors_per_s_max:
        fatal = symbols > limits.symbol_errors_per_s_fatal
        message = f"{symbols:.0f} symbol errors per second"
        yield Said(
            "unhealthy" if fatal else "degraded",
            message,
            round(symbols),
            limits.symbol_errors_per_s_max,
            "inspect or RMA",
        )
    recoveries = port.grown.get("link_error_recovery", 0) * 60 / window_s
    if recoveries > limits.link_recoveries_per_minute_max:
        message = f"{recoveries:.0f} link recoveries per minute"
        yield Said(
            "degraded",
            message,
            round(recoveries),
            limits.link_recoveries_per_minute_max,
            "inspect or RMA",
        )
    received = port.grown.get("port_rcv_errors", 0) / window_s
    if received > limits.receive_errors_per_s_max:
        message = f"{received:.0f} receive errors per second"
        yield Said("degraded", message, round(received), limits.receive_errors_per_s_max)
    for name in ("local_link_integrity_errors", "excessive_buffer_overrun_errors"):
        if port.grown.get(name, 0):
            message = f"{name.replace('_', ' ')} grow"
            yield Said("unhealthy", message, port.grown[name], 0, "inspect or RMA")


def _gid(port: Port, ground: Ground) -> Iterator[Said]:
    if port.link_layer != "Ethernet" or port.state != "ACTIVE" or is_management(port, ground):
        return
    if not any(gid.type == "RoCE v2" and gid.is_ipv4 for gid in port.gids):
        yield Said(
            "unhealthy",
            "no RoCE v2 GID with an IPv4 address",
            f"{len(port.gids)} GIDs",
            "one RoCE v2",
            "fix configuration",
            "Give the interface its IPv4 address.",
        )


def _gpudirect(fabric: Infiniband, ground: Ground) -> Iterator[Said]:
    gpus = ground.evidence.gpus
    if gpus is None or gpus.vendor != "nvidia" or not fabric.ports:
        return
    if not fabric.peermem and not fabric.dmabuf:
        yield Said(
            "degraded",
            "neither nvidia_peermem nor DMA-BUF: no GPUDirect RDMA",
            "absent",
            "one of them",
            "fix configuration",
            "`modprobe nvidia_peermem`, or the open kernel module.",
        )


_SYS = "cat /sys/class/infiniband/{device}/"
PORT_CHECKS: tuple[Check[Port], ...] = (
    Check("ib.state", "every tool", "ibstat {device}", _state),
    Check("ib.physical", "gpud", "ibstat {device}", _physical),
    Check(
        "ib.rate", "mode of the node's ports of this kind; NHC, AzureHPC", "ibstat {device}", _rate
    ),
    Check(
        "ib.link_downed",
        "NVSentinel: growth, not lifetime",
        _SYS + "counters/link_downed",
        _downed,
    ),
    Check("ib.errors", "NVSentinel rates", _SYS + "counters/*", _errors),
    Check("ib.gid", "nccl#1131", "show_gids {device}", _gid),
)
FABRIC_CHECKS: tuple[Check[Infiniband], ...] = (
    Check("ib.gpudirect", "imbue; gpud", "lsmod | grep peermem", _gpudirect),
)
