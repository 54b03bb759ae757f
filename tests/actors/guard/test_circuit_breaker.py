from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cachebus.actors.guard.circuit_breaker import BreakerPolicy, CircuitBreaker, CircuitState
from cachebus.messages import CacheConfigurationError, CircuitOpen

from ...clock import ManualClock

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


make: Any = BreakerPolicy


class Circuit:
    """Breaker with its clock and its recorded transitions."""

    def __init__(self, **policy: Any) -> None:
        self.clock: Any = ManualClock()
        self.transitions: list[CircuitState] = []
        self.policy = BreakerPolicy(**policy)
        self.breaker = CircuitBreaker(self.policy, self.clock, "backend.main", self.transitions.append)

    def fail(self, times: int) -> None:
        for _ in range(times):
            self.breaker.failed(self.breaker.admit())

    def open(self) -> None:
        self.fail(self.policy.failure_threshold)
        assert self.breaker.state is OPEN


def test_failures_in_a_row_open_it_and_one_success_begins_the_row_anew() -> None:
    circuit = Circuit()
    for _ in range(10):
        circuit.fail(4)
        circuit.breaker.succeeded(circuit.breaker.admit())
    assert circuit.breaker.state is CLOSED
    circuit.fail(5)
    assert circuit.transitions == [OPEN]


def test_an_open_one_admits_nobody_and_says_when_it_will() -> None:
    circuit = Circuit(recovery=30.0)
    circuit.open()
    circuit.clock.advance(10.0)
    with pytest.raises(CircuitOpen) as caught:
        circuit.breaker.admit()
    assert caught.value.retry_after == pytest.approx(20.0)
    assert caught.value.address == "backend.main"


def test_of_a_thousand_probes_three_pass() -> None:
    circuit = Circuit()
    circuit.open()
    circuit.clock.advance(30.0)
    passed = 0
    for _ in range(1000):
        try:
            circuit.breaker.admit()
            passed += 1
        except CircuitOpen:
            pass
    assert passed == 3


def test_three_successful_probes_close_it_and_one_failure_opens_it_again() -> None:
    circuit = Circuit()
    circuit.open()
    circuit.clock.advance(30.0)
    for _ in range(3):
        circuit.breaker.succeeded(circuit.breaker.admit())
    assert circuit.transitions == [OPEN, HALF_OPEN, CLOSED]
    circuit.open()
    circuit.clock.advance(30.0)
    circuit.breaker.succeeded(circuit.breaker.admit())
    circuit.breaker.failed(circuit.breaker.admit())
    assert circuit.breaker.state is OPEN
    assert circuit.breaker.retry_after == 30.0


def test_an_abandoned_probe_makes_room_for_another_and_decides_nothing() -> None:
    circuit = Circuit(half_open_max=1)
    circuit.open()
    circuit.clock.advance(30.0)
    for _ in range(10):
        circuit.breaker.abandoned(circuit.breaker.admit())
    assert circuit.breaker.state is HALF_OPEN


@pytest.mark.parametrize("answer", ["succeeded", "failed", "abandoned"])
def test_a_straggler_from_before_the_outage_changes_nothing(answer: str) -> None:
    circuit = Circuit()
    stragglers = [circuit.breaker.admit() for _ in range(10)]
    circuit.open()
    give_back: Callable[[int], None] = getattr(circuit.breaker, answer)
    give_back(stragglers.pop())
    assert circuit.breaker.state is OPEN
    circuit.clock.advance(30.0)
    probe = circuit.breaker.admit()
    for straggler in stragglers:
        give_back(straggler)
    assert circuit.breaker.state is HALF_OPEN
    circuit.breaker.succeeded(probe)
    assert circuit.transitions == [OPEN, HALF_OPEN]


