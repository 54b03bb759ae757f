"""Tests of batches: order, independence of requests, concurrency, and cancellation."""

from __future__ import annotations

import random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from cachebus.adapters.memory.store import MemoryStore
from cachebus.messages import (
    Add,
    Delete,
    Deleted,
    DeleteMany,
    Exists,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Missing,
    NotStored,
    Ping,
    Present,
    Reply,
    Request,
    Set,
    SetMany,
    Stored,
    Touch,
    WrongType,
)

from .base import AnyStore, Conformance, ask, carry_out, value_of


class Batching(Conformance):
    """Tests of batches. Part of `StoreConformance`."""

    async def test_an_empty_batch_has_no_replies(self, store: AnyStore) -> None:
        assert list(await carry_out(store, [])) == []

    async def test_a_batch_takes_effect_in_its_order(self, store: AnyStore) -> None:
        batch: list[Request[Any]] = [
            Get("a"), Set("a", b"1"), Get("a"), Get("a"), Set("a", b"2"), Set("a", b"3"), Get("a"), Exists("a"),
            Delete("a"), Get("a"), Add("a", b"4"), GetMany(("a", "b")), Set("b", b"5"), GetMany(("a", "b")),
            DeleteMany(("a", "b")), GetMany(("a", "b")),
        ]  # fmt: skip
        replies = [plain(reply) for reply in await carry_out(store, batch)]
        assert replies == [
            Missing, Stored, b"1", b"1", Stored, Stored, b"3", Present,
            Deleted(1), Missing, Stored, {"a": b"4"}, Stored, {"a": b"4", "b": b"5"},
            Deleted(2), {},
        ]  # fmt: skip

    async def test_every_request_of_a_large_batch_gets_its_own_reply(self, store: AnyStore) -> None:
        writes = [Set(f"k{number}", number) for number in range(2000)]
        assert all(isinstance(reply, Stored) for reply in await carry_out(store, writes))
        numbers = [number * 7 % 2003 for number in range(2000)]
        replies = await carry_out(store, [Get(f"k{number}") for number in numbers])
        assert [plain(reply) for reply in replies] == [number if number < 2000 else Missing for number in numbers]

    @pytest.mark.parametrize("seed", range(10))
    async def test_any_batches_do_what_the_memory_store_does(self, store: AnyStore, seed: int) -> None:
        chance = random.Random(seed)
        model = MemoryStore()
        counters = store.capabilities.counters
        for _ in range(10):
            batch = [random_request(chance, counters) for _ in range(chance.randint(1, 40))]
            replies = [plain(reply) for reply in await carry_out(store, batch)]
            expected = [plain(reply) for reply in await carry_out(model, batch)]
            for request, one, other in zip(batch, replies, expected, strict=True):
                assert one == other, request

    # Independence of requests in a batch

    async def test_a_bad_request_hurts_no_neighbour(self, store: AnyStore) -> None:
        await ask(store, Set("text", "no number"))
        bad: Request[Any] = Increment("text") if store.capabilities.counters else Ping()
        replies = await carry_out(store, [Set("a", b"1"), bad, Get("a"), Ping(), Set("b", b"2"), bad, Get("b")])
        assert [plain(reply) for reply in replies][::2] == [Stored, b"1", Stored, b"2"]
        assert all(isinstance(reply, Failed) for reply in replies[1::2])

    @pytest.mark.parametrize("value", ["5", b"no number", 1.5, True, None, [1]], ids=repr)
    async def test_counting_on_what_is_no_integer_is_refused_and_changes_nothing(
        self, store: AnyStore, value: object
    ) -> None:
        self.needs(store, "counters")
        await ask(store, Set("a", value))
        with pytest.raises(WrongType):
            await ask(store, Increment("a"))
        assert await value_of(store, "a") == value

    @pytest.mark.parametrize(("start", "delta"), [(2**63 - 1, 1), (-(2**63), -1), (2**62, 2**62)])
    async def test_counting_out_of_64_bits_is_refused_and_changes_nothing(
        self, store: AnyStore, start: int, delta: int
    ) -> None:
        self.needs(store, "counters")
        await ask(store, Set("a", start))
        with pytest.raises(WrongType):
            await ask(store, Increment("a", delta))
        assert await value_of(store, "a") == start

    # Concurrency

    async def test_batches_at_the_same_time_each_get_their_own_values(self, store: AnyStore) -> None:
        async def work(worker: int) -> None:
            for turn in range(10):
                keys = [f"{worker}:{number}" for number in range(10)]
                await carry_out(store, [Set(key, f"{key}={turn}") for key in keys])
                replies = await carry_out(store, [Get(key) for key in keys])
                assert [plain(reply) for reply in replies] == [f"{key}={turn}" for key in keys]

        async with anyio.create_task_group() as tasks:
            for worker in range(50):
                tasks.start_soon(work, worker)

    async def test_counts_at_the_same_time_all_count(self, store: AnyStore) -> None:
        self.needs(store, "counters")

        async def count() -> None:
            for _ in range(10):
                await carry_out(store, [Increment("a"), Increment("a", 2)])

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(count)
        assert await value_of(store, "a") == 600

    @pytest.mark.parametrize("seed", range(3))
    async def test_no_reply_reaches_another_request_when_batches_are_broken_off(
        self, store: AnyStore, seed: int
    ) -> None:
        chance = random.Random(seed)
        await ask(store, SetMany({f"k{number}": f"value of k{number}" for number in range(100)}))
        wrong: list[str] = []
        unharmed = 0

        async def read(scope: anyio.CancelScope) -> None:
            nonlocal unharmed
            keys = [f"k{chance.randrange(100)}" for _ in range(chance.randint(1, 5))]
            with scope:
                replies = await carry_out(store, [Get(key) for key in keys])
                unharmed += 1
                wrong.extend(
                    f"{key}: {plain(reply)!r}"
                    for key, reply in zip(keys, replies, strict=True)
                    if plain(reply) != f"value of {key}"
                )

        for _ in range(20):
            scopes = [anyio.CancelScope() for _ in range(20)]
            async with anyio.create_task_group() as tasks:
                for scope in scopes:
                    tasks.start_soon(read, scope)
                for _ in range(chance.randrange(4)):
                    await anyio.lowlevel.checkpoint()
                for scope in chance.sample(scopes, 10):
                    scope.cancel()
        assert wrong == []
        assert unharmed

    # The rest of the port

    async def test_the_gauges_can_be_read_at_any_time(self, store: AnyStore) -> None:
        await ask(store, Set("a", b"1"))
        assert store.gauges().entries >= 0
        await store.close()
        assert store.gauges().entries >= 0

    async def test_closing_twice_is_closing_once(self, store: AnyStore) -> None:
        await store.close()
        await store.close()

    async def test_a_store_that_was_closed_may_be_opened_again(self, store: AnyStore) -> None:
        await store.close()
        await store.open()
        await ask(store, Set("a", b"1"))
        assert await value_of(store, "a") == b"1"


