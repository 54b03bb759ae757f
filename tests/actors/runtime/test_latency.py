from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebus.actors import GuardPolicy
from cachebus.actors.guard.attempts import AdaptiveTimeout


@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=60), st.integers(1, 25))
def test_the_percentile_is_that_of_the_last_durations(durations: list[float], window: int) -> None:
    timeout = AdaptiveTimeout(GuardPolicy(timeout_window=window))
    for duration in durations:
        timeout.answered(duration)
    recent = sorted(durations[-window:])
    assert timeout.p95 == recent[math.ceil(0.95 * len(recent)) - 1]
    assert timeout.current == pytest.approx(min(10.0, max(0.1, 3 * timeout.p95)))


def test_it_begins_with_what_it_was_told_and_stays_between_its_bounds() -> None:
    timeout = AdaptiveTimeout(GuardPolicy(timeout_initial=2.0))
    assert (timeout.current, timeout.p95) == (2.0, 0.0)
    timeout.answered(0.001)
    assert timeout.current == 0.1
    for _ in range(1000):
        timeout.answered(60.0)
    assert timeout.current == 10.0
    for _ in range(1000):
        timeout.answered(0.001)
    assert timeout.current == 0.1


def test_the_twentieth_slow_answer_of_a_hundred_counts_and_the_fifth_does_not() -> None:
    timeout = AdaptiveTimeout(GuardPolicy(timeout_window=100))
    for number in range(100):
        timeout.answered(1.0 if number < 5 else 0.05)
    assert timeout.current == pytest.approx(0.15)
    timeout.answered(1.0)
    for _ in range(15):
        timeout.answered(1.0)
    assert timeout.current == pytest.approx(3.0)


def test_each_strike_lengthens_it_and_calls_that_were_under_way_together_strike_once() -> None:
    timeout = AdaptiveTimeout(GuardPolicy(timeout_initial=0.1))
    for _ in range(100):
        timeout.answered(0.001)
    for _ in range(4):
        timeout.struck(0.0, 0.1)
    assert timeout.current == pytest.approx(0.15)
    timeout.struck(0.1, 0.3)
    assert timeout.current == pytest.approx(0.225)


def test_it_stays_longer_until_an_answer_comes_that_is_quick_again() -> None:
    timeout = AdaptiveTimeout(GuardPolicy())
    for _ in range(100):
        timeout.answered(0.001)
    timeout.struck(0.0, 0.1)
    timeout.struck(0.1, 0.3)
    timeout.answered(0.3)
    assert timeout.current == pytest.approx(0.225)
    timeout.answered(0.001)
    assert timeout.current == pytest.approx(0.1)


def test_an_outage_does_not_become_what_is_usual() -> None:
    timeout = AdaptiveTimeout(GuardPolicy())
    for _ in range(100):
        timeout.answered(0.001)
    for number in range(1000):
        timeout.struck(number * 20.0, number * 20.0 + 10.0)
    assert timeout.current == 10.0
    timeout.answered(0.001)
    assert timeout.current == 0.1
