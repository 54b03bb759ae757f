"""The guarantees of `ARCHITECTURE.md`, on asyncio and on trio, with inline turns on and off."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio import wait_all_tasks_blocked

from cachebus.actors import Cell, RestartPolicy, Supervisor
from cachebus.bus import Envelope, LocalBus, ThreadPort, open_port
from cachebus.messages import (
    ActorFailed,
    BadMessage,
    CacheClosed,
    CacheError,
    CacheKeyError,
    CacheTimeoutError,
    DeadLetter,
    Failed,
    Missing,
    NoSuchActor,
    Overloaded,
)

from ..conftest import CLERK
from ..samples import (
    Again,
    Batched,
    Clerk,
    Crash,
    Desk,
    Drop,
    Interrupt,
    Number,
    Park,
    Plain,
    Porter,
    Refuse,
    Shrug,
    Slow,
    Strange,
    Unpark,
)

pytestmark = pytest.mark.anyio
T = 20.0


async def outcome(call: Awaitable[Any], into: list[Any]) -> None:
    try:
        into.append(await call)
    except CacheError as error:
        into.append(error)


# Order and turns


async def test_messages_of_one_sender_are_handled_in_the_order_they_were_sent(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))

    async def send(base: int) -> None:
        for number in range(0, 100, 2):
            bus.send(CLERK, Plain(base + number))
            await bus.request(CLERK, Plain(base + number + 1), T)

    async with anyio.create_task_group() as group:
        for base in (0, 1000, 2000):
            group.start_soon(send, base)
    for base in (0, 1000, 2000):
        mine = [value for value in desk.handled if base <= value < base + 100]
        assert mine == list(range(base, base + 100))


async def test_messages_of_one_thread_are_handled_in_the_order_they_were_sent(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))

    def send(base: int) -> None:
        for number in range(0, 100, 2):
            bus.send(CLERK, Plain(base + number))
            bus.request_blocking(CLERK, Plain(base + number + 1), T)

    async with anyio.create_task_group() as group:
        for base in range(0, 8000, 1000):
            group.start_soon(anyio.to_thread.run_sync, send, base)
    assert len(desk.handled) == 800
    for base in range(0, 8000, 1000):
        mine = [value for value in desk.handled if base <= value < base + 100]
        assert mine == list(range(base, base + 100))


async def test_an_actor_has_one_turn_at_a_time(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    desk.gate.set()

    def from_a_thread() -> None:
        for number in range(200):
            bus.request_blocking(CLERK, Plain(number), T)

    async def from_a_task() -> None:
        for number in range(100):
            await bus.request(CLERK, Plain(number), T)
            await bus.request(CLERK, Slow(number), T)

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(anyio.to_thread.run_sync, from_a_thread)
            group.start_soon(from_a_task)
    assert desk.overlaps == 0
    assert desk.lives == 1
    assert len(desk.handled) == 4 * 200 + 4 * 200


async def test_a_plain_request_waits_for_the_turn_under_way(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, bus.request(CLERK, Slow(1), T), answers)
        await wait_all_tasks_blocked()
        group.start_soon(outcome, bus.request(CLERK, Plain(2), T), answers)
        await wait_all_tasks_blocked()
        assert answers == []
        desk.gate.set()
    assert sorted(answer.value for answer in answers) == [1, 2]
    assert desk.handled == [1, 2]


# Exactly one answer


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Refuse(), CacheKeyError),
        (Crash(), ActorFailed),
        (Shrug(), ActorFailed),
        (Strange(), BadMessage),
    ],
    ids=["refused", "crashed", "returned None", "no handler"],
)
async def test_a_request_that_fails_gets_the_error_that_says_why(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, request_: Any, error: type[CacheError]
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    with pytest.raises(error):
        await bus.request(CLERK, request_, T)
    assert await bus.request(CLERK, Plain(1), T) == Number(1)


async def test_an_actor_failed_error_names_the_actor_and_the_kind_of_exception(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    with pytest.raises(ActorFailed, match=r"actor test\.clerk failed: RuntimeError"):
        await bus.request(CLERK, Crash(), T)


async def test_a_deferred_reply_is_given_once(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(outcome, bus.request(CLERK, Park(), T), answers)
        await wait_all_tasks_blocked()
        assert answers == []
        assert await bus.request(CLERK, Unpark(), T) == Number(3)
    assert sorted(answer.value for answer in answers) == [0, 1, 2]


async def test_a_thread_gets_its_deferred_reply(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    cell = await supervisor.start(CLERK, lambda: Clerk(desk))
    answers: list[Any] = []

    def park() -> None:
        port = ThreadPort()
        cell.post(Envelope(Park(), port))
        answers.append(port.wait(T))

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, park)
        while not cell._deferred:
            await anyio.lowlevel.checkpoint()
        await bus.request(CLERK, Unpark(), T)
    assert answers == [Number(0)]


async def test_what_is_parked_when_the_actor_stops_is_answered(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, bus.request(CLERK, Park(), T), answers)
        await wait_all_tasks_blocked()
        await supervisor.stop()
    assert [type(answer) for answer in answers] == [CacheClosed]


async def test_a_request_is_answered_by_its_deadline(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    with anyio.fail_after(T), pytest.raises(CacheTimeoutError, match=r"test\.clerk: no answer within 0\.05 s"):
        await bus.request(CLERK, Park(), 0.05)


async def test_a_request_without_time_is_not_worked_on(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    for timeout in (0.0, -1.0, float("nan")):
        with pytest.raises(CacheTimeoutError):
            await bus.request(CLERK, Plain(1), timeout)
    assert desk.handled == []


async def test_a_request_whose_budget_is_spent_in_the_mailbox_is_not_worked_on(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    cell = await supervisor.start(CLERK, lambda: Clerk(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, bus.request(CLERK, Slow(1), T), answers)
        await wait_all_tasks_blocked()
        port = ThreadPort()
        cell.post(Envelope(Plain(2), port, deadline=bus.clock.monotonic() - 0.001))
        desk.gate.set()
    reply = await anyio.to_thread.run_sync(port.wait, T)
    assert isinstance(reply, Failed)
    assert isinstance(reply.error(), CacheTimeoutError)
    assert desk.handled == [1]


# Crashes


async def test_the_mailbox_outlives_a_crash(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, bus.request(CLERK, Slow(1), T), answers)
        await wait_all_tasks_blocked()
        group.start_soon(outcome, bus.request(CLERK, Crash(), T), answers)
        await wait_all_tasks_blocked()
        for number in (2, 3):
            group.start_soon(outcome, bus.request(CLERK, Plain(number), T), answers)
            await wait_all_tasks_blocked()
        desk.gate.set()
    assert desk.lives == 2
    assert desk.handled == [1, 2, 3]
    assert sorted(answer.value for answer in answers if isinstance(answer, Number)) == [1, 2, 3]


async def test_an_idempotent_request_is_handed_to_the_next_life_once(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    desk.crashes_left = 1
    assert await bus.request(CLERK, Again(7), T) == Number(7)
    assert desk.lives == 2
    desk.crashes_left = 2
    with pytest.raises(ActorFailed):
        await bus.request(CLERK, Again(8), T)
    assert await bus.request(CLERK, Again(9), T) == Number(9)
    assert desk.handled == [7, 9]


async def test_a_request_that_is_not_idempotent_is_never_done_twice(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    with pytest.raises(ActorFailed):
        await bus.request(CLERK, Crash(), T)
    await bus.request(CLERK, Plain(1), T)
    assert desk.lives == 2


async def test_a_thread_whose_request_crashes_the_actor_is_answered_too(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    desk.crashes_left = 1
    reply = await anyio.to_thread.run_sync(lambda: bus.request_blocking(CLERK, Again(5), T))
    assert reply == Number(5)


async def test_a_keyboard_interrupt_in_a_turn_is_its_callers_and_a_new_life_begins(bus: LocalBus, desk: Desk) -> None:
    async with Supervisor(bus) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        with pytest.raises(KeyboardInterrupt):
            await bus.request(CLERK, Interrupt(), T)
        assert await bus.request(CLERK, Plain(1), T) == Number(1)
    assert desk.lives == 2


# Stopping


async def test_stopping_answers_the_mailbox_first(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, bus.request(CLERK, Slow(0), T), answers)
        await wait_all_tasks_blocked()
        for number in range(1, 101):
            group.start_soon(outcome, bus.request(CLERK, Plain(number), T), answers)
        await wait_all_tasks_blocked()
        group.start_soon(supervisor.stop)
        await wait_all_tasks_blocked()
        late: list[Any] = []
        await outcome(bus.request(CLERK, Plain(101), T), late)
        assert [type(answer) for answer in late] == [CacheClosed]
        desk.gate.set()
    assert sorted(answer.value for answer in answers) == list(range(101))
    assert desk.stopped == 1


async def test_nobody_hangs_when_everything_is_cancelled(bus: LocalBus, desk: Desk, inline_turns: bool) -> None:
    answers: list[Any] = []
    async with anyio.create_task_group() as outer:
        with anyio.CancelScope() as scope:
            async with Supervisor(bus, inline_turns=inline_turns, grace=0.1) as supervisor:
                await supervisor.start(CLERK, lambda: Clerk(desk))
                outer.start_soon(outcome, bus.request(CLERK, Slow(1), T), answers)
                await wait_all_tasks_blocked()
                outer.start_soon(outcome, bus.request(CLERK, Plain(2), T), answers)
                await wait_all_tasks_blocked()
                scope.cancel()
                await anyio.sleep_forever()
    assert [type(answer) for answer in answers] == [CacheClosed, CacheClosed]


async def test_what_does_not_end_within_the_grace_is_answered_all_the_same(
    bus: LocalBus, desk: Desk, inline_turns: bool
) -> None:
    answers: list[Any] = []
    async with (
        anyio.create_task_group() as outer,
        Supervisor(bus, inline_turns=inline_turns, grace=0.05) as supervisor,
    ):
        await supervisor.start(CLERK, lambda: Clerk(desk))
        outer.start_soon(outcome, bus.request(CLERK, Slow(1), T), answers)
        await wait_all_tasks_blocked()
    assert [type(answer) for answer in answers] == [CacheClosed]


# Bounds


async def test_a_full_mailbox_turns_requests_away_and_takes_invalidations(
    bus: LocalBus, desk: Desk, inline_turns: bool
) -> None:
    answers: list[Any] = []
    async with Supervisor(bus, inline_turns=inline_turns, capacity=2) as supervisor:
        cell: Cell = await supervisor.start(CLERK, lambda: Clerk(desk))
        async with anyio.create_task_group() as group:
            group.start_soon(outcome, bus.request(CLERK, Slow(0), T), answers)
            await wait_all_tasks_blocked()
            for number in (1, 2):
                group.start_soon(outcome, bus.request(CLERK, Plain(number), T), answers)
                await wait_all_tasks_blocked()
            with pytest.raises(Overloaded) as caught:
                await bus.request(CLERK, Plain(3), T)
            assert (caught.value.address, caught.value.capacity) == (CLERK, 2)
            group.start_soon(outcome, bus.request(CLERK, Drop(4), T), answers)
            await wait_all_tasks_blocked()
            desk.gate.set()
    assert desk.handled == [0, 1, 2, 4]
    assert cell.overloaded == 1


# Cancellation


@pytest.mark.parametrize(("kind", "expected"), [(Plain, [1]), (Drop, [1, 2])], ids=["a request", "an invalidation"])
async def test_what_a_cancelled_caller_asked_for_is_only_done_if_it_invalidates(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, kind: Callable[[int], Any], expected: list[int]
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, bus.request(CLERK, Slow(1), T), answers)
        await wait_all_tasks_blocked()
        async with anyio.create_task_group() as doomed:
            doomed.start_soon(outcome, bus.request(CLERK, kind(2), T), answers)
            await wait_all_tasks_blocked()
            doomed.cancel_scope.cancel()
        desk.gate.set()
    await bus.request(CLERK, Plain(9), T)
    assert desk.handled == [*expected, 9]


@pytest.mark.parametrize("request_", [Plain(1), Again(1), Slow(1), Park(), Refuse(), Crash(), Strange()], ids=repr)
async def test_cancelling_a_caller_at_any_await_leaves_the_actor_usable(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, request_: Any
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    for checkpoints in range(6):
        async with anyio.create_task_group() as doomed:
            doomed.start_soon(outcome, bus.request(CLERK, request_, T), [])
            for _ in range(checkpoints):
                await anyio.lowlevel.checkpoint()
            doomed.cancel_scope.cancel()
        if isinstance(request_, Crash) and checkpoints >= 4:
            break  # After five crashes in a row, the supervisor would give up.
    desk.gate.set()
    with anyio.fail_after(T):
        assert await bus.request(CLERK, Plain(5), T) == Number(5)
        assert await bus.request(CLERK, Slow(6), T) == Number(6)


# Batches


async def test_what_arrives_during_a_turn_is_the_next_batch(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Porter(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, bus.request(CLERK, Batched(0), T), answers)
        await wait_all_tasks_blocked()
        for number in range(1, 8):
            group.start_soon(outcome, bus.request(CLERK, Batched(number), T), answers)
            await wait_all_tasks_blocked()
        desk.gate.set()
    assert desk.batches == [1, 4, 3]
    assert desk.handled == list(range(8))
    assert sorted(answer.value for answer in answers) == list(range(8))


async def test_a_batch_is_bounded_by_bytes(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Porter(desk))
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, bus.request(CLERK, Batched(0), T), [])
        await wait_all_tasks_blocked()
        for number, size in enumerate((600, 600, 10, 10), start=1):
            group.start_soon(outcome, bus.request(CLERK, Batched(number, b"x" * size), T), [])
            await wait_all_tasks_blocked()
        desk.gate.set()
    assert desk.batches == [1, 2, 2]
    assert desk.handled == [0, 1, 2, 3, 4]


async def test_a_batch_keeps_its_place_among_plain_messages(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Porter(desk))
    async with anyio.create_task_group() as group:
        for number, kind in enumerate((Batched, Batched, Plain, Batched)):
            group.start_soon(outcome, bus.request(CLERK, kind(number), T), [])
            await wait_all_tasks_blocked()
        desk.gate.set()
    assert desk.handled == [0, 1, 2, 3]
    assert desk.batches == [1, 1, 1]


async def test_a_batch_with_the_wrong_number_of_replies_is_a_crash_and_answered(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Porter(desk))
    desk.gate.set()
    desk.crashes_left = 1
    with pytest.raises(ActorFailed):
        await bus.request(CLERK, Batched(1), T)
    assert await bus.request(CLERK, Batched(2), T) == Number(2)


async def test_an_error_of_a_batch_answers_all_of_it(bus: LocalBus, supervisor: Supervisor, desk: Desk) -> None:
    await supervisor.start(CLERK, lambda: Porter(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(outcome, bus.request(CLERK, Batched(0), T), answers)
        await wait_all_tasks_blocked()
        for number in (1, -2):
            group.start_soon(outcome, bus.request(CLERK, Batched(number), T), answers)
            await wait_all_tasks_blocked()
        desk.gate.set()
    assert sorted(type(answer).__name__ for answer in answers) == ["CacheKeyError", "CacheKeyError", "Number"]


def test_threads_without_a_loop_are_never_in_each_others_turn() -> None:
    """Run sixteen threads on one plain actor whose loop does not run. The threads serve each other."""
    from cachebus.bus import Emitter

    bus = LocalBus("test")
    desk = Desk()
    cell = Cell(CLERK, Emitter(bus), bus.clock)
    clerk = Clerk(desk)
    clerk.ctx = cell
    cell._inline.update(clerk.handlers().plain)
    bus.serve(CLERK, cell)

    def send() -> None:
        for number in range(500):
            assert bus.request_blocking(CLERK, Plain(number), T) == Number(number)

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(desk.handled) == 16 * 500
    assert desk.overlaps == 0


# Parked requests, garbage, and requests at unusual moments


async def test_what_is_parked_when_the_actor_crashes_is_answered(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    answers: list[Any] = []
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(outcome, bus.request(CLERK, Park(), T), answers)
        await wait_all_tasks_blocked()
        await outcome(bus.request(CLERK, Crash(), T), answers)
    assert [type(answer) for answer in answers] == [ActorFailed] * 4
    assert await bus.request(CLERK, Unpark(), T) == Number(0)


@pytest.mark.parametrize("garbage", ["text", None, object(), Missing()], ids=lambda each: type(each).__name__)
async def test_what_is_no_request_is_a_bad_message_and_no_crash(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, garbage: Any
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    with pytest.raises(BadMessage, match=r"Clerk at test\.clerk has no handler for " + type(garbage).__name__):
        await bus.request(CLERK, garbage, T)
    with bus.subscribe(DeadLetter) as letters:
        bus.send(CLERK, garbage)
        with anyio.fail_after(T):
            letter = await anext(letters)
    assert isinstance(letter, DeadLetter)
    assert "has no handler for" in letter.reason
    assert await bus.request(CLERK, Plain(1), T) == Number(1)
    assert desk.lives == 1


async def test_who_asks_while_everything_is_cancelled_is_told_at_once(
    bus: LocalBus, desk: Desk, inline_turns: bool
) -> None:
    answers: list[Any] = []
    with anyio.CancelScope() as scope:
        async with Supervisor(bus, inline_turns=inline_turns) as supervisor:
            await supervisor.start(CLERK, lambda: Clerk(desk))
            try:
                scope.cancel()
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await wait_all_tasks_blocked()
                    await outcome(bus.request(CLERK, Plain(1), T), answers)
    assert [type(answer) for answer in answers] == [CacheClosed]
    with pytest.raises(NoSuchActor):
        bus.recipient(CLERK)


async def test_threads_that_ask_while_the_actor_stops_are_all_answered(
    bus: LocalBus, desk: Desk, inline_turns: bool
) -> None:
    outcomes: list[type[Any]] = []

    def ask() -> None:
        while True:
            try:
                outcomes.append(type(bus.request_blocking(CLERK, Plain(1), T)))
            except CacheError as error:
                outcomes.append(type(error))
                return

    async with anyio.create_task_group() as group, Supervisor(bus, inline_turns=inline_turns) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        for _ in range(8):
            group.start_soon(anyio.to_thread.run_sync, ask)
        while len(desk.handled) < 100:
            await anyio.lowlevel.checkpoint()
    assert set(outcomes) <= {Number, CacheClosed, NoSuchActor}
    assert len(desk.handled) == outcomes.count(Number)
    assert len(outcomes) - outcomes.count(Number) == 8


async def test_threads_that_ask_while_the_actor_crashes_are_all_answered_once(
    bus: LocalBus, desk: Desk, inline_turns: bool
) -> None:
    answers: list[Any] = []

    def ask(base: int) -> None:
        for number in range(base, base + 100):
            try:
                kind = Crash() if number % 50 == 7 else Again(number) if number % 2 else Plain(number)
                answers.append(bus.request_blocking(CLERK, kind, T))
            except ActorFailed as error:
                answers.append(error)

    patient = RestartPolicy(max_restarts=100, backoff=1e-9)
    async with (
        Supervisor(bus, inline_turns=inline_turns, policy=patient) as supervisor,
        anyio.create_task_group() as group,
    ):
        await supervisor.start(CLERK, lambda: Clerk(desk))
        for base in range(0, 800, 100):
            group.start_soon(anyio.to_thread.run_sync, ask, base)
    assert len(answers) == 800
    assert sum(isinstance(answer, ActorFailed) for answer in answers) == 16
    assert sorted(desk.handled) == [number for number in range(800) if number % 50 != 7]
    assert desk.overlaps == 0
    assert (desk.lives, desk.stopped) == (17, 17)


async def test_a_full_mailbox_takes_what_the_actor_sends_itself(bus: LocalBus, desk: Desk, inline_turns: bool) -> None:
    async with Supervisor(bus, inline_turns=inline_turns, capacity=1) as supervisor:
        cell = await supervisor.start(CLERK, lambda: Clerk(desk))
        async with anyio.create_task_group() as group:
            for message in (Slow(0), Plain(1)):
                group.start_soon(bus.request, CLERK, message, T)
                await wait_all_tasks_blocked()
            cell.send_after(0.0, Plain(2))
            await wait_all_tasks_blocked()
            desk.gate.set()
    assert desk.handled == [0, 1, 2]


# Rare interleavings, forced


async def test_a_plain_request_does_not_overtake_what_its_sender_told_a_handler_that_waits(
    bus: LocalBus, supervisor: Supervisor, desk: Desk
) -> None:
    await supervisor.start(CLERK, lambda: Clerk(desk))
    desk.gate.set()
    for number in range(0, 20, 2):
        bus.send(CLERK, Slow(number))  # The turn is free, and this message waits for the actor's task.
        assert await bus.request(CLERK, Plain(number + 1), T) == Number(number + 1)
    assert desk.handled == list(range(20))


class Turn(list[Any]):
    """Token that calls `meanwhile` just before it is returned, as another thread might."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def append(self, token: object) -> None:
        self.meanwhile()
        super().append(token)