def plain(reply: Reply) -> Any:
    """Return the content of a reply without the parts that depend on the store, versions and times."""
    match reply:
        case Found():
            return reply.value
        case FoundMany():
            return {key: found.value for key, found in reply.entries.items()}
        case Missing() | Stored() | NotStored() | Present():
            return type(reply)
        case Failed():
            return (Failed, reply.code)
        case _:
            return reply


def random_request(chance: random.Random, counters: bool) -> Request[Any]:
    """Return a random request with one of a few keys, so that requests affect each other."""
    key = chance.choice("abcde")
    keys = tuple(chance.choices("abcde", k=chance.randint(0, 4)))
    value = chance.choice((chance.randrange(1000), b"bytes", "text", None))
    requests: list[Request[Any]] = [
        Get(key),
        Get(key),
        GetMany(keys),
        Exists(key),
        Set(key, value, ttl=None, only_if=chance.choice((None, "absent", "present"))),
        Set(key, value, ttl=None),
        SetMany(dict.fromkeys(keys, chance.randrange(1000)), ttl=3600.0),
        Add(key, value, ttl=3600.0),
        Touch(key, 3600.0),
        Delete(key),
        DeleteMany(keys),
    ]
    if counters:
        initial = chance.choice((0, 7, None))
        requests += [Increment(key, chance.randrange(-5, 5), initial, ttl=None)] * 2
    return chance.choice(requests)
