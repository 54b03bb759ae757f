"""The lock manager over memory, without a bus: queues, wait limits and cancelled waiters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from cachebus.actors.locks.manager import KEPT, PARKED
from cachebus.messages import (
    AcquireLock,
    CacheConnectionError,
    DescribeLock,
    Failed,
    LockAcquired,
    LockDenied,
    LockExpired,
    LockFree,
    LockGranted,
    LockInfo,
    LockQueued,
    LockReleased,
    NotHeld,
    Released,
    ReleaseLock,
    Renewed,
    RenewLock,
)

from .harness import Caller, Managed

pytestmark = pytest.mark.anyio


@pytest.fixture
async def locks() -> AsyncIterator[Managed]:
    made = Managed()
    await made.start()
    yield made
    await made.manager.on_stop()


def want(ticket: str, *, ttl: float = 30.0, wait: float = 0.0, name: str = "a") -> AcquireLock:
    return AcquireLock(name, f"owner {ticket}", ticket, ttl, wait)


def token_of(caller: Caller) -> int:
    assert isinstance(caller.reply, LockGranted)
    return caller.reply.token


async def test_who_waits_gets_it_in_the_order_of_coming(locks: Managed) -> None:
    first = locks.ask(want("0"))
    waiting = [locks.ask(want(str(n), wait=60)) for n in range(1, 6)]
    tokens = [token_of(first)]
    for n, caller in enumerate(waiting):
        assert caller.reply is None
        assert isinstance(locks.ask(ReleaseLock("a", str(n))).reply, Released)
        tokens.append(token_of(caller))
    assert tokens == sorted(set(tokens))


async def test_a_lock_ends_when_its_time_is_up_and_not_before_and_the_next_one_gets_it(locks: Managed) -> None:
    locks.ask(want("0", ttl=5))
    waiting = locks.ask(want("1", wait=60))
    locks.advance(4.9)
    assert waiting.reply is None
    locks.advance(0.2)
    token_of(waiting)
    assert isinstance(locks.ask(RenewLock("a", "0", 5)).reply, Failed)


async def test_a_ticket_of_one_lock_is_not_that_of_another(locks: Managed) -> None:
    for name in ("a", "b"):
        locks.ask(want("0", name=name))
    waiting = {name: locks.ask(want("1", name=name, wait=60)) for name in ("a", "b")}
    behind = locks.ask(want("2", wait=60))
    locks.ask(ReleaseLock("b", "0"))
    token_of(waiting["b"])
    assert waiting["a"].reply is None
    locks.ask(ReleaseLock("a", "0"))
    token_of(waiting["a"])
    assert isinstance(locks.ask(ReleaseLock("a", "1")).reply, Released)
    token_of(behind)


async def test_a_renewed_lock_goes_on(locks: Managed) -> None:
    locks.ask(want("0", ttl=3))
    waiting = locks.ask(want("1", wait=60))
    for _ in range(2):
        locks.advance(2)
        assert isinstance(locks.ask(RenewLock("a", "0", 3)).reply, Renewed)
    assert waiting.reply is None
    locks.advance(3.1)
    token_of(waiting)


async def test_patience_ends_and_the_place_is_free(locks: Managed) -> None:
    locks.ask(want("0", ttl=30))
    impatient, patient = locks.ask(want("1", wait=2)), locks.ask(want("2", wait=9))
    locks.advance(2)
    assert isinstance(impatient.reply, LockDenied)
    assert impatient.reply.owner == "owner 0"
    assert impatient.reply.remaining == pytest.approx(28)
    locks.ask(ReleaseLock("a", "0"))
    token_of(patient)


async def test_who_waits_for_long_is_told_to_ask_again_and_keeps_its_place(locks: Managed) -> None:
    locks.ask(want("0", ttl=1000))
    first, second = locks.ask(want("1", wait=60)), locks.ask(want("2", wait=60))
    locks.advance(PARKED)
    assert isinstance(first.reply, LockQueued)
    assert isinstance(second.reply, LockQueued)
    second, first = locks.ask(want("2", wait=50)), locks.ask(want("1", wait=50))
    locks.ask(ReleaseLock("a", "0"))
    token_of(first)
    assert second.reply is None


async def test_who_does_not_ask_again_loses_its_place(locks: Managed) -> None:
    locks.ask(want("0", ttl=1000))
    locks.ask(want("1", wait=60))
    locks.advance(1)
    present = locks.ask(want("2", wait=60))
    locks.advance(PARKED)
    present = locks.ask(want("2", wait=50))
    locks.advance(KEPT)
    locks.ask(ReleaseLock("a", "0"))
    token_of(present)


async def test_a_lock_that_comes_between_two_questions_is_found_by_the_second(locks: Managed) -> None:
    locks.ask(want("0", ttl=1000))
    locks.ask(want("1", wait=60))
    locks.advance(PARKED)
    locks.ask(ReleaseLock("a", "0"))
    locks.advance(KEPT / 2)
    token_of(locks.ask(want("1", wait=50)))
    assert isinstance(locks.ask(want("2")).reply, LockDenied)


async def test_a_lock_that_nobody_asks_for_again_is_given_back(locks: Managed) -> None:
    locks.ask(want("0", ttl=1000))
    locks.ask(want("1", wait=60, ttl=1000))
    locks.advance(PARKED)
    locks.ask(ReleaseLock("a", "0"))
    assert isinstance(locks.ask(want("2")).reply, LockDenied)
    locks.advance(KEPT)
    token_of(locks.ask(want("3")))


async def test_whoever_went_away_while_waiting_gets_no_lock(locks: Managed) -> None:
    locks.ask(want("0", ttl=1000))
    gone = [locks.ask(want(f"gone {n}", wait=60)) for n in range(3000)]
    there = locks.ask(want("there", wait=60))
    for caller in gone:
        caller.gone = True
    locks.ask(ReleaseLock("a", "0"))
    token_of(there)
    assert all(caller.reply is None for caller in gone)


async def test_who_gives_up_leaves_the_queue_or_gives_back_what_it_does_not_know_of(locks: Managed) -> None:
    locks.ask(want("0"))
    first, second = locks.ask(want("1", wait=60)), locks.ask(want("2", wait=60))
    assert isinstance(locks.ask(ReleaseLock("a", "1", abandon=True)).reply, Released)
    assert isinstance(first.reply, LockDenied)
    assert isinstance(locks.ask(ReleaseLock("a", "0", abandon=True)).reply, Released)
    token_of(second)
    assert isinstance(locks.ask(ReleaseLock("a", "nobody", abandon=True)).reply, NotHeld)
    token_of(second)


async def test_tokens_grow_whatever_the_wall_clock_does_and_leases_do_not_care(locks: Managed) -> None:
    tokens: list[int] = []
    for hours in (0, -1, 24, -9000, 0):
        wall = locks.clock.wall()
        locks.clock.wall = lambda at=wall + hours * 3600: at  # type: ignore[misc]
        tokens.append(token_of(locks.ask(want("t", ttl=5))))
        locks.advance(4)
        assert isinstance(locks.ask(want("u")).reply, LockDenied)
        locks.ask(ReleaseLock("a", "t"))
    assert tokens == sorted(set(tokens))


async def test_a_crash_of_the_manager_frees_no_lock_and_lets_nobody_gone_have_it(locks: Managed) -> None:
    held = token_of(locks.ask(want("0", ttl=1000)))
    before = locks.ask(want("1", wait=60))
    before.answer(Failed("actor_failed", ""))  # As the actor's cell does.
    await locks.start()
    assert isinstance(locks.ask(want("2")).reply, LockDenied)
    assert isinstance(locks.ask(RenewLock("a", "0", 1000)).reply, Renewed)
    after = locks.ask(want("3", wait=60))
    assert isinstance(locks.ask(ReleaseLock("a", "0")).reply, Released)
    assert token_of(after) > held


async def test_what_happens_is_told(locks: Managed) -> None:
    emitted = locks.context.emitted
    token = token_of(locks.ask(want("0", ttl=5)))
    second = locks.ask(want("1", wait=60))
    locks.advance(5.1)
    locks.ask(ReleaseLock("a", "1", "owner 1", token_of(second)))
    assert [(type(each), each.key, each.owner, each.token) for each in emitted] == [  # type: ignore[attr-defined]
        (LockAcquired, "a", "owner 0", token),
        (LockExpired, "a", "owner 0", token),
        (LockAcquired, "a", "owner 1", token_of(second)),
        (LockReleased, "a", "owner 1", token_of(second)),
    ]


async def test_a_lock_that_ends_with_nobody_waiting_is_told_and_forgotten(locks: Managed) -> None:
    for n in range(100):
        locks.ask(want(f"t{n}", name=f"n{n}", ttl=1 + n / 100))
    assert "100/" in repr(locks.table)
    locks.advance(2.5)
    assert "0/" in repr(locks.table)
    assert sum(isinstance(each, LockExpired) for each in locks.context.emitted) == 100


async def test_what_is_given_back_leaves_nothing_behind(locks: Managed) -> None:
    for n in range(5000):
        name = f"n{n}"
        locks.ask(want("0", name=name, ttl=1000))
        waiting = locks.ask(want("1", name=name, wait=1000))
        locks.ask(ReleaseLock(name, "0"))
        token_of(waiting)
        locks.ask(ReleaseLock(name, "1"))
    assert repr(locks.table).startswith("<LockTable 0/100000 held, 0 waiting>")
    assert repr(locks.manager).endswith("0/10000 waiting>")
    assert len(locks.table._ends) == 0  # pyright: ignore[reportPrivateUsage]
    assert len(locks.manager._due) == 0  # pyright: ignore[reportPrivateUsage]


async def test_bounds_are_kept() -> None:
    locks = Managed(max_waiters=2, max_locks=3)
    await locks.start()
    locks.ask(want("0"))
    waiting = [locks.ask(want(f"w{n}", wait=60)) for n in range(3)]
    assert [type(each.reply) for each in waiting] == [type(None), type(None), Failed]
    assert waiting[2].reply.code == "overloaded"
    locks.ask(ReleaseLock("a", "w0", abandon=True))
    locks.ask(ReleaseLock("a", "w1", abandon=True))
    more = [locks.ask(want(f"m{n}", name=f"m{n}")) for n in range(3)]
    assert [type(each.reply) for each in more] == [LockGranted, LockGranted, Failed]
    locks.advance(31)
    token_of(locks.ask(want("later", name="later")))


async def test_a_description_hands_nothing_out(locks: Managed) -> None:
    assert locks.ask(DescribeLock("a")).reply == LockFree()
    token = token_of(locks.ask(want("0", ttl=5)))
    locks.advance(2)
    info = locks.ask(DescribeLock("a")).reply
    assert isinstance(info, LockInfo)
    assert (info.owner, info.token) == ("owner 0", token)
    assert info.remaining == pytest.approx(3)
    locks.clock.advance(4)  # Before the manager is called back.
    assert locks.ask(DescribeLock("a")).reply == LockFree()


async def test_a_lock_that_ends_passes_by_thousands_who_went_away(locks: Managed) -> None:
    locks.ask(want("0", ttl=5))
    for n in range(3000):
        locks.ask(want(f"gone {n}", wait=60)).gone = True
    there = locks.ask(want("there", wait=60))
    locks.advance(5.1)
    token_of(there)


class Withheld:
    """Store without a queue that answers when the test says so."""

    def __init__(self, locks: Managed) -> None:
        self.acquiring: list[tuple[str, Any]] = []
        locks.table.poll = 0.02
        asking: Any = self
        locks.manager._client = asking

    def ask(self, request: Any, then: Any) -> None:
        if isinstance(request, AcquireLock):
            self.acquiring.append((request.ticket, then))

    def answer(self, reply: Any) -> str:
        """Answer the oldest request, and return its ticket."""
        ticket, then = self.acquiring.pop(0)
        then(reply)
        return str(ticket)

    def sweep(self) -> None:
        pass

    async def close(self, last: Any) -> None:
        pass


async def test_who_came_before_the_first_answer_of_a_store_without_a_queue_keeps_its_place(locks: Managed) -> None:
    store = Withheld(locks)
    waiting = [locks.ask(want(str(n), wait=60)) for n in range(3)]
    assert store.answer(LockDenied("another", 5.0)) == "0"
    waiting.append(locks.ask(want("3", wait=60)))
    for n, caller in enumerate(waiting):
        locks.advance(1)
        assert store.answer(LockGranted(n + 1, 30.0)) == str(n)
        assert token_of(caller) == n + 1


async def test_who_came_before_a_store_was_heard_is_told_that_it_is_not_there(locks: Managed) -> None:
    store = Withheld(locks)
    waiting = [locks.ask(want(str(n), wait=60)) for n in range(3)]
    down = Failed.of(CacheConnectionError("down", "memcached"))
    assert [store.answer(down) for _ in range(3)] == ["0", "1", "2"]
    assert [caller.reply for caller in waiting] == [down] * 3
    assert store.acquiring == []
