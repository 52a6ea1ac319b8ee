from launcher import addresses
from launcher.documents import NetAddress


def net(interface, ip, prefix=24):
    return NetAddress(interface=interface, ip=ip, prefix=prefix)


FOUND = {
    "h1": [net("docker0", "172.17.0.1", 16), net("eth0", "10.0.0.1"), net("ib0", "10.1.0.1")],
    "h2": [net("docker0", "172.17.0.1", 16), net("eno1", "10.0.0.2"), net("ib0", "10.1.0.2")],
}


def reach(*pairs):
    table: dict[str, dict[str, list[str]]] = {"h1": {"h2": []}, "h2": {"h1": []}}
    for asker, peer, ip in pairs:
        table[asker][peer].append(ip)
    return table


def test_the_network_that_both_reached_is_taken_whatever_its_interface_is_called():
    chosen = addresses.choose(
        "auto", FOUND, reach(("h1", "h2", "10.0.0.2"), ("h2", "h1", "10.0.0.1")), {}
    )
    assert chosen == {
        "h1": addresses.Choice("10.0.0.1", "eth0"),
        "h2": addresses.Choice("10.0.0.2", "eno1"),
    }


def test_a_bridge_that_every_host_has_is_not_a_network_between_them():
    # Each reaches 172.17.0.1: itself. Only answers of the peer count, and the peer's own address
    # is the same, so this is the trap; without any other path there is none.
    assert isinstance(addresses.choose("auto", FOUND, reach(), {}), addresses.NoPath)


def test_a_named_interface_is_taken_and_no_other():
    both = reach(
        ("h1", "h2", "10.0.0.2"),
        ("h2", "h1", "10.0.0.1"),
        ("h1", "h2", "10.1.0.2"),
        ("h2", "h1", "10.1.0.1"),
    )
    chosen = addresses.choose("ib0", FOUND, both, {})
    assert chosen["h1"].ip == "10.1.0.1"
    missing = addresses.choose("ib7", FOUND, both, {})
    assert "no interface ib7" in missing.message


def test_a_network_that_the_controller_reaches_goes_first():
    both = reach(
        ("h1", "h2", "10.0.0.2"),
        ("h2", "h1", "10.0.0.1"),
        ("h1", "h2", "10.1.0.2"),
        ("h2", "h1", "10.1.0.1"),
    )
    heard = {"h1": ["10.1.0.1"], "h2": ["10.1.0.2"]}
    assert addresses.choose("auto", FOUND, both, heard)["h1"].interface == "ib0"


def test_hosts_in_different_subnets_that_reach_each_other_are_joined():
    found = {"h1": [net("eth0", "10.0.0.1")], "h2": [net("eth0", "10.9.0.2")]}
    routed = reach(("h1", "h2", "10.9.0.2"), ("h2", "h1", "10.0.0.1"))
    assert addresses.choose("auto", found, routed, {})["h2"].ip == "10.9.0.2"


def test_a_single_node_needs_no_peer():
    assert (
        addresses.choose("auto", {"h1": [net("eth0", "10.0.0.1")]}, {}, {})["h1"].ip == "10.0.0.1"
    )
