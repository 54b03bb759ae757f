"""Lease requests that were sent twice, with the second copy executed after everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from cachebus import open_cache
from cachebus.messages import Delete, Found, GetOrLease, LeaseGranted, Loading, NotStored, Reply, Request, Set, Stored

from ..facade.faces import settings
from ..facade.outages import Outage


async def one(store: Outage, request: Request[Any]) -> Reply:
    """Return the reply of the store, bypassing the cache."""
    return (await store.inner.execute([request]))[0]


class CopiesQuestions(Outage):
    """Store that executes the first lease request twice, with a delete in between."""

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        replies = await super().execute(batch)
        if isinstance(batch[0], GetOrLease) and not any(isinstance(each[0], GetOrLease) for each in self.asked[:-1]):
            await one(self, Delete("k"))
            assert isinstance(await one(self, batch[0]), LeaseGranted)
        return replies


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_value_whose_lease_was_lost_and_granted_to_a_copy_is_not_stored() -> None:
    store = CopiesQuestions()
    async with open_cache(settings(), stores=lambda _: store) as cache:
        assert await cache.get_or_load("k", lambda: "loaded before", lease_ttl=0.2) == "loaded before"
        assert await cache.get("k") is None
        # The next caller loads as soon as the lease of the copy has expired.
        assert await cache.get_or_load("k", lambda: "new", lease_ttl=0.2) == "new"
        assert await cache.get("k") == "new"


async def test_nobody_joins_a_flight_by_the_name_of_a_copys_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower polls the lease of another process and gets a value, which is deleted while the reply is in transit.

    A copy of the lease request is then granted the lease. Later callers get the name of that lease, and must not get the
    deleted value.
    """
    store = Outage()
    values: dict[str, Any] = {}
    questions = 0
    copied, joined, go_on = anyio.Event(), anyio.Event(), anyio.Event()
    async with open_cache(settings(), stores=lambda _: store) as cache:
        turn, ask = cache.client.try_inline_lease, cache._runner.ask
        theirs = await one(store, GetOrLease("k", "another process", "o1", 60.0))
        assert isinstance(theirs, LeaseGranted)

        def counted(question: GetOrLease) -> Any:
            nonlocal questions
            questions += 1  # A caller sends the first request, the process the second.
            if questions == 3:
                joined.set()
            return turn(question)

        async def held_up(question: Any, patience: float = 0.0) -> Any:
            nonlocal questions
            if type(question) is not GetOrLease or questions != 1:
                return await ask(question, patience)
            questions += 1
            assert isinstance(await one(store, Set("k", "old", lease=theirs.token)), Stored)
            reply = await ask(question, patience)
            await one(store, Delete("k"))
            assert isinstance(await one(store, question), LeaseGranted)
            copied.set()
            await go_on.wait()
            return reply

        cache.client.try_inline_lease = counted
        monkeypatch.setattr(cache._runner, "ask", held_up)

        async def call(name: str) -> None:
            values[name] = await cache.get_or_load("k", lambda: f"loaded for {name}", lease_ttl=0.1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, "first")
            await copied.wait()
            tasks.start_soon(call, "second")
            await joined.wait()
            go_on.set()
    assert values == {"first": "old", "second": "loaded for second"}


async def test_a_lease_that_a_copy_was_granted_is_told_to_others_by_its_own_name() -> None:
    store = Outage()
    await store.open()
    question = GetOrLease("k", "p", "t", 60.0)
    first = await one(store, question)
    assert isinstance(first, LeaseGranted)
    assert await one(store, question) == first, "while it is held, it is the same lease"
    await one(store, Delete("k"))
    second = await one(store, question)
    assert isinstance(second, LeaseGranted)
    assert second.token != first.token
    reply = await one(store, replace(question, token="u"))
    assert isinstance(reply, Loading)
    assert reply.token == second.token
    assert isinstance(await one(store, Set("k", 1, lease=first.token)), NotStored)
    assert isinstance(await one(store, Set("k", 2, lease=second.token)), Stored)
    assert isinstance(await one(store, question), Found)
    await store.close()