@pytest.mark.parametrize("first", [Plain(1), Slow(1), Again(1)], ids=repr)
@pytest.mark.parametrize("second", [Plain(2), Slow(2)], ids=repr)
async def test_what_is_posted_as_the_turn_is_given_back_is_not_overlooked(
    bus: LocalBus, supervisor: Supervisor, desk: Desk, first: Any, second: Any
) -> None:
    cell = await supervisor.start(CLERK, lambda: Clerk(desk))
    await wait_all_tasks_blocked()
    desk.gate.set()
    cell._turn.free = turn = Turn(cell._turn.free)
    posted: list[Envelope] = []

    def post_the_second() -> None:
        if desk.handled and not posted:
            posted.append(Envelope(second, port))
            cell.post(posted[0])

    port = open_port()
    turn.meanwhile = post_the_second
    assert await bus.request(CLERK, first, T) == Number(1)
    assert await port.wait(T, lambda: "overlooked") == Number(2)
    assert desk.handled == [1, 2]


async def test_an_actor_with_much_to_do_lets_other_tasks_run(bus: LocalBus, desk: Desk) -> None:
    seen: set[int] = set()
    async with Supervisor(bus, inline_turns=False) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        for number in range(2000):
            bus.send(CLERK, Plain(number))
        while len(desk.handled) < 2000:
            seen.add(len(desk.handled))
            await anyio.lowlevel.checkpoint()
    assert len(seen) >= 5
