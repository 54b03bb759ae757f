"""Rate limits in real servers: round trips, expiry and outages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any
from uuid import uuid4

import anyio
import pytest
import redis
from anyio import to_thread

from cachebus.adapters.memcached.cas_updates import REMEMBERED, TRIES
from cachebus.adapters.memcached.session import Session
from cachebus.adapters.memcached.store import Endpoint as MemcachedPlace
from cachebus.adapters.memcached.store import MemcachedStore
from cachebus.adapters.redis.connect import Endpoint
from cachebus.adapters.redis.store import RedisStore
from cachebus.bus.spawn import spawn
from cachebus.messages import Admit, Admitted, CacheBackendError, Clear, Failed, Get, RateLimitDenied, Reply, Set
from cachebus.testing.servers import Server, run_memcached, run_redis
from cachebus.testing.stores import ask, carry_out

from ...adapters.memcached.conftest import raw

LONG = 3600.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def take(limit: int = 3, per: float = LONG, key: str = "k", **more: Any) -> Admit:
    return Admit(key, limit, per, more.pop("burst", limit), **more)


def kinds(replies: Sequence[Reply]) -> list[type[Reply]]:
    return [type(reply) for reply in replies]


# Redis


@pytest.fixture(scope="module")
def redis_server() -> Iterator[Server]:
    with run_redis() as running:
        yield running


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex}"


@pytest.fixture
async def in_redis(redis_server: Server, namespace: str) -> AsyncIterator[RedisStore]:
    store = RedisStore([Endpoint(host=redis_server.host, port=redis_server.port)], namespace=namespace)
    await store.open()
    yield store
    await store.close()


async def told(server: Server, *words: Any) -> Any:
    """Return the reply to a command that redis-py sends directly."""

    def call() -> Any:
        with redis.Redis(host=server.host, port=server.port) as client:
            return client.execute_command(*words)

    return await to_thread.run_sync(call)


async def test_a_limit_in_redis_is_one_command(in_redis: RedisStore, redis_server: Server, namespace: str) -> None:
    await ask(in_redis, take())
    before = await told(redis_server, "INFO", "commandstats")
    await carry_out(in_redis, [take()] * 10)
    after = await told(redis_server, "INFO", "commandstats")
    assert after["cmdstat_evalsha"]["calls"] - before["cmdstat_evalsha"]["calls"] == 10
    for name in ("get", "set"):  # Calls by the script. Refused calls do not write.
        grown = after[f"cmdstat_{name}"]["calls"] - before[f"cmdstat_{name}"]["calls"]
        assert grown == {"get": 10, "set": 2}[name]


async def test_a_limit_in_redis_goes_when_it_is_whole_again(
    in_redis: RedisStore, redis_server: Server, namespace: str
) -> None:
    await carry_out(in_redis, [take(3, 30.0)] * 2)
    name = f"{namespace}#rate:k"
    assert 19_000 < await told(redis_server, "PTTL", name) <= 20_000
    await ask(in_redis, take(1, 0.05, key="soon"))
    with anyio.fail_after(30):
        while await told(redis_server, "EXISTS", f"{namespace}#rate:soon"):
            await anyio.sleep(0.01)
    assert await told(redis_server, "KEYS", f"{namespace}*") == [name.encode()]


async def test_the_script_is_sent_again_when_redis_has_forgotten_it(in_redis: RedisStore, redis_server: Server) -> None:
    await ask(in_redis, take())
    await told(redis_server, "SCRIPT", "FLUSH")
    assert kinds(await carry_out(in_redis, [take()] * 3)) == [Admitted, Admitted, RateLimitDenied]


async def test_an_emptied_redis_starts_with_whole_limits(in_redis: RedisStore, redis_server: Server) -> None:
    await carry_out(in_redis, [take()] * 3)
    await told(redis_server, "FLUSHALL")
    assert kinds(await carry_out(in_redis, [take()] * 4)) == [Admitted] * 3 + [RateLimitDenied]


async def test_what_somebody_else_wrote_under_the_name_of_a_limit_is_written_over_or_an_error(
    in_redis: RedisStore, redis_server: Server, namespace: str
) -> None:
    await told(redis_server, "SET", f"{namespace}#rate:k", "junk")
    assert kinds(await carry_out(in_redis, [take()] * 4)) == [Admitted] * 3 + [RateLimitDenied]
    await told(redis_server, "LPUSH", f"{namespace}#rate:list", "junk")
    (reply,) = await carry_out(in_redis, [take(key="list")])
    assert isinstance(reply, Failed)


# Memcached


@pytest.fixture
def memcached_server() -> Iterator[Server]:
    with run_memcached() as running:
        yield running


class Trips:
    """Counter of the round trips of all connections to Memcached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        ask: Any = Session.ask

        def counted(session: Any, *arguments: Any, **options: Any) -> Any:
            self.count += 1
            return ask(session, *arguments, **options)

        monkeypatch.setattr(Session, "ask", counted)

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> Trips:
    return Trips(monkeypatch)


