from inventory.ledger import BRAKE_WINDOW_S, Cordon, Ledger

NOW = 1_000_000.0


def quarantine(node, check="gpu.lost", at=NOW):
    return Cordon(node=node, kind="quarantine", reason="x", at=at, by="t", check=check)


def ledger(*cordons):
    made = Ledger()
    for cordon in cordons:
        made = made.with_cordon(cordon)
    return made


def test_a_persons_cordon_is_not_replaced_by_a_quarantine():
    manual = Cordon(node="a", kind="manual", reason="maintenance", at=NOW, by="me")
    assert ledger(manual, quarantine("a")).cordons["a"] == manual


def test_the_brake_holds_when_many_nodes_fail_one_check_within_minutes():
    made = ledger(quarantine("a"), quarantine("b"), quarantine("c"))
    assert "3 nodes failed gpu.lost within 10 minutes (a, b, c)" in made.brake(
        "gpu.lost", 100, NOW + 1
    )
    assert made.brake("gpu.ecc", 100, NOW + 1) == ""
    assert made.brake("gpu.lost", 100, NOW + BRAKE_WINDOW_S + 1) == ""


def test_in_a_small_pool_the_brake_holds_at_half_of_it():
    assert ledger(quarantine("a")).brake("gpu.lost", 4, NOW) == ""
    assert ledger(quarantine("a"), quarantine("b")).brake("gpu.lost", 4, NOW) != ""


def test_a_lifted_quarantine_still_counts_for_the_brake():
    made = ledger(quarantine("a"), quarantine("b")).without("a").without("b")
    assert made.cordons == {}
    assert made.brake("gpu.lost", 4, NOW) != ""


def test_the_same_node_twice_is_one_node_for_the_brake():
    assert ledger(quarantine("a"), quarantine("a", at=NOW + 60)).brake("gpu.lost", 4, NOW) == ""
