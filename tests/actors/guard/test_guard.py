from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from cachebus.actors import BreakerPolicy, Guard, GuardPolicy, RetryPolicy
from cachebus.actors.backend.pipeline import GOOD_BATCH, RequestPipeline
from cachebus.actors.guard.attempts import ConcurrencyLimiter
from cachebus.actors.ports import NO_PROGRESS, Capabilities, Gauges, OnReplies, Progress
from cachebus.messages import (
    ActorFailed,
    BackendConnected,
    BackendDisconnected,
    CacheClosed,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    CacheTimeoutError,
    CircuitClosed,
    CircuitOpen,
    CircuitOpened,
    Clear,
    Delete,
    Event,
    Failed,
    Found,
    Get,
    Increment,
    Missing,
    Overloaded,
    Reply,
    Request,
    Set,
    SetMany,
    Stored,
    WrongType,
)
from cachebus.testing.fakes import RecordingContext

from ...clock import ManualClock

Script = Callable[[Sequence[Request[Any]]], Awaitable[Sequence[Reply]]]

HIT = Found(b"1")
DOWN = CacheConnectionError("connection refused")
ONCE = RetryPolicy(attempts=1)


class ScriptedStore:
    """Batch store whose answers come from a function of the test."""

    name = "scripted"
    capabilities = Capabilities()

    def __init__(self, answer: Script | None = None) -> None:
        self.asked: list[list[Request[Any]]] = []
        self.answer = answer or works

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        self.asked.append(list(batch))
        return await self.answer(batch)


class ScriptedPipeline(ScriptedStore):
    """Scripted store that keeps its replies until the test releases them."""

    long_running: frozenset[type[Request[Any]]] = frozenset()
    max_batch = 512

    def __init__(self, answer: Script | None = None) -> None:
        super().__init__(answer)
        self.open_replies: list[OnReplies] = []
        self.progress: Any = NO_PROGRESS
        self.is_ready = True

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        self.asked.append(list(batch))
        await self.answer(batch)
        self.open_replies.append(on_replies)
        return NO_PROGRESS

    def try_submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress | None:
        if not self.is_ready:
            return None
        self.asked.append(list(batch))
        self.open_replies.append(on_replies)
        progress: Progress = self.progress
        return progress