async def memcached(server: Server, namespace: str) -> MemcachedStore:
    # A hundred rounds of one exchange may exceed the usual second on a busy machine.
    store = MemcachedStore([MemcachedPlace(server.host, server.port)], namespace=namespace, timeout=30.0)
    await store.open()
    return store


@pytest.fixture
async def stores(memcached_server: Server, namespace: str) -> AsyncIterator[tuple[MemcachedStore, MemcachedStore]]:
    """Open two stores with the same limits, like two processes."""
    one, other = await memcached(memcached_server, namespace), await memcached(memcached_server, namespace)
    yield one, other
    for each in (one, other):
        await each.close()


Pair = tuple[MemcachedStore, MemcachedStore]


async def test_a_limit_in_memcached_is_one_round_trip_where_nobody_else_is(stores: Pair, trips: Trips) -> None:
    store, _ = stores
    for expected in (Admitted, Admitted, Admitted, RateLimitDenied, RateLimitDenied):
        assert isinstance(await ask(store, take()), expected)
        assert trips.since() == 1
    batch = [take(50, key=key) for key in "abc" for _ in range(60)]
    replies = await carry_out(store, batch)
    assert trips.since() == 1
    assert kinds(replies) == ([Admitted] * 50 + [RateLimitDenied] * 10) * 3


async def test_somebody_else_costs_one_round_trip_more_and_changes_nothing_else(stores: Pair, trips: Trips) -> None:
    one, other = stores
    await ask(one, take(4))
    trips.since()
    for store, left in ((other, 2), (one, 1), (one, 0)):
        reply = await ask(store, take(4))
        assert isinstance(reply, Admitted)
        assert reply.remaining == left
    assert trips.since() == 2 + 2 + 1
    assert isinstance(await ask(other, take(4)), RateLimitDenied)
    assert trips.since() == 2


async def test_a_refusal_that_is_out_of_date_is_none(stores: Pair, memcached_server: Server, namespace: str) -> None:
    store, _ = stores
    assert kinds(await carry_out(store, [take()] * 4))[-1] is RateLimitDenied
    await raw(memcached_server, "flush_all")
    assert kinds(await carry_out(store, [take()] * 4)) == [Admitted] * 3 + [RateLimitDenied]


async def test_a_clear_by_anybody_leaves_a_limit_as_it_is(stores: Pair) -> None:
    one, other = stores
    await carry_out(one, [take(), Set("k", b"v"), take()])
    await ask(other, Clear())
    replies = await carry_out(one, [take(), Get("k"), take()])
    assert kinds(replies[::2]) == [Admitted, RateLimitDenied]


async def test_a_limit_in_memcached_goes_when_it_is_whole_again(
    stores: Pair, memcached_server: Server, namespace: str
) -> None:
    store, _ = stores
    await ask(store, take(1, 30.0))
    left = await raw(memcached_server, "raw_command", f"mg {namespace}:~:k t")
    assert 30 <= int(left.split()[1][1:]) <= 32


async def test_a_memcached_that_was_started_again_has_whole_limits(
    stores: Pair, memcached_server: Server, namespace: str
) -> None:
    store, _ = stores
    await carry_out(store, [take()] * 3)
    await to_thread.run_sync(memcached_server.restart)
    while isinstance((await carry_out(store, [Get("other")]))[0], Failed):
        await anyio.sleep(0.01)
    assert kinds(await carry_out(store, [take()] * 4)) == [Admitted] * 3 + [RateLimitDenied]


async def test_junk_under_the_name_of_a_limit_is_written_over(
    stores: Pair, memcached_server: Server, namespace: str
) -> None:
    store, _ = stores
    for junk in (b"junk", b"1 2 3 0", b"\xff"):
        await raw(memcached_server, "set", f"{namespace}:~:k", junk, noreply=False)
        assert kinds(await carry_out(store, [take()] * 4)) == [Admitted] * 3 + [RateLimitDenied]


async def test_what_is_remembered_of_limits_is_bounded(stores: Pair, trips: Trips) -> None:
    store, _ = stores
    for at in range(0, REMEMBERED + 1000, 1000):
        await carry_out(store, [take(key=f"k{each}") for each in range(at, at + 1000)])
    (server,) = store._servers.values()
    assert server.connection is not None
    assert len(server.connection.limits) <= REMEMBERED


async def test_others_who_write_all_the_time_win_in_the_end(stores: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = stores
    await ask(one, take(1000))
    (mine,) = one._servers.values()
    connection: Any = mine.connection
    write = connection._write
    tries = 0

    def outrun(data: bytes) -> None:
        async def later() -> None:
            await ask(other, take(1000))
            write(data)

        nonlocal tries
        tries += 1
        spawn(later(), lambda: None)

    monkeypatch.setattr(connection, "_write", outrun)
    with pytest.raises(CacheBackendError, match="others wrote the key"):
        await ask(one, take(1000))
    assert tries == TRIES
    monkeypatch.setattr(connection, "_write", write)
    reply = await ask(one, take(1000))
    assert isinstance(reply, Admitted)
    assert reply.remaining == 1000 - 1 - TRIES - 1, "the failed call must not use units"
