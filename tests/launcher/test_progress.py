"""Busy, idle or stuck: engines on a simulated clock, looked at as the agent does."""

import math

import pytest

from launcher.agent import progress
from launcher.agent.progress import Figures, Progress, Verdict, read_figures, words

NEVER = math.inf


class Engine:
    """How an engine behaves: `running(t)` requests, `steps(t)` done so far, by engine label."""

    def __init__(self, running=None, steps=None, canary_s=0.05, labels=("0",)):
        self.running = running or (lambda label, t: 0)
        self.steps = steps or (lambda label, t: 0)
        self.canary_s = canary_s if callable(canary_s) else lambda label, t: canary_s
        self.labels = labels

    def figures(self, t):
        return {
            label: Figures(self.running(label, t), (self.steps(label, t),))
            for label in self.labels
        }


class Story:
    """What the three threads of the watch do, in steps of a quarter of a second."""

    def __init__(self, engine, asleep=lambda t: False, refuses=False, compiles=lambda t: False):
        self.engine, self.asleep, self.compiles = engine, asleep, compiles
        self.outcome = "refused" if refuses else "token"
        self.canaries = []
        self.states = set()

    def stuck_at(self, until=200.0, figures=True):
        seen = Progress(0.0)
        out = None  # the canary's end
        verdict = Verdict("idle")
        for tick in range(int(until * 4)):
            t = tick / 4
            if self.asleep(t):
                continue
            if figures and tick % 8 == 0:
                seen.counted(t, self.engine.figures(t))
            if out is not None and t >= min(out, self.canaries[-1][0] + 20):
                seen.canary_ended(t, self.outcome if t >= out else "nothing")
                out = None
            if (label := seen.canary_due(t)) is not None:
                self.canaries.append((t, label))
                seen.canary_sent(t, label)
                out = t + self.engine.canary_s(label, t)
            if tick % 2 == 0:
                if self.compiles(t) and seen.quiet_s(t) > 8:
                    seen.compiling(t)
                verdict = seen.look(t)
                self.states.add(verdict.state)
                if verdict.state == "stuck":
                    self.verdict = verdict
                    return t
        return None


def test_an_idle_engine_is_asked_for_a_token_now_and_then_and_is_not_stuck():
    story = Story(Engine())
    assert story.stuck_at(until=100) is None
    assert 9 <= len(story.canaries) <= 11
    assert story.states == {"idle"}


def test_real_traffic_proves_the_engine_and_nothing_is_asked():
    story = Story(Engine(running=lambda _, t: 40, steps=lambda _, t: t * 30, canary_s=NEVER))
    assert story.stuck_at() is None
    assert story.canaries == []
    assert story.states == {"busy"}


