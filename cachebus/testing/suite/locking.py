"""Tests of locks: mutual exclusion, first-come-first-served queues, growing fencing tokens, and expiry."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import anyio
import pytest

from cachebus.actors import LockManager, LockStore, Supervisor
from cachebus.bus import SYSTEM_CLOCK, Clock, LocalBus, running_timers
from cachebus.client.lock_client import LOCKS, LockClient
from cachebus.client.validation import LONGEST
from cachebus.facade.locks import Lock
from cachebus.messages import (
    AcquireLock,
    BadMessage,
    CacheKeyError,
    DescribeLock,
    LockDenied,
    LockFree,
    LockGranted,
    LockInfo,
    LockNotAcquired,
    LockNotHeld,
    LockNotOwned,
    NotHeld,
    Released,
    ReleaseLock,
    Renewed,
    RenewLock,
)

LONG = 60.0
ODD_NAMES = (
    "a",
    "with space",
    "with\nline\r\nend",
    "ü☕",
    "{",
    "}",
    "{a}b",
    "a}b{c",
    "|",
    "a|b",
    "\x00",
    "x" * 5000,
    "*",
    ":",
)


@asynccontextmanager
async def managed(store: LockStore, clock: Clock = SYSTEM_CLOCK) -> AsyncGenerator[LockClient]:
    """Run a lock manager for a store on a separate bus, and yield a client for it."""
    bus = LocalBus(clock=clock)
    async with Supervisor(bus) as supervisor:
        await supervisor.start(LOCKS, lambda: LockManager(store))
        timers = running_timers(clock)
        try:
            yield LockClient(bus, LOCKS, 5.0, timers)
        finally:
            timers.close()


class LockConformance:
    """Fixtures and tests of the suite. See `cachebus.testing.locks.LockStoreConformance`."""

    pytestmark = pytest.mark.anyio

    short_ttl: ClassVar[float] = 0.2
    """Time to live, in seconds, of locks that expire during a test."""

    lag: ClassVar[float] = 0.5
    """Maximum time, in seconds, from the expiry of a lock until it can be acquired."""

    @pytest.fixture
    def store(self) -> LockStore:
        """Provide the store to test, not yet open. Override it."""
        raise NotImplementedError("a subclass of LockStoreConformance provides the fixture `store`")

    @pytest.fixture
    def sibling(self) -> LockStore:
        """Provide a second store on the same server, in the same namespace, like that of another process.

        Override it unless the locks are kept in the process.
        """
        pytest.skip("the store keeps its locks in the process")

    @pytest.fixture
    def neighbour(self) -> LockStore:
        """Provide a second store on the same server, in another namespace. Override it like `sibling`."""
        pytest.skip("the store keeps its locks in the process")

    @pytest.fixture
    def clock(self) -> Clock:
        """Provide the clock of the store. If you can move the clock, override this fixture and `elapse`."""
        return SYSTEM_CLOCK

    async def elapse(self, seconds: float) -> None:
        """Let time pass for the store."""
        await anyio.sleep(seconds)

    async def test_a_lock_has_one_holder_and_is_free_after_it(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            async with Lock(client, "a", owner="me") as lock:
                assert lock.held
                with pytest.raises(LockNotAcquired) as refused:
                    await Lock(client, "a", wait=0).acquire()
                assert refused.value.owner == "me"
                assert 0 < refused.value.remaining <= 30 + 1  # by the clock of the server
                async with Lock(client, "b", wait=0):
                    pass
            async with Lock(client, "a", wait=0) as after:
                assert after.token > lock.token

    async def test_the_holder_is_described(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            asking = Lock(client, "a")
            assert await asking.info() is None
            assert not await asking.is_locked()
            async with Lock(client, "a", owner="me | and you\n", ttl=LONG) as lock:
                info = await asking.info()
                assert isinstance(info, LockInfo)
                assert (info.owner, info.token) == ("me | and you\n", lock.token)
                assert LONG - 5 < info.remaining <= LONG + 1
                assert await asking.is_locked()
            assert not await asking.is_locked()

    async def test_waiters_get_the_lock_in_order(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            order: list[int] = []
            tokens: list[int] = []

            async def work(number: int) -> None:
                async with Lock(client, "a", wait=LONG) as lock:
                    order.append(number)
                    tokens.append(lock.token)
                    await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as tasks, Lock(client, "a"):
                for number in range(10):
                    tasks.start_soon(work, number, name=f"worker {number}")
                    await anyio.wait_all_tasks_blocked()
            assert order == list(range(10))
            assert tokens == sorted(set(tokens))

    async def test_whose_time_is_up_has_lost_it(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            first = await Lock(client, "a", ttl=self.short_ttl, renew=False).acquire()
            assert not first.lost
            await self.elapse(self.short_ttl + self.lag)
            assert first.lost
            assert not first.held
            with pytest.raises(LockNotHeld):
                first.check()
            second = await Lock(client, "a", wait=self.lag + 2).acquire()
            assert second.token > first.token
            with pytest.raises(LockNotHeld):
                await first.extend()
            with pytest.raises(LockNotHeld):
                await first.release()
            assert second.held
            assert await second.is_locked()
            await second.release()

    async def test_a_lock_is_released_once_and_only_by_its_holder(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            lock = await Lock(client, "a").acquire()
            with pytest.raises(LockNotOwned):
                await client.ask(ReleaseLock("a", "of-another-caller"))
            with pytest.raises(LockNotOwned):
                await client.ask(RenewLock("a", "of-another-caller", 1.0))
            assert lock.held
            await lock.release()
            with pytest.raises(LockNotHeld):
                await lock.release()
            with pytest.raises(LockNotHeld):
                await lock.extend()
            assert isinstance(await client.ask(ReleaseLock("a", "of-another-caller")), NotHeld)
            assert isinstance(await client.ask(RenewLock("a", "of-another-caller", 1.0)), NotHeld)

    async def test_what_is_extended_is_held_for_longer(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            lock = await Lock(client, "a", ttl=self.short_ttl * 2, renew=False).acquire()
            await lock.extend(LONG)
            await self.elapse(self.short_ttl * 2 + self.lag)
            assert lock.held
            info = await lock.info()
            assert info is not None
            assert info.remaining > LONG - 20
            await lock.release()

    @pytest.mark.parametrize("ttl", [31 * 86_400.0, LONGEST])
    async def test_a_lock_that_is_held_for_years_has_one_holder(
        self, store: LockStore, clock: Clock, ttl: float
    ) -> None:
        async with managed(store, clock) as client:
            assert isinstance(await client.ask(AcquireLock("a", "me", "t", ttl)), LockGranted)
            assert isinstance(await client.ask(AcquireLock("a", "you", "u", 1.0)), LockDenied)
            assert isinstance(await client.ask(RenewLock("a", "t", ttl)), Renewed)
            info = await client.ask(DescribeLock("a"))
            assert isinstance(info, LockInfo)
            assert ttl - 20 < info.remaining <= ttl + 1
            assert isinstance(await client.ask(ReleaseLock("a", "t")), Released)

    async def test_asking_twice_with_one_ticket_is_asking_once(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            ask = AcquireLock("a", "me", "ticket", LONG)
            first, second = await client.ask(ask), await client.ask(ask)
            assert isinstance(first, LockGranted)
            assert isinstance(second, LockGranted)
            assert isinstance(await client.ask(AcquireLock("a", "me", "another", LONG)), LockDenied)
            assert isinstance(await client.ask(RenewLock("a", "ticket", LONG)), Renewed)
            assert isinstance(await client.ask(ReleaseLock("a", "ticket")), Released)
            assert isinstance(await client.ask(DescribeLock("a")), LockFree)

    async def test_a_lock_can_be_released_twice_with_one_ticket(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            releases: list[ReleaseLock] = []
            for ticket in ("t1", "t2", "t3"):
                grant = await client.ask(AcquireLock("a", ticket, ticket, LONG))
                assert isinstance(grant, LockGranted)
                # Like a caller that repeats a release because the first reply was lost.
                for earlier in releases:
                    assert isinstance(await client.ask(earlier), Released)
                info = await client.ask(DescribeLock("a"))
                assert isinstance(info, LockInfo)
                assert info.owner == ticket
                releases.append(ReleaseLock("a", ticket, ticket, grant.token))
                for _ in range(2):
                    assert isinstance(await client.ask(releases[-1]), Released)

    async def test_a_holder_whose_lock_was_taken_gets_not_held(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            grant = await client.ask(AcquireLock("a", "me", "t1", LONG))
            assert isinstance(grant, LockGranted)
            by_another_caller = ReleaseLock("a", "t1")  # Without the fencing token.
            assert isinstance(await client.ask(by_another_caller), Released)
            assert isinstance(await client.ask(ReleaseLock("a", "t1", "me", grant.token)), NotHeld)

    async def test_a_lost_lock_cannot_be_released_the_second_time_either(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            lost = await client.ask(AcquireLock("a", "me", "t1", self.short_ttl))
            assert isinstance(lost, LockGranted)
            await self.elapse(self.short_ttl + self.lag)
            release = ReleaseLock("a", "t1", "me", lost.token)
            assert isinstance(await client.ask(release), NotHeld)
            assert isinstance(await client.ask(release), NotHeld)
            async with Lock(client, "a", wait=self.lag + 2):
                with pytest.raises(LockNotOwned):
                    await client.ask(release)
            assert isinstance(await client.ask(release), NotHeld)

    async def test_a_caller_that_stops_waiting_leaves_the_queue(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            lock = await Lock(client, "a", ttl=LONG).acquire()

            async def give_up() -> None:
                with anyio.CancelScope() as scope:
                    tasks.start_soon(_cancel_soon, scope)
                    await Lock(client, "a", wait=LONG).acquire()

            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(give_up)
            await lock.release()
            async with Lock(client, "a", wait=2):
                pass

    async def test_names_are_data(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            held = [await Lock(client, name, wait=0, owner=name[:9]).acquire() for name in ODD_NAMES]
            for name, lock in zip(ODD_NAMES, held, strict=True):
                info = await lock.info()
                assert info is not None
                assert info.owner == name[:9]
                await lock.release()

    async def test_a_waiter_of_an_odd_name_gets_it_too(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:

            async def wait(name: str) -> None:
                async with Lock(client, name, wait=LONG):
                    pass

            async with anyio.create_task_group() as tasks:
                held = [await Lock(client, name).acquire() for name in ODD_NAMES]
                for name in ODD_NAMES:
                    tasks.start_soon(wait, name)
                await anyio.wait_all_tasks_blocked()
                for lock in held:
                    await lock.release()

    async def test_nonsense_is_refused(self, store: LockStore, clock: Clock) -> None:
        async with managed(store, clock) as client:
            for ttl in (0.0, -1.0, math.nan, math.inf):
                with pytest.raises(BadMessage, match="ttl"):
                    await client.ask(AcquireLock("a", "me", "t", ttl))
                with pytest.raises(BadMessage, match="ttl"):
                    await client.ask(RenewLock("a", "t", ttl))
            for wait in (-1.0, math.nan, math.inf):
                with pytest.raises(BadMessage, match="wait"):
                    await client.ask(AcquireLock("a", "me", "t", 1.0, wait))
            for name in ("", "\ud800"):
                with pytest.raises(CacheKeyError):
                    await client.ask(DescribeLock(name))
            for ticket in ("", "a|b", "a\n", "x" * 256):
                with pytest.raises(BadMessage, match="ticket"):
                    await client.ask(ReleaseLock("a", ticket))
            with pytest.raises(BadMessage, match="owner"):
                await client.ask(AcquireLock("a", "\ud800", "t", 1.0))

    # Stores shared by several processes

    async def test_another_process_sees_the_same_lock(self, store: LockStore, sibling: LockStore) -> None:
        async with managed(store) as client, managed(sibling) as other:
            async with Lock(client, "a", owner="me") as lock:
                info = await Lock(other, "a").info()
                assert info is not None
                assert (info.owner, info.token) == ("me", lock.token)
                with pytest.raises(LockNotAcquired):
                    await Lock(other, "a", wait=0).acquire()
            async with Lock(other, "a", wait=0) as after:
                assert after.token > lock.token

    async def test_a_waiter_in_another_process_gets_the_lock(self, store: LockStore, sibling: LockStore) -> None:
        async with managed(store) as client, managed(sibling) as other:
            had: list[int] = []

            async def wait() -> None:
                async with Lock(other, "a", wait=LONG) as lock:
                    had.append(lock.token)

            lock = await Lock(client, "a").acquire()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.sleep(0.1)
                assert had == []
                await lock.release()
            assert had[0] > lock.token

    async def test_two_processes_never_hold_it_at_once(self, store: LockStore, sibling: LockStore) -> None:
        async with managed(store) as client, managed(sibling) as other:
            inside = 0
            tokens: list[int] = []

            async def work(client: LockClient) -> None:
                nonlocal inside
                for _ in range(5):
                    async with Lock(client, "a", wait=LONG) as lock:
                        inside += 1
                        assert inside == 1
                        tokens.append(lock.token)
                        await anyio.sleep(0.001)
                        inside -= 1

            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(work, client)
                    tasks.start_soon(work, other)
            assert tokens == sorted(set(tokens))
            assert len(tokens) == 40

    async def test_what_was_given_up_elsewhere_is_refused_when_it_is_asked_for(
        self, store: LockStore, sibling: LockStore
    ) -> None:
        async with managed(store) as client, managed(sibling) as other:
            await other.ask(ReleaseLock("a", "ticket", abandon=True))
            assert isinstance(await client.ask(AcquireLock("a", "me", "ticket", LONG)), LockDenied)
            assert isinstance(await client.ask(AcquireLock("a", "me", "another", LONG)), LockGranted)

    async def test_namespaces_have_locks_of_their_own(self, store: LockStore, neighbour: LockStore) -> None:
        async with managed(store) as client, managed(neighbour) as other, Lock(client, "a"), Lock(other, "a", wait=0):
            pass


async def _cancel_soon(scope: anyio.CancelScope) -> Any:
    await anyio.sleep(0.05)
    scope.cancel()
