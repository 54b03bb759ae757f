"""Supervision: incarnations, pauses between them, giving up, and the events about it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections.abc import AsyncIterator

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from cachebus.actors import Actor, RestartPolicy, Supervisor
from cachebus.bus import Address, LocalBus
from cachebus.messages import (
    ActorFailed,
    ActorGaveUp,
    ActorRestarted,
    ActorStarted,
    ActorStopped,
    AddressInUse,
    CacheClosed,
    CacheConnectionError,
    Event,
    NoSuchActor,
)

from ...clock import ManualClock
from ..conftest import CLERK
from ..samples import Again, Clerk, Crash, Desk, Number, Plain, Slow

pytestmark = pytest.mark.anyio
T = 20.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def bus(clock: ManualClock) -> AsyncIterator[LocalBus]:
    bus = LocalBus("test", clock=clock)
    yield bus
    bus.close()


async def crash(bus: LocalBus) -> None:
    with pytest.raises(ActorFailed):
        await bus.request(CLERK, Crash(), T)


async def test_the_first_restart_is_at_once_and_the_next_ones_wait(
    bus: LocalBus, clock: ManualClock, desk: Desk
) -> None:
    policy = RestartPolicy(max_restarts=5, window=100.0, backoff=8.0, backoff_max=100.0)
    async with Supervisor(bus, policy=policy, seed=3) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        await crash(bus)
        assert await bus.request(CLERK, Plain(1), T) == Number(1)
        assert desk.lives == 2
        await crash(bus)
        await wait_all_tasks_blocked()
        assert desk.lives == 2
        clock.advance(8.0)
        assert await bus.request(CLERK, Plain(2), T) == Number(2)
        assert desk.lives == 3


def test_the_pause_doubles_is_jittered_and_has_a_bound() -> None:
    policy = RestartPolicy(backoff=1.0, backoff_max=6.0)
    chance = random.Random(5)
    assert policy.pause(1, chance) == 0.0
    for crashes, bound in ((2, 1.0), (3, 2.0), (4, 4.0), (5, 6.0), (50, 6.0)):
        pauses = [policy.pause(crashes, chance) for _ in range(500)]
        assert max(pauses) <= bound
        assert max(pauses) > bound * 0.9
        assert min(pauses) < bound * 0.1


async def test_an_actor_that_crashes_too_often_stays_down_and_its_mail_is_answered(
    bus: LocalBus, clock: ManualClock, desk: Desk
) -> None:
    policy = RestartPolicy(max_restarts=2, window=10.0, backoff=1e-9)
    async with Supervisor(bus, policy=policy) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        with bus.subscribe(ActorGaveUp) as events:
            for _ in range(3):
                await crash(bus)
                clock.advance(0.01)
            event = await anext(events)
        assert (event.address, event.reason, event.restarts) == (CLERK, "RuntimeError", 2)  # type: ignore[attr-defined]
        assert desk.lives == 3
        with pytest.raises(ActorFailed, match="3 crashes"):
            await bus.request(CLERK, Plain(1), T)
    assert desk.stopped == 3


async def test_crashes_that_lie_apart_are_no_reason_to_give_up(bus: LocalBus, clock: ManualClock, desk: Desk) -> None:
    async with Supervisor(bus, policy=RestartPolicy(max_restarts=1, window=10.0)) as supervisor:
        cell = await supervisor.start(CLERK, lambda: Clerk(desk))
        for _ in range(5):
            await crash(bus)
            await wait_all_tasks_blocked()
            clock.advance(11.0)
        assert await bus.request(CLERK, Plain(1), T) == Number(1)
        assert desk.lives == 6
        assert cell.restarts == 5


async def test_each_life_is_told_and_has_an_epoch_of_its_own(bus: LocalBus, desk: Desk) -> None:
    heard: list[Event] = []
    with bus.subscribe("actor_*") as events:
        async with Supervisor(bus) as supervisor:
            await supervisor.start(CLERK, lambda: Clerk(desk), backend="primary")
            await crash(bus)
            await bus.request(CLERK, Plain(1), T)
        events.close()
        heard = [event async for event in events]
    assert [type(event) for event in heard] == [ActorStarted, ActorRestarted, ActorStopped]
    started, restarted, stopped = heard
    assert {event.backend for event in heard} == {"primary"}
    assert {event.namespace for event in heard} == {"test"}
    assert len({event.id for event in heard}) == 3
    assert started.epoch < restarted.epoch == stopped.epoch
    assert [event.seq for event in heard] == [1, 1, 2]
    assert isinstance(restarted, ActorRestarted)
    assert (restarted.reason, restarted.restarts) == ("RuntimeError", 1)


async def test_a_first_start_that_fails_is_the_callers_error_and_frees_the_address(bus: LocalBus, desk: Desk) -> None:
    class Unreachable(Clerk):
        async def on_start(self) -> None:
            raise CacheConnectionError("refused", "primary")

    async with Supervisor(bus) as supervisor:
        with pytest.raises(CacheConnectionError, match="refused"):
            await supervisor.start(CLERK, lambda: Unreachable(desk))
        with pytest.raises(NoSuchActor):
            await bus.request(CLERK, Plain(1), T)
        await supervisor.start(CLERK, lambda: Clerk(desk))
        assert await bus.request(CLERK, Plain(1), T) == Number(1)
    assert desk.stopped == 2


async def test_a_restart_that_fails_counts_as_a_crash(bus: LocalBus, clock: ManualClock, desk: Desk) -> None:
    class Fragile(Clerk):
        async def on_start(self) -> None:
            if desk.lives in (2, 3):
                raise CacheConnectionError("refused", "primary")

    async with Supervisor(bus, policy=RestartPolicy(backoff=1e-9, window=1e9)) as supervisor:
        cell = await supervisor.start(CLERK, lambda: Fragile(desk))
        desk.crashes_left = 1
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await bus.request(CLERK, Again(7), T))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            while not answers:
                await wait_all_tasks_blocked()
                clock.advance(0.001)
        assert answers == [Number(7)]
        assert desk.lives == 4
        assert cell.restarts == 3


async def test_a_factory_that_fails_is_a_crash_like_any_other(bus: LocalBus, clock: ManualClock, desk: Desk) -> None:
    def make() -> Actor:
        if desk.lives == 1:
            desk.lives += 1
            raise RuntimeError("no memory")
        return Clerk(desk)

    async with Supervisor(bus, policy=RestartPolicy(backoff=1e-9)) as supervisor:
        await supervisor.start(CLERK, make)
        await crash(bus)
        async with anyio.create_task_group() as group:
            group.start_soon(_pass_time, clock)
            assert await bus.request(CLERK, Plain(1), T) == Number(1)
            group.cancel_scope.cancel()


async def _pass_time(clock: ManualClock) -> None:
    while True:
        await anyio.lowlevel.checkpoint()
        clock.advance(0.001)


async def test_an_actor_that_will_not_stop_is_left_after_the_grace(bus: LocalBus, desk: Desk) -> None:
    class Stubborn(Clerk):
        async def on_stop(self) -> None:
            await anyio.sleep_forever()

    with anyio.fail_after(T):
        async with Supervisor(bus, grace=0.05) as supervisor:
            await supervisor.start(CLERK, lambda: Stubborn(desk))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), CacheConnectionError("gone", "primary")], ids=repr)
async def test_an_actor_that_fails_to_stop_is_logged_and_left(
    bus: LocalBus, desk: Desk, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    class Clumsy(Clerk):
        async def on_stop(self) -> None:
            raise error

    with caplog.at_level(logging.WARNING):
        async with Supervisor(bus) as supervisor:
            await supervisor.start(CLERK, lambda: Clumsy(desk))
    assert "did not stop cleanly" in caplog.text


async def test_stopping_does_not_wait_for_the_pause_before_a_restart(bus: LocalBus, desk: Desk) -> None:
    with anyio.fail_after(T):
        async with Supervisor(bus, policy=RestartPolicy(backoff=1e6, backoff_max=1e6), grace=T * 2) as supervisor:
            await supervisor.start(CLERK, lambda: Clerk(desk))
            await crash(bus)
            await bus.request(CLERK, Plain(1), T)
            await crash(bus)
            await wait_all_tasks_blocked()
    assert desk.lives == 2


async def test_one_address_has_one_actor(bus: LocalBus, desk: Desk) -> None:
    async with Supervisor(bus) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        with pytest.raises(AddressInUse, match=r"test\.clerk"):
            await supervisor.start(CLERK, lambda: Clerk(desk))
        assert await bus.request(CLERK, Plain(1), T) == Number(1)


async def test_a_crash_of_one_actor_is_no_concern_of_another(bus: LocalBus, desk: Desk) -> None:
    other, theirs = Address("test.other"), Desk()
    async with Supervisor(bus) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        await supervisor.start(other, lambda: Clerk(theirs))
        await crash(bus)
        assert await bus.request(other, Plain(1), T) == Number(1)
    assert (desk.lives, theirs.lives) == (2, 1)


async def test_a_supervisor_that_is_not_open_says_so(bus: LocalBus, desk: Desk) -> None:
    with pytest.raises(CacheClosed, match="async with"):
        await Supervisor(bus).start(CLERK, lambda: Clerk(desk))


async def test_a_crash_is_logged_with_its_traceback(
    bus: LocalBus, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    async with Supervisor(bus) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        await crash(bus)
        await bus.request(CLERK, Plain(1), T)
    assert "actor test.clerk crashed" in caplog.text
    assert "on_crash" in caplog.text


async def test_a_class_whose_handlers_are_wrong_is_its_starters_error_and_no_crash(bus: LocalBus) -> None:
    class Undecided(Actor):
        def on_one(self, request: Plain) -> Number:
            raise NotImplementedError

        def on_two(self, request: Plain) -> Number:
            raise NotImplementedError

    with bus.subscribe("actor_*") as events:
        async with Supervisor(bus) as supervisor:
            with pytest.raises(TypeError, match="two handlers for Plain"):
                await supervisor.start(CLERK, Undecided)
            with pytest.raises(NoSuchActor):
                bus.recipient(CLERK)
        assert len(events) == 0


@pytest.mark.parametrize("window", [0.0, 1e-9, 1e9])
async def test_a_window_of_any_length_lets_an_actor_begin_anew(bus: LocalBus, desk: Desk, window: float) -> None:
    async with Supervisor(bus, policy=RestartPolicy(window=window)) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        await crash(bus)
        assert await bus.request(CLERK, Plain(1), T) == Number(1)


async def test_a_crash_counts_until_the_window_has_passed(bus: LocalBus, clock: ManualClock, desk: Desk) -> None:
    async with Supervisor(bus, policy=RestartPolicy(max_restarts=1, window=10.0)) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))
        await crash(bus)
        assert await bus.request(CLERK, Plain(1), T) == Number(1)
        clock.advance(9.999)
        await crash(bus)
        with pytest.raises(ActorFailed, match="2 crashes"):
            await bus.request(CLERK, Plain(2), T)


def test_the_pause_after_very_many_crashes_is_still_a_number() -> None:
    assert 0.0 <= RestartPolicy().pause(10**6, random.Random(1)) <= 5.0


async def test_an_actor_that_is_stopped_alone_and_does_not_end_is_left_and_its_request_answered(
    bus: LocalBus, desk: Desk
) -> None:
    answers: list[object] = []
    async with Supervisor(bus, grace=0.05) as supervisor, anyio.create_task_group() as group:
        await supervisor.start(CLERK, lambda: Clerk(desk))

        async def ask() -> None:
            with pytest.raises(CacheClosed) as caught:
                await bus.request(CLERK, Slow(1), T)
            answers.append(caught.value)

        group.start_soon(ask)
        await wait_all_tasks_blocked()
        await supervisor.stop(CLERK)
        await wait_all_tasks_blocked()
        assert len(answers) == 1
        assert desk.stopped == 1
        await supervisor.start(CLERK, lambda: Clerk(desk))
        assert await bus.request(CLERK, Plain(2), T) == Number(2)
    assert desk.handled == [2]
    assert desk.stopped == 2


async def test_two_who_stop_an_actor_leave_its_successor_alone(bus: LocalBus, desk: Desk) -> None:
    async with Supervisor(bus) as supervisor:
        await supervisor.start(CLERK, lambda: Clerk(desk))

        async def replace() -> None:
            await supervisor.stop(CLERK)
            await supervisor.start(CLERK, lambda: Clerk(desk))

        async with anyio.create_task_group() as group:
            group.start_soon(replace)
            group.start_soon(supervisor.stop, CLERK)
        assert await bus.request(CLERK, Plain(1), T) == Number(1)
    assert desk.stopped == desk.lives == 2


async def test_each_life_is_stopped_once_however_it_ended(bus: LocalBus, desk: Desk) -> None:
    stopped: list[int] = []

    class Numbered(Clerk):
        def __init__(self, desk: Desk) -> None:
            super().__init__(desk)
            self.life = desk.lives

        async def on_stop(self) -> None:
            stopped.append(self.life)

    async with Supervisor(bus) as supervisor:
        await supervisor.start(CLERK, lambda: Numbered(desk))
        await crash(bus)
        assert await bus.request(CLERK, Plain(1), T) == Number(1)
        assert stopped == [1]
    assert stopped == [1, 2]


async def test_one_that_hangs_does_not_keep_the_others_from_stopping_in_order(bus: LocalBus, desk: Desk) -> None:
    hanging = Desk()
    with bus.subscribe(ActorStopped) as events:
        async with anyio.create_task_group() as group, Supervisor(bus, grace=0.05) as supervisor:
            await supervisor.start(CLERK, lambda: Clerk(desk))
            await supervisor.start(Address("test.hanging"), lambda: Clerk(hanging))
            group.start_soon(_ask_in_vain, bus, Address("test.hanging"))
            await wait_all_tasks_blocked()
        assert [event.address for event in [events.next(0.0)] if isinstance(event, ActorStopped)] == [CLERK]


async def _ask_in_vain(bus: LocalBus, address: Address) -> None:
    with pytest.raises(CacheClosed):
        await bus.request(address, Slow(1), T)


async def test_the_last_started_is_stopped_first(bus: LocalBus, desk: Desk) -> None:
    stopped: list[str] = []

    class Noting(Clerk):
        async def on_stop(self) -> None:
            stopped.append(self.ctx.address)

    async with Supervisor(bus) as supervisor:
        for name in ("first", "second", "third"):
            await supervisor.start(Address(f"test.{name}"), lambda: Noting(desk))
    assert stopped == ["test.third", "test.second", "test.first"]


async def test_stopping_an_actor_ends_its_alarms(bus: LocalBus, clock: ManualClock, desk: Desk) -> None:
    async with Supervisor(bus) as supervisor:
        cell = await supervisor.start(CLERK, lambda: Clerk(desk))
        cell.send_after(100.0, Plain(1))
        await wait_all_tasks_blocked()
        assert clock.sleepers == 1
        await supervisor.stop(CLERK)
        await wait_all_tasks_blocked()
        assert clock.sleepers == 0
        clock.advance(200.0)
    assert desk.handled == []


def test_work_beside_the_turns_may_be_asked_for_from_a_callback_of_the_loop() -> None:
    # A separate loop, because pytest's loop sets the current async library for every callback.
    async def main() -> None:
        async with Supervisor(LocalBus("test")) as supervisor:
            cell = await supervisor.start(CLERK, Plainly)
            done = asyncio.Event()

            async def work() -> None:
                await anyio.sleep(0.001)
                done.set()

            asyncio.get_running_loop().call_soon(cell.start_soon, work, context=contextvars.Context())
            async with asyncio.timeout(30):
                await done.wait()

    asyncio.run(main())


class Plainly(Actor):
    def on_plain(self, request: Plain) -> Number:
        return Number(request.value)