def test_a_clock_that_jumps_ahead_ends_the_wait_and_one_that_jumps_back_does_not_prolong_it_for_ever() -> None:
    circuit = Circuit(recovery=30.0)
    circuit.open()
    circuit.clock.advance(-3600.0)
    assert circuit.breaker.retry_after == 30.0
    circuit.clock.advance(30.0)
    circuit.breaker.admit()
    assert circuit.breaker.state is HALF_OPEN
    other = Circuit(recovery=30.0)
    other.open()
    other.clock.advance(365 * 86400.0)
    other.breaker.admit()
    assert other.breaker.state is HALF_OPEN


def test_one_that_is_not_enabled_stays_closed() -> None:
    circuit = Circuit(enabled=False)
    circuit.fail(100)
    assert circuit.breaker.state is CLOSED
    assert circuit.transitions == []


def test_whether_a_call_may_pass_can_be_asked_without_a_change() -> None:
    circuit = Circuit(half_open_max=1)
    assert circuit.breaker.refusal() is None
    circuit.open()
    refusal = circuit.breaker.refusal()
    assert refusal is not None
    assert refusal.retry_after == 30.0
    circuit.clock.advance(30.0)
    assert circuit.breaker.refusal() is None
    assert circuit.breaker.state is OPEN, "the circuit is half open only after the first attempt"
    circuit.breaker.admit()
    assert circuit.breaker.refusal() is not None, "its one probe is in flight"


@pytest.mark.parametrize("option", ["failure_threshold", "success_threshold", "half_open_max", "recovery"])
def test_a_policy_that_makes_no_sense_is_refused_by_name(option: str) -> None:
    with pytest.raises(CacheConfigurationError, match=option):
        make(**{option: 0})


class BreakerMachine(RuleBasedStateMachine):
    """Calls begin and end in any order while time passes. A small model gives the expected state."""

    def __init__(self) -> None:
        super().__init__()
        self.circuit = Circuit(failure_threshold=3, success_threshold=2, recovery=10.0, half_open_max=2)
        self.breaker = self.circuit.breaker
        self.state = CLOSED
        self.row = 0
        self.opened = 0.0
        self.under_way: list[tuple[int, int]] = []  # Tickets with the model's period that issued them.
        self.period = 0

    def go(self, state: CircuitState) -> None:
        self.state, self.row, self.period = state, 0, self.period + 1
        if state is OPEN:
            self.opened = self.circuit.clock.monotonic()

    @rule(seconds=st.sampled_from((0.1, 5.0, 9.9, 10.0, 1e6)))
    def time_passes(self, seconds: float) -> None:
        self.circuit.clock.advance(seconds)

    @rule()
    def a_call_begins(self) -> None:
        if self.state is OPEN and self.circuit.clock.monotonic() >= self.opened + 10.0:
            self.go(HALF_OPEN)
        probes = sum(period == self.period for _, period in self.under_way)
        may_pass = self.state is CLOSED or (self.state is HALF_OPEN and probes < 2)
        if may_pass:
            self.under_way.append((self.breaker.admit(), self.period))
        else:
            with pytest.raises(CircuitOpen):
                self.breaker.admit()

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), how=st.sampled_from(("succeeded", "failed", "abandoned")))
    def a_call_ends(self, data: st.DataObject, how: str) -> None:
        place = data.draw(st.integers(0, len(self.under_way) - 1))
        ticket, period = self.under_way.pop(place)
        getattr(self.breaker, how)(ticket)
        if period != self.period or how == "abandoned":
            return
        if how == "failed":
            self.row += 1
            if self.state is HALF_OPEN or self.row >= 3:
                self.go(OPEN)
        elif self.state is HALF_OPEN:
            self.row += 1
            if self.row >= 2:
                self.go(CLOSED)
        else:
            self.row = 0

    @invariant()
    def it_is_where_the_model_is(self) -> None:
        assert self.breaker.state is self.state
        assert (self.breaker.retry_after > 0) == (
            self.state is OPEN and self.circuit.clock.monotonic() < self.opened + 10.0
        )


TestABreakerDoesWhatTheModelDoes = BreakerMachine.TestCase
TestABreakerDoesWhatTheModelDoes.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
