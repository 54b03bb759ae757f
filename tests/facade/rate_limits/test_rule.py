"""The rate limit algorithm against a model with a virtual clock: in Python, and in Lua on a Redis server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from uuid import uuid4

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from cachebus.adapters.common.rate_limit import CLOCK_BACK, GcraState, MeterTable, admit, microseconds, per_of
from cachebus.adapters.redis.rate_limits import ADMIT
from cachebus.messages import Admit, Admitted, RateLimitDenied
from cachebus.testing.servers import Server, run_redis

SECOND = 1_000_000
Ask = Callable[[Admit, int], Admitted | RateLimitDenied]


@dataclass
class Limit:
    """Textbook algorithm with theoretical arrival times and exact fractions of a microsecond."""

    limit: int
    per: int
    burst: int
    arrival: Fraction = Fraction(0)

    def ask(self, now: int, cost: int, wait: int) -> tuple[bool, Fraction]:
        """Return `True` if the call is admitted, and the delay that was or would be needed."""
        each = Fraction(self.per, self.limit)
        arrival = max(self.arrival, Fraction(now)) + cost * each
        delay = max(Fraction(0), arrival - self.burst * each - now)
        if -(-delay // 1) > wait:
            return False, delay
        self.arrival = arrival
        return True, delay


def of_python() -> Ask:
    meter: GcraState | None = None

    def ask(request: Admit, now: int) -> Admitted | RateLimitDenied:
        nonlocal meter
        reply, after = admit(request, meter, now)
        meter = after or meter
        return reply

    return ask


rates = st.tuples(st.integers(1, 1000), st.sampled_from([1, 7, 1000, SECOND, 60 * SECOND, 86_400 * SECOND]))
steps = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 100 * SECOND)),
        st.integers(1, 5),
        st.sampled_from([0, 0, 1, 1000, SECOND, 100 * SECOND]),
    ),
    max_size=60,
)


def compare(ask: Ask, rate: tuple[int, int], burst: int, calls: list[tuple[int, int, int]]) -> None:
    limit, per = rate
    model, now = Limit(limit, per, burst), 1_700_000_000 * SECOND
    went: list[tuple[int, int]] = []
    for pause, cost, wait in calls:
        now += pause
        cost = min(cost, burst)
        request = Admit("k", limit, per / SECOND, burst, cost, wait / SECOND)
        admitted, delay = model.ask(now, cost, wait)
        reply = ask(request, now)
        assert isinstance(reply, Admitted) == admitted, (request, reply)
        said = reply.delay if isinstance(reply, Admitted) else reply.retry_after
        assert microseconds(said) == -(-delay // 1)
        used = max(Fraction(0), model.arrival - now) * limit / per
        assert reply.remaining == max(0, (burst - used) // 1)
        assert microseconds(reply.reset_after) == -(-(used * per / limit) // 1)
        if admitted:
            went.append((now + microseconds(said), cost))
    went.sort()
    for first in range(len(went)):
        taken = 0
        for when, cost in went[first:]:
            taken += cost
            # Delays are rounded up to the microsecond, which may shorten the time between two calls.
            assert taken <= burst + Fraction((when - went[first][0] + 1) * limit, per)


@given(rates, st.integers(1, 50), steps)
def test_the_rule_is_the_textbooks_and_no_window_has_more(
    rate: tuple[int, int], burst: int, calls: list[tuple[int, int, int]]
) -> None:
    compare(of_python(), rate, burst, calls)


@given(rates, st.integers(1, 50), steps)
def test_who_comes_back_when_told_is_admitted_and_a_moment_earlier_is_not(
    rate: tuple[int, int], burst: int, calls: list[tuple[int, int, int]]
) -> None:
    meter: GcraState | None = None
    now = SECOND
    for pause, cost, wait in calls:
        now += pause
        request = Admit("k", rate[0], rate[1] / SECOND, burst, min(cost, burst), wait / SECOND)
        reply, after = admit(request, meter, now)
        if isinstance(reply, RateLimitDenied):
            then = microseconds(reply.retry_after)
            assert isinstance(admit(request, meter, now + then - wait)[0], Admitted)
            assert isinstance(admit(request, meter, now + then - wait - 1)[0], RateLimitDenied)
        meter = after or meter


@given(st.lists(st.tuples(st.integers(0, SECOND), st.booleans(), st.integers(0, CLOCK_BACK // 2)), max_size=60))
def test_two_clocks_that_differ_a_little_give_nothing_away(calls: list[tuple[int, bool, int]]) -> None:
    ask, real, began, admitted = of_python(), 10 * SECOND, 10 * SECOND, 0
    for pause, ahead, skew in calls:
        real += pause
        reply = ask(Admit("k", 5, 1.0, 3), real + (skew if ahead else 0))
        admitted += isinstance(reply, Admitted)
    assert admitted <= 3 + (real - began + CLOCK_BACK // 2) * 5 / SECOND


def test_a_clock_that_is_set_back_neither_blocks_nor_gives_away() -> None:
    ask = of_python()
    request = Admit("k", 10, 1.0, 2)
    assert [type(ask(request, 3600 * SECOND)) for _ in range(3)] == [Admitted, Admitted, RateLimitDenied]
    refused = ask(request, 60 * SECOND)
    assert isinstance(refused, RateLimitDenied)
    assert refused.retry_after == 0.1
    assert isinstance(ask(request, 60 * SECOND + 100_000), Admitted)


def test_what_is_used_sinks_as_the_limit_was_that_it_was_used_of() -> None:
    ask = of_python()
    for _ in range(4):
        ask(Admit("k", 4, 1.0, 4), 0)
    reply = ask(Admit("k", 1, 3600.0, 4), SECOND // 2)
    assert isinstance(reply, Admitted)
    assert reply.remaining == 1, "two units were restored, and one of them is used"
    assert reply.reset_after == 3 * 3600.0


# In Lua


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with run_redis() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with redis.Redis.from_url(server.url) as client:
        yield client


def of_lua(client: Any) -> Ask:
    """Return the script with a time from the test in place of the server's, so that nothing expires."""
    text = ADMIT.text
    for found, put in (
        ("redis.call('TIME')", "{tonumber(ARGV[6]), tonumber(ARGV[7])}"),
        ("'PX', math.ceil(reset / 1000))", "'KEEPTTL')"),
        ("'PX', math.ceil(kept / old_limit / 1000))", "'KEEPTTL')"),
    ):
        assert found in text
        text = text.replace(found, put)
    name = uuid4().hex

    def ask(request: Admit, now: int) -> Admitted | RateLimitDenied:
        arguments = (request.limit, per_of(request), request.burst, request.cost, microseconds(request.wait))
        admitted, left, delay, reset = client.eval(text, 1, name, *arguments, now // SECOND, now % SECOND)
        if admitted:
            return Admitted(left, reset / 1e6, delay / 1e6)
        return RateLimitDenied(left, delay / 1e6, reset / 1e6)

    return ask


@settings(max_examples=60)
@given(rates, st.integers(1, 50), steps)
def test_the_script_says_what_the_rule_says(
    client: Any, rate: tuple[int, int], burst: int, calls: list[tuple[int, int, int]]
) -> None:
    compare(of_lua(client), rate, burst, calls)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(-2 * CLOCK_BACK, 2 * CLOCK_BACK), rates, st.integers(1, 10), st.sampled_from([0.0, 0.5, 100.0])
        ),
        max_size=30,
    )
)
def test_the_script_and_the_rule_agree_when_clocks_and_limits_change(
    client: Any, calls: list[tuple[int, tuple[int, int], int, float]]
) -> None:
    lua, python, now = of_lua(client), of_python(), 1_700_000_000 * SECOND
    for pause, (limit, per), burst, wait in calls:
        now += pause
        request = Admit("k", limit, per / SECOND, burst, 1, wait)
        assert lua(request, now) == python(request, now)


