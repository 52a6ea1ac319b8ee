from health.report import Finding, NodeFacts
from health.settle import settle

SLOWED = Finding(check="gpu.clocks", verdict="degraded", message="x", device="GPU 0")
PENDING = Finding(check="gpu.remap_pending", verdict="degraded", message="x", device="GPU 0")
DEAD = Finding(check="gpu.clocks", verdict="unhealthy", message="x", device="GPU 0")


def checks(*looks):
    facts = tuple(NodeFacts(findings=look) for look in looks)
    return [f.check for f in settle(facts).findings]


def test_a_dip_seen_once_is_no_finding():
    assert checks((), (), (SLOWED,)) == ["node"]


def test_a_dip_seen_twice_of_three_times_is():
    assert checks((SLOWED,), (), (SLOWED,)) == ["gpu.clocks"]


def test_it_is_over_when_it_was_not_seen_twice():
    assert checks((SLOWED,), (SLOWED,), ()) == ["gpu.clocks"]
    assert checks((SLOWED,), (SLOWED,), (), ()) == ["node"]


def test_states_and_what_ends_an_engine_count_at_once():
    assert checks((PENDING,)) == ["gpu.remap_pending"]
    assert checks((), (DEAD,)) == ["gpu.clocks"]
    assert checks((PENDING,), ()) == ["node"]