def test_a_long_prefill_moves_figures_though_no_token_comes():
    """A step of five seconds each, one token after two minutes."""
    story = Story(Engine(running=lambda _, t: 1, steps=lambda _, t: t // 5, canary_s=NEVER))
    assert story.stuck_at() is None


def test_a_canary_in_a_long_queue_is_no_sign_of_a_stall():
    """Steps so slow that a canary is sent, and then waits behind everybody else."""
    story = Story(Engine(running=lambda _, t: 200, steps=lambda _, t: t // 14, canary_s=NEVER))
    assert story.stuck_at() is None
    assert story.canaries


@pytest.mark.parametrize("began", [1.0, 7.3, 20.0, 33.1])
def test_a_stall_under_load_is_found_within_25_s(began):
    engine = Engine(
        running=lambda _, t: 3,
        steps=lambda _, t: min(t, began) * 30,
        canary_s=lambda _, t: 0.1 if t < began else NEVER,
    )
    story = Story(engine)
    found = story.stuck_at()
    assert 18 <= found - began <= 25
    assert story.verdict.running == 3
    assert words(story.verdict, "answers 200") == (
        f"stalled: no token for {story.verdict.silent_s:.0f} s while 3 requests run; "
        "/health answers 200"
    )


@pytest.mark.parametrize("figures", [True, False])
@pytest.mark.parametrize("began", [0.5, 8.9, 9.3, 17.0, 18.2, 26.6])
def test_a_stall_of_an_idle_engine_is_found_within_30_s_with_or_without_figures(began, figures):
    story = Story(Engine(canary_s=lambda _, t: 0.1 if t < began else NEVER))
    found = story.stuck_at(figures=figures)
    assert 20 <= found - began <= 30
    assert "though it was asked for one" in words(story.verdict)


@pytest.mark.parametrize("began", [12.0, 14.4, 15.9])
def test_a_stall_just_after_the_last_request_is_found_within_30_s(began):
    """The request hangs in its first step, of which the figures never tell."""
    engine = Engine(
        steps=lambda _, t: min(t, began) * 30, canary_s=lambda _, t: 0.1 if t < began else NEVER
    )
    assert 20 <= Story(engine).stuck_at() - began <= 30


@pytest.mark.parametrize("idle", [True, False])
def test_one_stuck_engine_does_not_hide_behind_another(idle):
    """Whether it has requests or none; the canaries go to each engine by name."""
    engine = Engine(
        running=lambda label, t: 0 if idle and label == "1" else 2,
        steps=lambda label, t: t * 30 if label == "0" else (0 if idle else min(t, 10) * 30),
        canary_s=lambda label, t: NEVER if label == "1" and t > 10 else 0.1,
        labels=("0", "1"),
    )
    story = Story(engine)
    assert 20 <= story.stuck_at() - 10 <= 30
    assert story.verdict.engine == "1"
    assert "data-parallel engine 1" in words(story.verdict)
    assert all(label == "1" for t, label in story.canaries if t > 0)


def test_silence_of_the_figures_is_no_progress_and_the_last_known_requests_count():
    seen = Progress(0.0)
    for t in range(0, 10, 2):
        seen.counted(t, {"0": Figures(5, (float(t),))})
        assert seen.look(t).state == "busy"
    states = []
    for half in range(20, 80):
        seen.counted(half / 2, None)
        states.append((half / 2, seen.look(half / 2).state))
    assert next(t for t, state in states if state == "stuck") == 28.0
    assert seen.look(40.0).running == 5


def test_a_time_in_which_we_did_not_run_ourselves_is_no_evidence():
    """The whole machine slept for a minute, with requests under way and a canary out."""
    engine = Engine(
        running=lambda _, t: 3,
        steps=lambda _, t: t if t < 10 or t > 75 else 10,
        canary_s=lambda _, t: 0.1 if t < 10 else 70.0,
    )
    assert Story(engine, asleep=lambda t: 11 < t < 70).stuck_at() is None
    stays = Engine(running=lambda _, t: 3, steps=lambda _, t: min(t, 10), canary_s=NEVER)
    assert 90 <= Story(stays, asleep=lambda t: 11 < t < 70).stuck_at() <= 91


def test_a_refused_canary_says_nothing_and_the_figures_still_do():
    story = Story(Engine(), refuses=True)
    assert story.stuck_at(until=100) is None
    assert len(story.canaries) <= 12
    stands = Engine(running=lambda _, t: 1, steps=lambda _, t: min(t, 10))
    assert 28 <= Story(stands, refuses=True).stuck_at() <= 35


def test_an_engine_that_answers_canaries_with_errors_is_stuck_after_the_same_time():
    story = Story(Engine(canary_s=0.05))
    story.outcome = "nothing"
    assert 28 <= story.stuck_at() <= 30
    assert words(story.verdict, "answers 200", "HTTP 500") == (
        "stalled: no token for 29 s though it was asked for one (HTTP 500); /health answers 200"
    )


def test_a_compiler_below_the_engine_stops_the_clock_for_a_while():
    """The first long prompt compiles a kernel for 40 s; one that never ends is given up."""
    slow = Engine(
        running=lambda _, t: 1,
        steps=lambda _, t: t if t < 10 or t > 50 else 10,
        canary_s=lambda _, t: 0.1 if t < 10 or t > 50 else 60 - t,
    )
    assert Story(slow, compiles=lambda t: t < 50).stuck_at() is None
    for_ever = Engine(running=lambda _, t: 1, canary_s=NEVER)
    assert 300 <= Story(for_ever, compiles=lambda t: True).stuck_at(until=400) <= 330


# As vLLM 0.32 writes them, shortened; a model's name may hold any character.
RECORDED = r"""
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {\"engine=\"9\"} b"} 2.0
vllm:num_requests_running{engine="1",model_name="a {\"engine=\"9\"} b"} 1.0
vllm:num_requests_waiting{engine="0",model_name="a"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.25
vllm:generation_tokens_total{engine="0",model_name="a"} 1.5e+06
vllm:generation_tokens_created{engine="0",model_name="a"} 1.78e+09
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="a"} 3.0
vllm:iteration_tokens_total_count{engine="0",model_name="a"} 11.0
vllm:iteration_tokens_total_sum{engine="0",model_name="a"} 20.0
vllm:prompt_tokens_total{engine="0",model_name="a"} 4.0
vllm:prompt_tokens_total{engine="0",model_name="b"} 5.0
vllm:prompt_tokens_total{engine="1",model_name="a"} NaN
"""


def test_figures_are_summed_by_engine_and_what_is_no_number_is_left_out():
    found = read_figures(RECORDED.splitlines())
    assert found == {
        "0": Figures(2.0, (1.5e6, 9.0, 11.0, 20.0, 0.25)),
        "1": Figures(1.0, (0.0, 0.0, 0.0, 0.0, 0.0)),
    }
    assert len(progress.MOVING) == 5
    assert read_figures(["vllm:num_requests_running 3"]) == {"": Figures(3.0, (0.0,) * 5)}
    assert read_figures(["python_gc_objects_collected_total 3", "", "vllm:x{"]) == {}
