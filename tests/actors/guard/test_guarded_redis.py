"""A guarded backend actor and a real Redis, with a proxy between them that breaks the connection."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import anyio
import pytest

from cachebus.actors import BackendActor, BreakerPolicy, GuardPolicy, Supervisor
from cachebus.adapters.redis.connect import Endpoint
from cachebus.adapters.redis.store import RedisStore
from cachebus.bus import Address, LocalBus
from cachebus.messages import (
    CacheConnectionError,
    CacheError,
    CacheTimeoutError,
    CircuitClosed,
    CircuitOpen,
    CircuitOpened,
    Found,
    Get,
    Set,
    TakeSnapshot,
)
from cachebus.testing.proxy import Mode, Proxy
from cachebus.testing.servers import Server, run_redis

BACKEND = Address("backend.main")
BUDGET = 1.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with run_redis() as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy.before(server) as proxy:
        yield proxy


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def bus(proxy: Proxy) -> AsyncIterator[LocalBus]:
    policy = GuardPolicy(breaker=BreakerPolicy(recovery=0.1))
    namespace = uuid4().hex

    def actor() -> BackendActor:
        return BackendActor(RedisStore([Endpoint(host=proxy.host, port=proxy.port)], namespace=namespace), policy)

    bus = LocalBus()
    async with Supervisor(bus) as supervisor:
        await supervisor.start(BACKEND, actor)
        yield bus


@pytest.mark.parametrize("mode", ["refuse", "reset", "half_open", "lose_reply"])
async def test_an_outage_is_answered_by_the_circuit_and_ends_by_itself(bus: LocalBus, proxy: Proxy, mode: Mode) -> None:
    for number in range(50):
        await bus.request(BACKEND, Set(f"k{number}", number), BUDGET)
    proxy.switch(mode)
    errors: Counter[type[CacheError]] = Counter()

    async def call(number: int) -> None:
        for _ in range(1000):
            try:
                reply = await bus.request(BACKEND, Get(f"k{number}"), BUDGET)
                assert isinstance(reply, Found)
                assert reply.value == number
            except (CacheConnectionError, CacheTimeoutError, CircuitOpen) as error:
                errors[type(error)] += 1
                if isinstance(error, CircuitOpen):
                    return

    with bus.subscribe(CircuitOpened, CircuitClosed) as events:
        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(call, number)
        assert errors[CircuitOpen] == 50, "every caller must get the error in the end"
        proxy.switch("pass")
        healthy = 0
        while healthy < 3:
            try:
                reply = await bus.request(BACKEND, Get("k7"), BUDGET)
            except (CacheConnectionError, CacheTimeoutError, CircuitOpen):
                await anyio.sleep(0.01)
                continue
            assert isinstance(reply, Found)
            assert reply.value == 7
            healthy += 1
        async for event in events:
            if isinstance(event, CircuitClosed):
                break
    guard = (await bus.request(BACKEND, TakeSnapshot(), BUDGET)).guard
    assert guard["state"] == "closed"
    assert guard["in_flight"] == 0
    assert guard["failure_count"] >= 5