async def works(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
    return [HIT] * len(batch)


async def is_down(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
    raise DOWN


async def says_nothing(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
    await anyio.sleep_forever()
    raise AssertionError("unreachable")


class Stage:
    """Guard in front of a scripted store, with a manual clock."""

    def __init__(self, answer: Script | None = None, *, store: ScriptedStore | None = None, **policy: Any) -> None:
        self.clock: Any = ManualClock()
        self.ctx = RecordingContext(clock=self.clock, address="backend.main")
        self.store = store or ScriptedStore(answer)
        self.guard = Guard(GuardPolicy(**policy), self.ctx, self.store.name, seed=1)

    async def ask(self, *batch: Request[Any], budget: float | None = None) -> Sequence[Reply]:
        deadline = None if budget is None else self.clock.monotonic() + budget
        return await self.guard.execute(self.store, batch, deadline)

    async def while_time_passes(self, *batch: Request[Any], budget: float | None = None) -> Sequence[Reply]:
        """Send a batch, and advance the clock whenever nothing else happens."""
        result: list[Sequence[Reply]] = []

        async def ask() -> None:
            result.append(await self.ask(*batch, budget=budget))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            while not result:
                for _ in range(20):
                    await checkpoint()
                if not result:
                    self.clock.advance(0.01)
                    self.ctx.timers.fire()
        return result[0]

    def events(self, *kinds: type[Event]) -> list[type[Event]]:
        return [type(each) for each in self.ctx.emitted if type(each) in kinds]

    @property
    def state(self) -> str:
        return self.guard.statistics().state


async def run(function: Callable[[], Awaitable[None]]) -> None:
    await function()


async def let_callbacks_run() -> None:
    for _ in range(5):
        await checkpoint()


def failures(replies: Sequence[Reply]) -> list[type[CacheError]]:
    return [type(each.error()) for each in replies if isinstance(each, Failed)]


# Retries


async def test_what_may_be_done_twice_is_tried_again() -> None:
    async def recovers(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return await (is_down if len(stage.store.asked) < 3 else works)(batch)

    stage = Stage(recovers)
    assert await stage.while_time_passes(Get("a")) == [HIT]
    assert len(stage.store.asked) == 3
    assert stage.guard.statistics().retries == 2


@pytest.mark.parametrize("request_", [Increment("a"), Set("a", b"1"), SetMany({"a": b"1"})])
async def test_what_may_not_be_done_twice_is_done_once(request_: Request[Any]) -> None:
    stage = Stage(is_down)
    assert failures(await stage.while_time_passes(request_)) == [CacheConnectionError]
    assert len(stage.store.asked) == 1


async def test_of_a_batch_only_that_is_repeated_which_failed_and_may_be_repeated() -> None:
    first: list[Reply] = [HIT, Failed.of(DOWN), Failed.of(DOWN), Failed.of(WrongType("no int")), Stored(1.0)]

    async def some_fail(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return first if len(batch) == 5 else await works(batch)

    stage = Stage(some_fail)
    batch = [Get("a"), Get("b"), Increment("c"), Get("d"), Set("e", b"")]
    replies = await stage.while_time_passes(*batch)
    assert stage.store.asked[1:] == [[Get("b")]]
    assert replies == [HIT, HIT, first[2], first[3], Stored(1.0)]


@pytest.mark.parametrize("budget", [0.0, 0.01, 0.1, 0.3, 1.0, 5.0])
async def test_no_attempt_begins_after_the_deadline(budget: float) -> None:
    stage = Stage(
        is_down, retry=RetryPolicy(attempts=1000, backoff=0.05), breaker=BreakerPolicy(failure_threshold=10**6)
    )
    began: list[float] = []

    async def note(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        began.append(stage.clock.monotonic())
        return await is_down(batch)

    stage.store.answer = note
    deadline = stage.clock.monotonic() + budget
    await stage.while_time_passes(Get("a"), budget=budget)
    # The clock moves in steps of 10 ms.
    assert all(instant < deadline + 0.01 for instant in began[1:])
    assert stage.clock.monotonic() <= deadline + 0.011
    assert len(began) > 1 or budget < 0.1


async def test_attempts_are_bounded_without_a_deadline_too() -> None:
    stage = Stage(is_down, retry=RetryPolicy(attempts=4))
    await stage.while_time_passes(Get("a"))
    assert len(stage.store.asked) == 4


async def test_a_circuit_that_opens_ends_the_repetitions_with_the_reason() -> None:
    stage = Stage(is_down, breaker=BreakerPolicy(failure_threshold=2), retry=RetryPolicy(attempts=10))
    assert failures(await stage.while_time_passes(Get("a"))) == [CacheConnectionError]
    assert len(stage.store.asked) == 2


async def test_repetitions_have_a_budget_that_success_and_failure_earn_alike() -> None:
    async def spoiled(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return [Failed.of(DOWN) if request == Get("bad") else HIT for request in batch]

    stage = Stage(spoiled, retry=RetryPolicy(attempts=2, budget=0.1), breaker=BreakerPolicy(enabled=False))
    for _ in range(50):
        await stage.while_time_passes(Get("bad"))
    assert stage.guard.statistics().retries == pytest.approx(10 + 0.1 * 60, abs=1.0)
    for _ in range(100):
        await stage.ask(Get("good"))
    before = stage.guard.statistics().retries
    for _ in range(9):
        await stage.while_time_passes(Get("bad"))
    assert stage.guard.statistics().retries == before + 9


# The circuit breaker


async def test_five_failures_in_a_row_leave_the_backend_alone_and_three_successes_return_to_it() -> None:
    stage = Stage(is_down, retry=ONCE)
    for _ in range(5):
        await stage.ask(Get("a"))
    with pytest.raises(CircuitOpen) as caught:
        await stage.ask(Get("a"))
    assert caught.value.retry_after == 30.0
    assert len(stage.store.asked) == 5
    stage.clock.advance(30.0)
    stage.store.answer = works
    for _ in range(3):
        assert await stage.ask(Get("a")) == [HIT]
    assert stage.state == "closed"
    assert stage.events(CircuitOpened, CircuitClosed) == [CircuitOpened, CircuitClosed]
    opened = next(each for each in stage.ctx.emitted if isinstance(each, CircuitOpened))
    assert (opened.address, opened.failures, opened.retry_after) == ("backend.main", 5, 30.0)


async def test_of_a_thousand_calls_at_once_three_probe_a_half_open_circuit() -> None:
    stage = Stage(is_down, retry=ONCE, max_concurrent=5000)
    for _ in range(5):
        await stage.ask(Get("a"))
    stage.clock.advance(30.0)
    stage.store.asked.clear()
    let_go = anyio.Event()

    async def wait(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        await let_go.wait()
        return await works(batch)

    stage.store.answer = wait
    refused = 0

    async def probe() -> None:
        nonlocal refused
        try:
            await stage.ask(Get("a"))
        except CircuitOpen:
            refused += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(1000):
            tasks.start_soon(probe)
        while refused < 997:
            await checkpoint()
        assert len(stage.store.asked) == 3
        let_go.set()
    assert (len(stage.store.asked), refused, stage.state) == (3, 997, "closed")


async def test_a_cancelled_call_is_no_failure_and_gives_its_probe_back() -> None:
    stage = Stage(is_down, retry=ONCE)
    for _ in range(5):
        await stage.ask(Get("a"))
    stage.clock.advance(30.0)
    stage.store.answer = says_nothing
    for _ in range(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stage.ask, Get("a"))
            while not stage.guard.statistics().in_flight:
                await checkpoint()
            tasks.cancel_scope.cancel()
    statistics = stage.guard.statistics()
    assert (statistics.state, statistics.failure_count, statistics.in_flight) == ("half_open", 5, 0)


async def test_a_lost_connection_is_named_by_its_own_error() -> None:
    async def two_reasons(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return [Failed.of(WrongType("no int")), Failed.of(DOWN)]

    stage = Stage(two_reasons, retry=ONCE)
    await stage.ask(Increment("a"), Increment("b"))
    lost = next(each for each in stage.ctx.emitted if isinstance(each, BackendDisconnected))
    assert lost.reason == "connection refused"


@pytest.mark.parametrize("error", [WrongType("no int"), CacheConfigurationError("wrong password")])
async def test_what_no_patience_mends_neither_trips_the_circuit_nor_is_repeated(error: CacheError) -> None:
    async def refuses(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        raise error

    stage = Stage(refuses)
    for _ in range(20):
        assert failures(await stage.ask(Get("a"))) == [type(error)]
    assert stage.state == "closed"
    assert len(stage.store.asked) == 20
    assert stage.guard.statistics().failure_count == 0


async def test_an_excluded_error_does_not_trip_the_circuit() -> None:
    stage = Stage(is_down, retry=ONCE, excluded=(CacheConnectionError,))
    for _ in range(20):
        await stage.ask(Get("a"))
    assert stage.state == "closed"


async def test_a_batch_of_which_something_was_answered_is_no_failure() -> None:
    async def half(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return [Missing(), Failed.of(DOWN)]

    stage = Stage(half, retry=ONCE)
    for _ in range(20):
        await stage.ask(Get("a"), Increment("b"))
    assert stage.state == "closed"


async def test_a_bug_of_the_store_is_raised_and_leaves_nothing_behind() -> None:
    async def crashes(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        raise ZeroDivisionError

    stage = Stage(crashes)
    with pytest.raises(ZeroDivisionError):
        await stage.ask(Get("a"))
    statistics = stage.guard.statistics()
    assert (statistics.in_flight, statistics.failure_count) == (0, 0)


# Timeouts


async def test_a_call_that_takes_too_long_is_given_up_and_counts_as_a_failure() -> None:
    stage = Stage(says_nothing, retry=ONCE, timeout_initial=0.5)
    began = stage.clock.monotonic()
    replies = await stage.while_time_passes(Get("a"), Increment("b"))
    assert failures(replies) == [CacheTimeoutError] * 2
    read, increment = (reply.error() for reply in replies if isinstance(reply, Failed))
    assert str(read).startswith("backend.main: scripted did not reply within 0.5")
    assert not str(read).endswith("not known")
    assert str(increment).endswith("; whether the request was done is not known")
    assert 0.5 <= stage.clock.monotonic() - began <= 0.52
    assert stage.guard.statistics().failure_count == 1
    assert stage.guard.statistics().in_flight == 0


async def test_the_timeout_follows_what_the_backend_takes() -> None:
    stage = Stage()

    async def takes(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        stage.clock.advance(seconds)
        return await works(batch)

    stage.store.answer = takes
    seconds = 0.001
    for _ in range(100):
        await stage.ask(Get("a"))
    assert stage.guard.statistics().current_timeout == 0.1
    seconds = 0.2
    for _ in range(1000):
        await stage.ask(Get("a"))
    statistics = stage.guard.statistics()
    assert statistics.p95 == pytest.approx(0.2)
    assert statistics.current_timeout == pytest.approx(0.6)


@pytest.mark.parametrize("request_", [Clear(), Set("a", b"x" * 20_000_000)], ids=["a clear", "a large value"])
async def test_what_may_take_long_is_given_longer_and_says_nothing_about_the_rest(request_: Request[Any]) -> None:
    stage = Stage(retry=ONCE, timeout_initial=0.1)

    async def slow(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        await stage.clock.sleep_until(stage.clock.monotonic() + 1.0)
        return await works(batch)

    stage.store.answer = slow
    assert failures(await stage.while_time_passes(request_)) == []
    assert stage.guard.statistics().p95 == 0.0
    assert failures(await stage.while_time_passes(Get("a"))) == [CacheTimeoutError]


async def test_many_keys_are_given_longer_and_their_timeout_does_not_open_the_circuit() -> None:
    many = SetMany({f"k{number}": b"v" for number in range(50_000)})
    stage = Stage(says_nothing, retry=ONCE, timeout_initial=0.1)
    began = stage.clock.monotonic()
    for _ in range(6):
        assert failures(await stage.while_time_passes(many)) == [CacheTimeoutError]
    assert stage.clock.monotonic() - began > 6 * 5.0
    assert (stage.state, stage.guard.statistics().failure_count) == ("closed", 0)
    assert stage.guard.statistics().current_timeout == 0.1


async def test_more_time_for_the_size_ends_with_the_deadline_of_the_call() -> None:
    stage = Stage(says_nothing, retry=ONCE, timeout_initial=0.1)
    began = stage.clock.monotonic()
    large = Set("a", b"x" * 20_000_000)
    assert failures(await stage.while_time_passes(large, budget=2.0)) == [CacheTimeoutError]
    assert 2.0 <= stage.clock.monotonic() - began <= 2.02


class Wire:
    """Connection whose progress the test controls."""

    def __init__(self) -> None:
        self.last_progress = float("-inf")


async def test_a_reply_that_is_still_arriving_is_waited_for() -> None:
    line = Line(retry=ONCE, timeout_initial=0.5)
    moving = line.store.progress = Wire()
    clock, ctx = line.stage.clock, line.stage.ctx

    def pass_time(seconds: float, *, bytes_move: bool) -> None:
        for _ in range(round(seconds / 0.02)):  # Larger steps would look like a blocked event loop.
            clock.advance(0.02)
            if bytes_move:
                moving.last_progress = clock.monotonic()
            ctx.timers.fire()

    await line.ask("large")
    pass_time(8.0, bytes_move=True)
    assert line.received["large"] == []
    pass_time(0.6, bytes_move=False)
    assert failures(line.received["large"]) == [CacheTimeoutError]
    assert line.stage.guard.statistics().failure_count == 0, (
        "an attempt with extra time must not count against the backend"
    )
    # Bytes that moved before an attempt do not extend it.
    await line.ask("silent")
    pass_time(0.6, bytes_move=False)
    assert failures(line.received["silent"]) == [CacheTimeoutError]
    assert line.stage.guard.statistics().failure_count == 1


async def test_many_calls_that_hang_are_all_given_up_at_their_time() -> None:
    stage = Stage(says_nothing, retry=ONCE, timeout_initial=0.5)
    done: list[float] = []
    began = stage.clock.monotonic()

    async def ask() -> None:
        assert failures(await stage.ask(Get("a"))) == [CacheTimeoutError]
        done.append(stage.clock.monotonic() - began)

    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(ask)
        while len(stage.store.asked) < 50:
            await checkpoint()
        stage.clock.advance(0.5)
        stage.ctx.timers.fire()
    assert done == [pytest.approx(0.5)] * 50
    assert stage.guard.statistics().current_timeout < 2.0, "they time out together and count once"


# The concurrency limit


async def test_so_many_ask_so_many_wait_and_the_rest_is_turned_away() -> None:
    let_go = anyio.Event()

    async def wait(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        await let_go.wait()
        return await works(batch)

    stage = Stage(wait, max_concurrent=2, max_waiting=3)
    turned_away = 0

    async def ask() -> None:
        nonlocal turned_away
        try:
            await stage.ask(Get("a"))
        except Overloaded:
            turned_away += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(ask)
        while turned_away < 5:
            await checkpoint()
        statistics = stage.guard.statistics()
        assert (statistics.in_flight, statistics.waiting, statistics.rejected) == (2, 3, 5)
        assert len(stage.store.asked) == 2
        let_go.set()
    assert len(stage.store.asked) == 5
    assert stage.guard.statistics().in_flight == 0


async def test_who_is_cancelled_while_waiting_leaves_the_queue() -> None:
    stage = Stage(says_nothing, max_concurrent=1, max_waiting=5)
    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(stage.ask, Get("a"))
        while stage.guard.statistics().waiting < 5:
            await checkpoint()
        tasks.cancel_scope.cancel()
    statistics = stage.guard.statistics()
    assert (statistics.in_flight, statistics.waiting) == (0, 0)
    stage.store.answer = works
    assert await stage.ask(Get("a")) == [HIT]


async def test_nobody_waits_behind_an_open_circuit() -> None:
    stage = Stage(is_down, retry=ONCE, max_concurrent=1)
    stuck = anyio.Event()

    async def hang(batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        await stuck.wait()
        return await works(batch)

    async with anyio.create_task_group() as tasks:
        stage.store.answer = hang
        tasks.start_soon(stage.ask, Get("stuck"))
        while not stage.store.asked:
            await checkpoint()
        waiting: list[CircuitOpen] = []

        async def wait() -> None:
            try:
                await stage.ask(Get("waiting"))
            except CircuitOpen as error:
                waiting.append(error)

        for _ in range(3):
            tasks.start_soon(wait)
        while stage.guard.statistics().waiting < 3:
            await checkpoint()
        # The circuit opens while they wait, as if late results had reported failures.
        for _ in range(5):
            stage.guard.breaker.failed(stage.guard.breaker.admit())
        while len(waiting) < 3:
            await checkpoint()
        assert {error.retry_after for error in waiting} == {30.0}
        assert len({id(error) for error in waiting}) == 3
        with pytest.raises(CircuitOpen):
            await stage.ask(Get("late"))
        assert stage.guard.statistics().rejected == 4
        assert stage.guard.statistics().in_flight == 1, "the stuck call must still hold its slot"
        stuck.set()
    statistics = stage.guard.statistics()
    assert (statistics.in_flight, statistics.waiting) == (0, 0)


async def test_who_is_cancelled_with_a_refusal_on_the_way_gives_no_place_away() -> None:
    places = ConcurrencyLimiter(1, 5, "backend.main")
    await places.acquire()

    async def take() -> None:
        with contextlib.suppress(CircuitOpen):  # The order of the two depends on the event loop.
            await places.acquire()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        tasks.start_soon(take)
        while len(places.queue) < 2:
            await checkpoint()
        assert places.refuse_all(lambda: CircuitOpen("open")) == 2
        tasks.cancel_scope.cancel()
    assert (places.taken, len(places.queue)) == (1, 0)
    places.release()
    assert places.taken == 0


async def test_who_is_cancelled_with_a_place_on_the_way_hands_it_on() -> None:
    places = ConcurrencyLimiter(1, 5, "backend.main")
    await places.acquire()

    async def take() -> None:
        await places.acquire()
        places.release()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        while not len(places.queue):
            await checkpoint()
        places.release()
        tasks.cancel_scope.cancel()
    assert places.taken == 0


# Stores that reply later


async def test_a_reply_that_comes_later_is_handed_on_once() -> None:
    store = ScriptedPipeline()
    stage = Stage(store=store)
    received: list[Sequence[Reply]] = []
    await stage.guard.submit(store, [Get("a")], received.append)
    assert received == []
    store.open_replies.pop()([HIT])
    assert received == [[HIT]]
    assert stage.guard.statistics().success_count == 1


class Line:
    """Guarded pipeline in front of a scripted store. The replies go into `received`."""

    def __init__(self, **policy: Any) -> None:
        self.store = ScriptedPipeline()
        self.stage = Stage(store=self.store, **policy)
        self.counted = 0
        self.pipeline = RequestPipeline(self.store, self.stage.guard, self.stage.ctx, self._count, self._emit)
        self.received: dict[str, list[Any]] = {}

    def _count(self, requests: Sequence[Request[Any]], replies: Sequence[Reply]) -> None:
        self.counted += len(replies)

    def _emit(self, requests: Sequence[Request[Any]], replies: Sequence[Reply], traces: Sequence[str | None]) -> None:
        assert len(requests) == len(replies) == len(traces)

    async def ask(self, key: str) -> None:
        (slot,) = await self.pipeline.put((Get(key),), ())
        slot.attach(Listener(self.received.setdefault(key, [])))

    def reply(self) -> None:
        sent, on_replies = self.store.asked[-len(self.store.open_replies)], self.store.open_replies.pop(0)
        on_replies([HIT] * len(sent))

    @property
    def sent(self) -> list[int]:
        return [len(batch) for batch in self.store.asked]


class Listener:
    """Port that records its answers."""

    waiting = True

    def __init__(self, received: list[Any]) -> None:
        self.received = received

    def answer(self, reply: Any) -> None:
        self.received.append(reply)


async def test_a_lone_request_is_sent_at_once_and_others_wait_for_its_reply() -> None:
    line = Line()
    for key in "abc":
        await line.ask(key)
    assert line.sent == [1]
    line.reply()
    await let_callbacks_run()
    assert line.sent == [1, 2]
    assert line.received == {"a": [HIT], "b": [], "c": []}
    line.reply()
    assert line.received == {"a": [HIT], "b": [HIT], "c": [HIT]}
    assert line.counted == 3


async def test_a_good_batch_does_not_wait_for_the_reply_of_another() -> None:
    line = Line()
    for number in range(1 + GOOD_BATCH):
        await line.ask(str(number))
    await let_callbacks_run()
    assert line.sent == [1, GOOD_BATCH]


async def test_nothing_waits_for_the_end_of_a_request_that_takes_long() -> None:
    line = Line()
    await line.pipeline.put_alone(Clear())
    await line.ask("a")
    assert line.store.asked == [[Clear()], [Get("a")]]


async def test_what_waits_for_a_batch_goes_on_when_it_is_given_up() -> None:
    line = Line(retry=ONCE, timeout_initial=0.5)
    await line.ask("a")
    await line.ask("b")
    assert line.sent == [1]
    line.stage.clock.advance(0.5)
    line.stage.ctx.timers.fire()
    await let_callbacks_run()
    assert line.sent == [1, 1]
    assert failures(line.received["a"]) == [CacheTimeoutError]


async def test_nothing_waits_for_a_batch_behind_an_open_circuit() -> None:
    line = Line(retry=ONCE)
    await line.ask("a")
    for _ in range(5):
        line.stage.guard.breaker.failed(line.stage.guard.breaker.admit())
    await line.ask("b")
    assert failures(line.received["b"]) == [CircuitOpen]


async def test_while_a_batch_waits_for_the_store_no_request_is_taken() -> None:
    line = Line()
    line.store.is_ready = False
    await line.ask("a")
    assert line.pipeline.take(Get("b")) is None
    (beside,) = line.stage.ctx.background
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(line.ask, "c")
        await let_callbacks_run()
        assert line.sent == []
        tasks.start_soon(run, beside)
    await let_callbacks_run()
    assert line.sent[0] == 1
    line.reply()
    assert line.received["a"] == [HIT]


async def test_a_batch_that_cannot_be_counted_is_answered_and_crashes_the_actor() -> None:
    line = Line()
    await line.ask("a")
    line.store.open_replies.pop()([])
    assert failures(line.received["a"]) == [ActorFailed]
    assert [type(each) for each in line.stage.ctx.crashes] == [TypeError]


async def test_a_batch_whose_sending_breaks_off_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line()

    def breaks(batch: Any, on_replies: Any) -> Progress:
        raise ZeroDivisionError

    monkeypatch.setattr(line.store, "try_submit", breaks)
    await line.ask("a")
    assert failures(line.received["a"]) == [ActorFailed]
    assert [type(each) for each in line.stage.ctx.crashes] == [ZeroDivisionError]
    assert line.stage.guard.statistics().in_flight == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RecursionError, ZeroDivisionError])
async def test_a_batch_is_answered_whatever_breaks_off_its_accounting(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line()
    await line.ask("a")
    await line.ask("b")

    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr(line.stage.guard, "connected", interrupted)
    with pytest.raises(error):
        line.reply()
    assert line.received["a"] == [HIT]
    assert line.stage.guard.statistics().in_flight == len(line.store.open_replies)  # On trio, the next is already sent.
    monkeypatch.undo()
    await let_callbacks_run()
    line.reply()
    assert line.received["b"] == [HIT]


async def test_what_a_caller_asked_for_that_has_gone_is_only_sent_if_it_invalidates() -> None:
    line = Line()
    await line.ask("first")
    (gone, deletes) = await line.pipeline.put((Get("gone"), Delete("deleted")), ())
    await line.ask("stays")
    for slot in (gone, deletes):
        port = Listener([])
        port.waiting = False
        slot.attach(port)
    line.reply()
    await let_callbacks_run()
    assert line.store.asked[1:] == [[Delete("deleted"), Get("stays")]]


async def test_whatever_is_under_way_is_answered_when_the_actor_ends() -> None:
    line = Line()
    for key in "abc":
        await line.ask(key)
    line.pipeline.fail_all(Failed.of(CacheClosed("it is closed")))
    assert [failures(received) for received in line.received.values()] == [[CacheClosed]] * 3
    line.store.open_replies.pop()([HIT])
    assert line.stage.guard.statistics().in_flight == 0


async def test_batches_that_strike_together_are_one_failure() -> None:
    store = ScriptedPipeline()
    stage = Stage(store=store, retry=ONCE, timeout_initial=0.5)
    for name in "abcdefgh":
        await stage.guard.submit(store, [Get(name)], lambda replies: None)
    stage.clock.advance(0.5)
    stage.ctx.timers.fire()
    statistics = stage.guard.statistics()
    assert (statistics.failure_count, statistics.state, statistics.in_flight) == (1, "closed", 0)


async def test_what_our_own_loop_slept_through_is_not_the_stores_failure() -> None:
    store = ScriptedPipeline()
    stage = Stage(store=store, retry=ONCE, timeout_initial=0.5)
    received: list[Sequence[Reply]] = []
    assert stage.guard.try_submit(store, [Get("a")], received.append)
    stage.clock.advance(3.0)
    stage.ctx.timers.fire()
    assert received == []
    store.open_replies.pop()([HIT])
    assert received == [[HIT]]
    assert stage.guard.statistics().failure_count == 0


async def test_a_reply_that_comes_too_late_is_dropped() -> None:
    store = ScriptedPipeline()
    stage = Stage(store=store, retry=ONCE, timeout_initial=0.5)
    received: list[Sequence[Reply]] = []
    await stage.guard.submit(store, [Get("a")], received.append)
    stage.clock.advance(0.5)
    stage.ctx.timers.fire()
    store.open_replies.pop()([HIT])
    assert [failures(each) for each in received] == [[CacheTimeoutError]]


async def test_a_batch_that_cannot_even_be_sent_is_given_up_and_answered() -> None:
    store = ScriptedPipeline(says_nothing)
    stage = Stage(store=store, retry=ONCE, timeout_initial=0.5)
    received: list[Sequence[Reply]] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.guard.submit, store, [Get("a")], received.append)
        while not store.asked:
            await checkpoint()
        stage.clock.advance(0.5)
        stage.ctx.timers.fire()
    assert [failures(each) for each in received] == [[CacheTimeoutError]]
    assert stage.guard.statistics().in_flight == 0


async def test_a_batch_that_failed_later_is_repeated_beside_the_turns() -> None:
    store = ScriptedPipeline()
    stage = Stage(store=store, retry=RetryPolicy(backoff=1e-9))
    received: list[Sequence[Reply]] = []
    await stage.guard.submit(store, [Get("a"), Increment("b")], received.append)
    store.open_replies.pop()([Failed.of(DOWN), Failed.of(DOWN)])
    assert received == []
    (beside,) = stage.ctx.background
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, beside)
        while not store.open_replies:
            await checkpoint()
            stage.clock.advance(0.01)
        assert store.asked[1:] == [[Get("a")]]
        store.open_replies.pop()([HIT])
    assert received == [[HIT, Failed.of(DOWN)]]


async def test_what_fails_because_the_store_is_closed_is_not_repeated() -> None:
    store = ScriptedPipeline()
    stage = Stage(store=store)
    received: list[Sequence[Reply]] = []
    await stage.guard.submit(store, [Get("a")], received.append)
    stage.guard.closed = True
    store.open_replies.pop()([Failed.of(DOWN)])
    assert [failures(each) for each in received] == [[CacheConnectionError]]
    assert stage.ctx.background == []


# Events


async def test_a_connection_that_is_lost_and_found_is_told_once_each() -> None:
    stage = Stage(retry=ONCE)
    stage.guard.connected()
    await stage.ask(Get("a"))
    stage.store.answer = is_down
    await stage.ask(Get("a"))
    await stage.ask(Get("a"))
    stage.store.answer = works
    await stage.ask(Get("a"))
    kinds = (BackendConnected, BackendDisconnected)
    assert stage.events(*kinds) == [BackendConnected, BackendDisconnected, BackendConnected]
    lost = next(each for each in stage.ctx.emitted if isinstance(each, BackendDisconnected))
    assert (lost.store, lost.reason) == ("scripted", "connection refused")


async def test_the_statistics_say_where_it_stands() -> None:
    stage = Stage(retry=ONCE)
    await stage.ask(Get("a"))
    stage.store.answer = is_down
    for _ in range(5):
        await stage.ask(Get("a"))
    stage.clock.advance(10.0)
    with pytest.raises(CircuitOpen):
        await stage.ask(Get("a"))
    statistics = stage.guard.statistics()
    now = stage.clock.wall()
    assert (statistics.state, statistics.success_count, statistics.failure_count) == ("open", 1, 5)
    assert statistics.last_failure_time == pytest.approx(now - 10.0)
    assert statistics.next_attempt == pytest.approx(now + 20.0)
    assert (statistics.in_flight, statistics.rejected) == (0, 1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("timeout_min", 0.0),
        ("timeout_max", 0.01),
        ("timeout_initial", 0.0),
        ("max_concurrent", 0),
        ("timeout_window", 0),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(CacheConfigurationError, match=option):
        GuardPolicy(**{option: value})
