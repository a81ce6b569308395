"""The alert: delays count on the clock of the samples, silence changes nothing, events are numbered."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from opcua_detector.alarms import AlertState

NAN = math.nan


def run(state, *steps):
    """Feed (score, seconds) and return the steps at which the alert stood."""
    return [state.step(score, int(at * 1e9)) for score, at in steps]


def delayed(on_s=0.0, off_s=0.0, **more):
    return AlertState(int(on_s * 1e9), int(off_s * 1e9), **more)


def test_without_delays_the_alert_stands_from_the_first_score_at_the_limit():
    state = delayed()
    assert run(state, (0.999, 0), (1.0, 1), (5.0, 2)) == [False, True, True]


def test_the_on_delay_must_pass_without_a_break():
    state = delayed(on_s=2)
    assert run(state, (2, 0), (2, 1), (0.5, 1.5), (2, 2), (2, 3.9), (2, 4)) == [False] * 5 + [True]


def test_the_off_delay_must_pass_without_a_break():
    state = delayed(off_s=2)
    assert run(state, (2, 0), (0, 1), (0, 2.9), (2, 2.95), (0, 3), (0, 4.9), (0, 5)) == [True] * 6 + [False]


def test_between_limit_and_deadband_a_standing_alert_stands_and_none_begins():
    assert run(delayed(deadband=0.1), (0.95, 0), (1.0, 1), (0.95, 2), (0.91, 3), (0.89, 4), (0.95, 5)) == [
        False, True, True, True, False, False]


def test_limit_and_deadband_are_those_that_were_asked_for():
    assert run(delayed(limit=3.0, deadband=1.0), (2.9, 0), (3.0, 1), (2.1, 2), (1.9, 3)) == [False, True, True, False]


def test_no_verdict_neither_raises_nor_clears():
    state = delayed()
    assert run(state, (NAN, 0), (2, 1), (NAN, 2), (NAN, 100)) == [False, True, True, True]
    assert not state.cleared


def test_no_verdict_starts_the_delays_again():
    assert run(delayed(on_s=2), (2, 0), (NAN, 1), (2, 2), (2, 3), (2, 4)) == [False] * 4 + [True]
    assert run(delayed(off_s=2), (2, 0), (0, 1), (NAN, 2), (0, 3), (0, 4), (0, 5)) == [True] * 5 + [False]


def test_a_clock_set_back_starts_the_delay_again_instead_of_never_ending_it():
    assert run(delayed(on_s=2), (2, 1000), (2, 5), (2, 6), (2, 7)) == [False, False, False, True]


def test_events_are_numbered_from_one_and_each_is_announced_once():
    state = delayed()
    seen = []
    for k, score in enumerate([0, 2, 2, 0, 0, 2, 0]):
        state.step(score, k)
        seen.append((state.event_no, state.raised, state.cleared))
    assert seen == [(0, False, False), (1, True, False), (1, False, False), (1, False, True), (1, False, False),
                    (2, True, False), (2, False, True)]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(st.tuples(st.one_of(st.floats(0, 3), st.just(NAN), st.just(math.inf)), st.integers(-5, 50)), max_size=60),
    st.integers(0, 60), st.integers(0, 60),
)
def test_begin_and_end_always_alternate_and_agree_with_the_state(steps, on_ns, off_ns):
    state = AlertState(on_ns, off_ns)
    before, now, events = False, 0, 0
    for score, forward in steps:
        now = max(0, now + forward)
        active = state.step(score, now)
        assert state.raised == (active and not before)
        assert state.cleared == (before and not active)
        assert not state.raised or score >= state.limit
        assert not state.cleared or score < state.limit - state.deadband
        events += state.raised
        assert state.event_no == events
        before = active