# State in a memory store


class Time:
    def __init__(self) -> None:
        self.now = 1000.0
        self.due: list[float] = []

    def table(self, most: int) -> MeterTable:
        return MeterTable(lambda: self.now, self.due.append, most)


def test_a_limit_that_is_whole_again_is_forgotten() -> None:
    time = Time()
    table = time.table(100)
    for at in range(10):
        table.admit(Admit(f"k{at}", 1, 1.0 + at, 1))
    assert table.due() == 1001.0
    assert time.due == [1001.0], "the timer must be set to the earliest expiry"
    time.now = 1005.5
    table.sweep(1000)
    assert len(table) == 5
    assert table.due() == 1006.0
    table.admit(Admit("k5", 1, 1.0, 2))
    time.now = 1100.0
    table.sweep(3)
    assert len(table) == 2, "a sweep must not exceed its bound"
    table.sweep(1000)
    assert len(table) == 0
    assert table.due() == float("inf")


def test_used_on_a_limit_is_kept_for_longer() -> None:
    time = Time()
    table = time.table(100)
    table.admit(Admit("k", 1, 10.0, 3))
    table.admit(Admit("k", 1, 10.0, 3))
    time.now = 1010.0
    table.sweep(1000)
    assert len(table) == 1
    time.now = 1020.0
    table.sweep(1000)
    assert len(table) == 0


def test_where_there_is_no_room_who_has_used_the_least_is_forgotten_first() -> None:
    time = Time()
    table = time.table(3)
    for key, times in (("little", 1), ("most", 5), ("more", 3)):
        for _ in range(times):
            table.admit(Admit(key, 1, 60.0, 5))
    for at in range(20):
        table.admit(Admit(f"flood {at}", 1, 1.0, 1))
        assert len(table) == 3
    assert isinstance(table.admit(Admit("most", 1, 60.0, 5)), RateLimitDenied)
    reply = table.admit(Admit("more", 1, 60.0, 5))
    assert isinstance(reply, Admitted)
    assert reply.remaining == 1
    with pytest.raises(ValueError, match="max_limits"):
        time.table(0)


def test_who_has_used_more_since_is_not_the_first_to_be_forgotten() -> None:
    time = Time()
    table = time.table(2)
    for key, per in (("most", 60.0), ("little", 70.0), ("most", 60.0), ("most", 60.0)):
        table.admit(Admit(key, 1, per, 3))
    table.admit(Admit("another", 1, 500.0, 1))
    assert isinstance(table.admit(Admit("most", 1, 60.0, 3)), RateLimitDenied)
    assert isinstance(table.admit(Admit("another", 1, 500.0, 1)), RateLimitDenied)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20), st.integers(0, 4)), max_size=100))
def test_a_table_that_forgets_says_what_one_that_does_not_says(calls: list[tuple[int, int, int]]) -> None:
    time = Time()
    table, rules = time.table(1000), {key: of_python() for key in range(6)}
    for key, pause, budget in calls:
        time.now += pause
        table.sweep(budget)
        request = Admit(f"k{key}", 1, 2.0 + key, 3)
        assert table.admit(request) == rules[key](request, microseconds(time.now))
