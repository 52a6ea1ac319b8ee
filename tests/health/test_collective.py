"""Who is named by the rounds of a collective check: pure, over imagined links."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from health.collective import rounds
from health.collective.rounds import Outcome, Told
from health.thresholds import Thresholds

LIMITS = Thresholds()


@given(st.integers(2, 64), st.integers(1, 8))
def test_every_node_meets_both_neighbours_and_no_rank_twice_in_a_round(nodes, per_node):
    made = rounds.pair_rounds(nodes, per_node)
    assert len(made) <= 3
    for one in made:
        ranks = list(itertools.chain.from_iterable(one.groups))
        assert len(ranks) == len(set(ranks))
        assert all(a % per_node == b % per_node for a, b in one.groups), "rail to the same rail"
    met = {frozenset((a // per_node, b // per_node)) for one in made for a, b in one.groups}
    ring = {frozenset((n, (n + 1) % nodes)) for n in range(nodes)}
    assert met == ring


def told(nodes, per_node, made, speed):
    """What every node prints when the pair (a, b, rail) runs at speed(a, b, rail) bytes/s."""
    found = {node: [] for node in nodes}
    for one in made:
        for a, b in one.groups:
            rate = speed(nodes[a // per_node], nodes[b // per_node], a % per_node)
            for rank in (a, b):
                times = ((one.bytes[-1], one.bytes[-1] / rate),) if rate else ()
                status = "ok" if rate else "timeout"
                found[nodes[rank // per_node]].append(
                    Outcome(rank, one.name, status, "done" if rate else "peers", times=times)
                )
    return {node: Told(tuple(seen), done=True) for node, seen in found.items()}


def verdict(count, per_node, speed, silent=()):
    nodes = tuple(f"n{number}" for number in range(count))
    made = rounds.pair_rounds(count, per_node)
    seen = told(nodes, per_node, made, speed)
    for node in silent:
        del seen[node]
    return rounds.conclude(nodes, per_node, made, seen, LIMITS).findings


@pytest.mark.parametrize("count", [3, 4, 5, 6, 64])
def test_a_slow_node_is_named_and_its_neighbours_are_not(count):
    found = verdict(count, 1, lambda a, b, rail: 1e8 if "n2" in (a, b) else 1e9)
    assert list(found) == ["n2"]
    assert "100 MB/s" in found["n2"][0].message


def test_one_slow_rail_is_named_as_such():
    found = verdict(4, 8, lambda a, b, rail: 1e9 if (rail == 5 and "n1" in (a, b)) else 4.6e10)
    assert [(node, f[0].device) for node, f in found.items()] == [("n1", "rail 5")]


def test_a_node_whose_pairs_never_finish_is_named():
    found = verdict(6, 1, lambda a, b, rail: 0 if "n4" in (a, b) else 1e9)
    assert list(found) == ["n4"]


def test_a_silent_node_is_named_and_the_pairs_with_it_accuse_nobody_else():
    found = verdict(4, 1, lambda a, b, rail: 0 if "n3" in (a, b) else 1e9, silent=("n3",))
    assert list(found) == ["n3"]


@given(st.integers(3, 12), st.floats(0.8, 1.2))
def test_links_that_differ_a_little_accuse_nobody(count, wobble):
    assert verdict(count, 2, lambda a, b, rail: 1e9 * (wobble if a < b else 1.0)) == {}


def test_of_two_nodes_none_can_be_blamed_for_their_one_link():
    assert verdict(2, 1, lambda a, b, rail: 1e6) == {}


def test_what_a_worker_prints_is_read_and_the_rest_of_its_output_is_not():
    text = (
        "Loading modules\n"
        'LAUNCHER-COLLECTIVE {"kind": "result", "round": "all", "rank": 1, "status": "ok", '
        '"stage": "done", "times": [{"bytes": 4, "seconds": 0.5}]}\n'
        "LAUNCHER-COLLECTIVE {cut off\n"
        'LAUNCHER-COLLECTIVE {"kind": "done"}\n'
    )
    seen = rounds.parse(text)
    assert seen.done
    assert seen.outcomes == (Outcome(1, "all", "ok", "done", times=((4, 0.5),)),)


def test_the_rounds_follow_the_layout():
    made = rounds.pattern_rounds(2, 8, tensor=8, pipeline=2)
    assert [one.name for one in made] == ["all", "tensor", "pipeline"]
    assert made[1].groups == (tuple(range(8)), tuple(range(8, 16)))
    assert made[2].groups[0] == (0, 8)


def test_who_met_a_dead_node_is_awaited_in_the_next_round():
    waits = rounds.waits_s(4, 30.0, 5.0)
    assert waits[0] == 30.0
    for before, after in itertools.pairwise(waits[1:]):
        assert after > before + 5.0, "a whole round with a dead partner, and its own length"


def test_the_partners_of_a_silent_node_are_not_accused_for_its_pairs():
    found = verdict(6, 1, lambda a, b, rail: 0 if "n4" in (a, b) else 1e9, silent=("n4",))
    assert list(found) == ["n4"]


def test_one_broken_pair_beside_a_silent_node_names_only_the_silent_one():
    """n3 lost time with n4, and its other partner gave up: one witness is not enough."""
    broken = ({"n3", "n4"}, {"n4", "n5"}, {"n2", "n3"})
    found = verdict(6, 1, lambda a, b, rail: 0 if {a, b} in broken else 1e9, silent=("n4",))
    assert list(found) == ["n4"]
