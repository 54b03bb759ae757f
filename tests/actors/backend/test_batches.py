"""Batches: messages that arrived during a turn, in order, within the actor's bounds, answered individually."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from cachebus.actors import Actor, RestartPolicy, Supervisor
from cachebus.bus import DeferredReply, Envelope, LocalBus, ThreadPort
from cachebus.messages import ActorFailed, CacheClosed, CacheKeyError, Get, GetMany, Missing, Reply

from ..conftest import CLERK
from ..runtime.test_guarantees import outcome
from ..samples import Batched, Desk, Number, Plain

pytestmark = pytest.mark.anyio
T = 20.0


class Carrier(Actor):
    """Actor with a batch handler for two kinds of messages, and another for a third kind."""

    def __init__(self, desk: Desk, seen: list[list[Any]]) -> None:
        self.desk = desk
        self.seen = seen
        desk.lives += 1

    async def on_batch(self, batch: Sequence[Batched | Get]) -> Sequence[Reply | DeferredReply]:
        self.seen.append(list(batch))
        await self.desk.gate.wait()
        if self.desk.crashes_left:
            self.desk.crashes_left -= 1
            raise RuntimeError("a bug")
        return [await self._answer(each) for each in batch]

    async def _answer(self, message: Batched | Get) -> Reply | DeferredReply:
        if isinstance(message, Get):
            return Missing()
        if message.number < 0:
            deferred = self.ctx.defer()
            deferred.answer(Number(message.number))
            return deferred
        return Number(message.number)

    async def on_others(self, batch: Sequence[GetMany]) -> Sequence[Reply]:
        self.seen.append(list(batch))
        return [Missing() for _ in batch]

    async def on_plain(self, request: Plain) -> Number:
        self.seen.append([request])
        return Number(self.deadline_in_tenths())

    def deadline_in_tenths(self) -> int:
        return -1 if self.ctx.deadline is None else round((self.ctx.deadline - self.ctx.clock.monotonic()) * 10)


@pytest.fixture
def seen() -> list[list[Any]]:
    return []


@pytest.fixture
async def supervisor(bus: LocalBus, inline_turns: bool) -> AsyncIterator[Supervisor]:
    patient = RestartPolicy(max_restarts=100, backoff=1e-9)
    async with Supervisor(bus, inline_turns=inline_turns, policy=patient) as supervisor:
        yield supervisor


async def queue(bus: LocalBus, desk: Desk, first: Any, *following: Any) -> list[Any]:
    """Send `first`, and during its turn the other messages. Return the answers in the order of the messages."""
    answers: dict[int, list[Any]] = {}
    async with anyio.create_task_group() as group:
        for number, message in enumerate((first, *following)):
            group.start_soon(outcome, bus.request(CLERK, message, T), answers.setdefault(number, []))
            await wait_all_tasks_blocked()
        desk.gate.set()
    assert [len(each) for each in answers.values()] == [1] * (1 + len(following))
    return [each[0] for each in answers.values()]


async def test_a_lone_request_is_a_batch_of_its_own_at_once(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]]
) -> None:
    await supervisor.start(CLERK, lambda: Carrier(desk, seen))
    desk.gate.set()
    for number in range(3):
        assert await bus.request(CLERK, Batched(number), T) == Number(number)
    assert seen == [[Batched(0)], [Batched(1)], [Batched(2)]]


async def test_everything_that_arrived_during_a_turn_is_one_batch_whatever_its_kind(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]]
) -> None:
    await supervisor.start(CLERK, lambda: Carrier(desk, seen))
    rest = [Batched(1), Get("k"), Batched(2), Get("l")]
    assert await queue(bus, desk, Batched(0), *rest) == [Number(0), Number(1), Missing(), Number(2), Missing()]
    assert seen == [[Batched(0)], rest]


async def test_what_another_handler_takes_ends_a_batch_so_that_nothing_overtakes(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]]
) -> None:
    await supervisor.start(CLERK, lambda: Carrier(desk, seen))
    several = GetMany(("k",))
    await queue(bus, desk, Batched(0), Batched(1), several, several, Batched(2), Plain(3), Batched(4))
    assert seen == [[Batched(0)], [Batched(1)], [several, several], [Batched(2)], [Plain(3)], [Batched(4)]]


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 100])
async def test_no_batch_is_longer_than_max_batch(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]], bound: int
) -> None:
    class Bounded(Carrier):
        max_batch = bound

    await supervisor.start(CLERK, lambda: Bounded(desk, seen))
    await queue(bus, desk, *map(Batched, range(16)))
    sizes = [len(batch) for batch in seen]
    assert max(sizes) == min(bound, 15)
    assert sizes == [1, *[bound] * (15 // bound), *([15 % bound] if 15 % bound else [])]
    assert [each.number for batch in seen for each in batch] == list(range(16))


@pytest.mark.parametrize(("bound", "sizes"), [(1, [1] * 7), (20, [1, 2, 2, 2]), (21, [1, 3, 3]), (1000, [1, 6])])
async def test_a_batch_takes_no_more_once_it_has_max_batch_bytes(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]], bound: int, sizes: list[int]
) -> None:
    class Bounded(Carrier):
        max_batch_bytes = bound

    await supervisor.start(CLERK, lambda: Bounded(desk, seen))
    await queue(bus, desk, *(Batched(number, b"0123456789") for number in range(7)))
    assert [len(batch) for batch in seen] == sizes
    assert [each.number for batch in seen for each in batch] == list(range(7))


async def test_a_crash_hands_what_is_idempotent_to_the_next_life_and_answers_the_rest(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]]
) -> None:
    await supervisor.start(CLERK, lambda: Carrier(desk, seen))
    desk.crashes_left = 1
    answers = await queue(bus, desk, Get("first"), Batched(1), Get("second"))
    assert [type(answer) for answer in answers] == [Missing, Number, Missing]
    assert desk.lives == 2
    assert seen == [[Get("first")], [Get("first"), Batched(1), Get("second")]]


async def test_a_batch_that_crashes_twice_is_answered_and_its_order_is_kept(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]]
) -> None:
    await supervisor.start(CLERK, lambda: Carrier(desk, seen))
    asked = asked_first, *rest = [Get("0"), Batched(1), Get("2"), Get("3")]

    desk.crashes_left = 2
    answers = await queue(bus, desk, asked_first, *rest)
    # The first batch, of one message, crashes, then the joint batch. The first message has crashed twice.
    assert [type(answer) for answer in answers] == [ActorFailed, ActorFailed, Missing, Missing]
    assert seen == [[Get("0")], asked, [Get("2"), Get("3")]]
    assert desk.lives == 3


async def test_a_promise_in_a_batch_is_answered_by_itself(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]]
) -> None:
    await supervisor.start(CLERK, lambda: Carrier(desk, seen))
    assert await queue(bus, desk, Batched(0), Batched(-1), Batched(2)) == [Number(0), Number(-1), Number(2)]


async def test_what_nobody_waits_for_any_more_takes_no_place_in_a_batch(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]]
) -> None:
    cell = await supervisor.start(CLERK, lambda: Carrier(desk, seen))
    async with anyio.create_task_group() as group:
        group.start_soon(bus.request, CLERK, Batched(0), T)
        await wait_all_tasks_blocked()
        async with anyio.create_task_group() as doomed:
            doomed.start_soon(bus.request, CLERK, Batched(1), T)
            await wait_all_tasks_blocked()
            doomed.cancel_scope.cancel()
        cell.post(Envelope(Batched(2), ThreadPort(), deadline=bus.clock.monotonic() - 1.0))
        group.start_soon(bus.request, CLERK, Batched(3), T)
        await wait_all_tasks_blocked()
        desk.gate.set()
    assert seen == [[Batched(0)], [Batched(3)]]


@pytest.mark.parametrize("count", [-1, 1], ids=["too few", "too many"])
async def test_a_wrong_number_of_replies_answers_every_message_of_the_batch(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]], count: int
) -> None:
    class Miscounting(Carrier):
        async def on_batch(self, batch: Sequence[Batched | Get]) -> Sequence[Reply | DeferredReply]:
            await super().on_batch(batch)
            return [Number(0)] * (len(batch) + count) if len(batch) > 1 else [Number(0)]

    await supervisor.start(CLERK, lambda: Miscounting(desk, seen))
    answers = await queue(bus, desk, *map(Batched, range(4)))
    assert [type(answer) for answer in answers] == [Number, ActorFailed, ActorFailed, ActorFailed]
    assert desk.lives == 2


async def test_an_error_of_a_batch_is_no_crash_and_answers_every_message_of_it(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]]
) -> None:
    class Refusing(Carrier):
        async def on_batch(self, batch: Sequence[Batched | Get]) -> Sequence[Reply | DeferredReply]:
            replies = await super().on_batch(batch)
            if len(batch) > 1:
                raise CacheKeyError("refused")
            return replies

    await supervisor.start(CLERK, lambda: Refusing(desk, seen))
    answers = await queue(bus, desk, *map(Batched, range(4)))
    assert [type(answer) for answer in answers] == [Number, CacheKeyError, CacheKeyError, CacheKeyError]
    assert desk.lives == 1


async def test_a_batch_has_the_earliest_deadline_of_its_messages_and_a_waiting_turn_its_own(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, seen: list[list[Any]]
) -> None:
    deadlines: list[float | None] = []

    class Watching(Carrier):
        async def on_batch(self, batch: Sequence[Batched | Get]) -> Sequence[Reply | DeferredReply]:
            deadlines.append(self.ctx.deadline)
            return await super().on_batch(batch)

    cell = await supervisor.start(CLERK, lambda: Watching(desk, seen))
    now = bus.clock.monotonic()
    cell.post(Envelope(Batched(0)))
    await wait_all_tasks_blocked()
    for seconds in (300.0, 100.0, 200.0):
        cell.post(Envelope(Batched(1), ThreadPort(), deadline=now + seconds))
    cell.post(Envelope(Batched(2)))
    desk.gate.set()
    await wait_all_tasks_blocked()
    assert deadlines == [None, now + 100.0]
    assert await bus.request(CLERK, Plain(), 400.0) == Number(4000)
    assert cell.deadline is None


async def test_a_batch_under_way_that_outlasts_the_grace_is_answered_message_by_message(
    bus: LocalBus, desk: Desk, inline_turns: bool, seen: list[list[Any]]
) -> None:
    class Endless(Carrier):
        async def on_batch(self, batch: Sequence[Batched | Get]) -> Sequence[Reply | DeferredReply]:
            replies = await super().on_batch(batch)
            if len(batch) > 1:
                await anyio.sleep_forever()
            return replies

    answers: list[Any] = []
    async with (
        anyio.create_task_group() as group,
        Supervisor(bus, inline_turns=inline_turns, grace=0.05) as supervisor,
    ):
        await supervisor.start(CLERK, lambda: Endless(desk, seen))
        for number in range(4):
            group.start_soon(outcome, bus.request(CLERK, Batched(number), T), answers)
            await wait_all_tasks_blocked()
        desk.gate.set()
        await wait_all_tasks_blocked()
        assert [len(batch) for batch in seen] == [1, 3]
    assert [type(answer) for answer in answers] == [Number, CacheClosed, CacheClosed, CacheClosed]
