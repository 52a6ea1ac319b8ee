from hypothesis import given
from hypothesis import strategies as st

from launcher import heartbeat
from launcher.heartbeat import Kind, Lease, Message

TOKEN = b"t" * 32


def answer(nonce, kind=Kind.HELD, revision=0):
    return Message(kind, nonce, heartbeat.scope_bytes("r1/g1"), revision)


@given(st.sampled_from(list(Kind)), st.binary(min_size=8, max_size=8), st.integers(0, 2**63))
def test_a_sealed_message_opens_with_the_same_token_only(kind, nonce, revision):
    message = Message(kind, nonce, heartbeat.scope_bytes("x"), revision)
    sealed = heartbeat.seal(TOKEN, message)
    assert heartbeat.unseal(TOKEN, sealed) == message
    assert heartbeat.unseal(b"other", sealed) is None


@given(st.binary(max_size=80))
def test_noise_is_nothing(noise):
    assert heartbeat.unseal(TOKEN, noise) is None


def lease_held(now=0.0):
    lease = Lease("r1/g1")
    lease.asked(b"0", now)
    assert lease.answered(answer(b"0"), now + 0.01)
    return lease


def test_three_questions_without_an_answer_lose_the_lease_within_five_seconds():
    lease = lease_held()
    for second in range(1, 4):
        lease.asked(b"%d" % second, float(second))
    lease.count_misses(4.0)
    assert not lease.is_lost
    lease.count_misses(4.3)
    assert lease.is_lost


def test_an_asker_that_was_stopped_itself_blames_nobody():
    lease = lease_held()
    lease.asked(b"1", 1.0)
    lease.count_misses(100.0)  # one question was late, whatever the clock says
    assert not lease.is_lost


def test_a_peer_that_has_not_read_its_assignment_is_not_lost_and_asked_again_soon():
    lease = Lease("r1/g1")
    for turn in range(20):
        now = turn * (heartbeat.JOINING_PERIOD_S + 0.01)
        assert lease.is_due(now)
        lease.asked(b"%d" % turn, now)
        assert not lease.is_due(now + 0.9)  # unanswered: not faster than each second
        lease.answered(answer(b"%d" % turn, Kind.GONE), now)
    assert not lease.is_lost


def test_a_peer_that_never_answers_is_lost_as_fast_as_a_member():
    lease = Lease("r1/g1")
    for second in range(3):
        assert lease.is_due(float(second))
        lease.asked(b"%d" % second, float(second))
    lease.count_misses(3.3)
    assert lease.is_lost


def test_a_member_is_asked_each_second():
    lease = lease_held()
    assert not lease.is_due(0.9)
    assert lease.is_due(1.0)


def test_a_peer_that_served_with_us_is_lost_when_it_is_gone_also_if_it_was_never_heard():
    """An engine that is up in half a second serves before the second question is asked."""
    lease = Lease("r1/g1")
    lease.asked(b"0", 0.0)
    lease.answered(answer(b"0", Kind.GONE), 0.1)
    assert not lease.is_lost
    lease.held_once = True  # what Heart.set_serving does
    lease.asked(b"1", 1.0)
    lease.answered(answer(b"1", Kind.GONE), 1.1)
    assert lease.is_lost


def test_a_peer_that_says_it_is_gone_is_lost_at_once():
    lease = lease_held()
    lease.asked(b"1", 1.0)
    assert lease.answered(answer(b"1", Kind.GONE), 1.1)
    assert lease.is_lost


def test_an_old_answer_repeated_by_somebody_counts_for_nothing():
    lease = lease_held()
    lease.asked(b"1", 1.0)
    assert not lease.answered(answer(b"0"), 1.1)
