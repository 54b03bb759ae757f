"""The timer queue against a model: a dictionary that is sorted for each query."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cachebus.bus import TimerQueue

KEYS = st.integers(0, 9)
INSTANTS = st.integers(0, 20).map(float)


class Queue(RuleBasedStateMachine):
    """Keys are set, moved, discarded and taken out, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: TimerQueue[int] = TimerQueue()
        self.model: dict[int, float] = {}
        self.noticed = math.inf  # Time until which the sweeper assumes that it may sleep.

    def set_in_model(self, key: int, when: float, first: bool) -> None:
        self.model[key] = when
        if first:
            self.noticed = min(self.noticed, when)
        assert self.noticed <= min(self.model.values()), "`set` did not report an earlier key"

    @rule(key=KEYS, when=INSTANTS)
    def set(self, key: int, when: float) -> None:
        self.set_in_model(key, when, self.queue.set(key, when))

    @rule(key=KEYS, when=INSTANTS)
    def set_earlier(self, key: int, when: float) -> None:
        first = self.queue.set_earlier(key, when)
        self.set_in_model(key, min(when, self.model.get(key, math.inf)), first)

    @rule(key=KEYS)
    def discard(self, key: int) -> None:
        self.queue.discard(key)
        self.model.pop(key, None)

    @rule(now=INSTANTS, limit=st.sampled_from([0, 1, 3, math.inf]))
    def expire(self, now: float, limit: float) -> None:
        expired = [*self.queue.expire(now, limit)]
        assert len(expired) <= limit
        times = [self.model.pop(key) for key in expired]
        assert times == sorted(times)
        assert all(when <= now for when in times)
        if limit == math.inf:
            assert not [key for key, when in self.model.items() if when <= now]
        self.noticed = self.queue.due()

    @rule()
    def take_the_first(self) -> None:
        first = self.queue.pop(math.inf)
        if first is None:
            assert not self.model
        else:
            when = self.model.pop(first)
            assert when <= min(self.model.values(), default=math.inf)
        self.noticed = self.queue.due()

    @rule()
    def clear(self) -> None:
        self.queue.clear()
        self.model.clear()
        self.noticed = math.inf

    @invariant()
    def it_is_what_the_model_is(self) -> None:
        assert {*self.queue} == {*self.model}
        assert self.queue.due() <= min(self.model.values(), default=math.inf)
        assert (self.queue.due() == math.inf) == (not self.model)


TestQueue = Queue.TestCase


@given(st.lists(INSTANTS))
def test_what_is_due_at_the_same_time_comes_in_the_order_of_setting(times: list[float]) -> None:
    queue: TimerQueue[int] = TimerQueue()
    for key, when in enumerate(times):
        queue.set(key, when)
    assert [*queue.expire(math.inf)] == sorted(range(len(times)), key=lambda key: times[key])


def test_what_is_left_over_is_bounded_by_what_is_there() -> None:
    queue: TimerQueue[int] = TimerQueue()
    for number in range(10_000):
        queue.set(number, 100.0 - number % 7)
        queue.set(number % 10, 1000.0 - number)
        if number >= 10:
            queue.discard(number)
    assert len(queue) == 10
    assert len(queue._heap) <= 100
