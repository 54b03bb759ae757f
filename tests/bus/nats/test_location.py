"""Location transparency: the same tests with the actor in this process, behind NATS and in another process.

Also runs the conformance suite of stores, and the facades.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest

from cachebus import Cache, CacheKeyError, Node, Settings, WrongType, open_cache, open_sync_cache
from cachebus.actors import STORE_REQUESTS, BackendActor, Supervisor
from cachebus.actors.ports import Capabilities, Gauges
from cachebus.adapters.memory.store import MemoryStore
from cachebus.bus import Address, Bus, LocalBus
from cachebus.messages import (
    ActorFailed,
    AddressInUse,
    BadMessage,
    CacheConfigurationError,
    CacheSet,
    CacheTimeoutError,
    CapabilityError,
    Clear,
    Delete,
    Exists,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Incremented,
    Missing,
    NoSuchActor,
    Present,
    Reply,
    Request,
    Set,
    TakeSnapshot,
    Touch,
)
from cachebus.testing.servers import Server
from cachebus.testing.stores import AnyStore, StoreConformance

from .actors import Answering
from .conftest import Connect, StartWorker

pytestmark = pytest.mark.anyio
PLACE = Address("test.place")
BACKEND = Address("backend.primary")
T = 20.0


@pytest.fixture(params=["local", "nats", "process"])
async def bus(
    request: pytest.FixtureRequest, connect: Connect, start_worker: StartWorker, namespace: str
) -> AsyncIterator[Bus]:
    """Open a bus that reaches an `Answering` actor: on it, on another bus of this process, or in another process."""
    if request.param == "process":
        await start_worker("answering", PLACE)
        yield await connect()
        return
    home = LocalBus(namespace) if request.param == "local" else await connect()
    async with Supervisor(home) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        yield home if request.param == "local" else await connect()


async def test_every_kind_of_handler_answers(bus: Bus) -> None:
    assert await bus.request(PLACE, Get("k"), T) == Found("k")
    assert await bus.request(PLACE, Get("missing"), T) == Missing()
    assert await bus.request(PLACE, Exists("0"), T) == Present()
    assert await bus.request(PLACE, GetMany(("a",)), T) == FoundMany({"a": Found(1)})


async def test_errors_are_of_the_same_class_and_say_the_same(bus: Bus) -> None:
    with pytest.raises(CacheKeyError, match="the key is refused"):
        await bus.request(PLACE, Set("k", 1), T)
    with pytest.raises(ActorFailed, match=r"actor test\.place failed: RuntimeError"):
        await bus.request(PLACE, Delete("k"), T)
    with pytest.raises(BadMessage, match="has no handler for TakeSnapshot"):
        await bus.request(PLACE, TakeSnapshot(), T)
    with pytest.raises(NoSuchActor, match=r"no actor serves the address 'test\.nobody'"):
        await bus.request(Address("test.nobody"), Get("k"), T)


async def test_messages_of_one_sender_are_handled_in_their_order(bus: Bus) -> None:
    for _ in range(100):
        bus.send(PLACE, Increment("k"))
    counted = [asyncio.create_task(bus.request(PLACE, Increment("k"), T)) for _ in range(100)]
    assert await asyncio.gather(*counted) == [Incremented(number) for number in range(101, 201)]


async def test_a_deadline_is_kept_and_a_parked_reply_comes(bus: Bus) -> None:
    with anyio.fail_after(T / 2), pytest.raises(CacheTimeoutError):
        await bus.request(PLACE, Touch("k"), 0.1)
    parked = asyncio.create_task(bus.request(PLACE, Touch("k"), T))
    await bus.request(PLACE, Exists("0"), T)
    assert await bus.request(PLACE, Increment("k"), T) == Incremented(1)
    assert await parked == Present(1.0)


async def test_a_cancelled_caller_leaves_everything_as_it_was(bus: Bus) -> None:
    for _ in range(20):
        task = asyncio.create_task(bus.request(PLACE, Exists("0.01"), T))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await bus.request(PLACE, Get("k"), T) == Found("k")


async def test_threads_ask_too(bus: Bus) -> None:
    assert await anyio.to_thread.run_sync(lambda: bus.request_blocking(PLACE, Exists("0"), T)) == Present()


# Stores


class StoreElsewhere:
    """Store of a backend actor on the other side of a bus."""

    name = "elsewhere"

    def __init__(self, bus: Bus, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self._bus = bus

    async def open(self) -> None:
        """Do nothing, because the actor has opened its store."""

    async def close(self) -> None:
        """Do nothing."""

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return await asyncio.gather(*(self._ask(each) for each in batch))

    async def _ask(self, request: Request[Any]) -> Reply:
        if not isinstance(request, STORE_REQUESTS):  # The actor would answer these without its store.
            return Failed.of(CapabilityError(store=self.name, capability=type(request).__name__))
        try:
            reply: Reply = await self._bus.request(BACKEND, request, T)
        except Exception as error:
            return Failed.of(error)  # type: ignore[arg-type]
        return reply


class OverNats(StoreConformance):
    """Conformance suite for a worker's memory store, over NATS."""

    big_value = 1_000_000  # Fits into one message of the server.

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    async def neighbour(self, connect: Connect, namespace: str) -> AsyncIterator[AnyStore]:
        async with memory_behind(connect, f"{namespace}2") as store:
            yield store


@asynccontextmanager
async def memory_behind(connect: Connect, namespace: str) -> AsyncGenerator[AnyStore]:
    """Open a memory store in this process, reached through a server."""
    # The namespace has no other claimant, so a claim need not wait.
    async with Supervisor(await connect(namespace=namespace, claim_wait=0.001)) as supervisor:
        memory = MemoryStore()
        await supervisor.start(BACKEND, lambda: BackendActor(memory), visibility="sole")
        yield StoreElsewhere(await connect(namespace=namespace), memory.capabilities)


class TestMemoryOverNats(OverNats):
    """The actor is in this process, behind a server."""

    @pytest.fixture
    async def store(self, connect: Connect, namespace: str) -> AsyncIterator[AnyStore]:
        async with memory_behind(connect, namespace) as store:
            yield store


@pytest.fixture(scope="module")
def one_worker(nats_server: Server) -> Any:
    """Start a worker with a memory store for all tests of a class, because starting one takes longer than a test."""
    from .conftest import WorkerProcess, end

    worker = WorkerProcess(nats_server, "onestore", "memory", BACKEND, "sole")
    assert worker.said() == "up"
    yield worker
    end(worker)


class TestMemoryInAWorker(OverNats):
    """The actor is in another process."""

    @pytest.fixture
    async def store(self, connect: Connect, one_worker: Any) -> AsyncIterator[AnyStore]:
        bus = await connect(namespace="onestore")
        yield StoreElsewhere(bus, MemoryStore().capabilities)
        await bus.request(BACKEND, Clear(), T)


# Facades


@pytest.fixture(params=["local", "nats", "process"])
async def cache(
    request: pytest.FixtureRequest, nats_server: Server, namespace: str, start_worker: StartWorker
) -> AsyncIterator[Cache]:
    """Open a cache over memory: in this process, in a serving node of this process, or in another process."""
    url = nats_server.url
    if request.param == "local":
        async with open_cache("memory://", namespace=namespace) as cache:
            yield cache
    elif request.param == "process":
        await start_worker("memory", BACKEND, "sole")
        async with open_cache("bus:primary", bus=url, namespace=namespace) as cache:
            yield cache
    else:
        async with (
            Node(Settings(namespace=namespace, bus=url), serve=True),  # type: ignore[arg-type]
            open_cache("bus:primary", bus=url, namespace=namespace) as cache,
        ):
            yield cache


async def test_an_application_changes_one_line(cache: Cache) -> None:
    assert await cache.set("a", {"x": [1, b"2", None]}, ttl=60, tags=["t"])
    assert await cache.get("a") == {"x": [1, b"2", None]}
    assert await cache.get("b", default="none") == "none"
    assert not await cache.add("a", 2)
    await cache.set_many({"c": 1, "d": 2})
    assert await cache.get_many(["a", "c", "d", "e"]) == {"a": {"x": [1, b"2", None]}, "c": 1, "d": 2}
    assert await cache.increment("n", 5) == 5
    with pytest.raises(WrongType):
        await cache.increment("a")
    found = await cache.lookup("c")
    assert isinstance(found, Found)
    assert await cache.compare_and_set("c", 7, version=found.version)
    assert not await cache.compare_and_set("c", 8, version=found.version)
    assert {key async for key in cache.scan("*")} == {"a", "c", "d", "n"}
    await cache.invalidate_tags("t")
    assert not await cache.exists("a")
    assert (await cache.ttl("c") or 0) > 59 or await cache.ttl("c") is None
    assert await cache.delete("c")
    assert await cache.delete_pattern("d*") == 1
    await cache.clear()
    assert await cache.get_many(["a", "c", "d", "n"]) == {}
    assert (await cache.health()).ok
    assert (await cache.statistics()).store == "memory"


async def test_a_synchronous_cache_reaches_a_worker(
    nats_server: Server, namespace: str, start_worker: StartWorker
) -> None:
    await start_worker("memory", BACKEND, "sole")

    def use() -> Any:
        with open_sync_cache("bus:primary", bus=nats_server.url, namespace=namespace) as cache:
            cache.set("k", 1)
            return cache.get("k"), cache.get("missing", 2), cache.increment("k")

    assert await anyio.to_thread.run_sync(use) == (1, 2, 2)


async def test_own_backends_share_events_and_nothing_else(nats_server: Server, namespace: str) -> None:
    url = nats_server.url
    async with (
        open_cache("memory://", bus=url, namespace=namespace) as here,
        open_cache("memory://", bus=url, namespace=namespace) as there,
    ):
        with there.events(CacheSet) as events:
            await there.client.bus.settled()  # type: ignore[attr-defined]
            await here.set("k", 1)
            event = await anext(events)
        assert isinstance(event, CacheSet)
        assert (event.key, event.backend) == ("k", "primary")
        assert await there.get("k") is None


FORKING = """
import os, sys
from cachebus import open_sync_cache

cache = open_sync_cache("bus:primary", bus=sys.argv[1], namespace=sys.argv[2])
cache.set("k", 1)
child = os.fork()
cache.increment("k")
if child == 0:
    print(cache.exists("k"), flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(cache.get("k"), status, flush=True)
"""


async def test_a_fork_and_an_exit_without_a_close_are_as_safe_as_ever(
    nats_server: Server, namespace: str, start_worker: StartWorker
) -> None:
    await start_worker("memory", BACKEND, "sole")

    def use() -> str:
        command = [sys.executable, "-c", FORKING, nats_server.url, namespace]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=T).stdout

    assert await anyio.to_thread.run_sync(use) == "True\n3 0\n"


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_on_trio_a_cache_over_nats_says_what_it_needs(nats_server: Server) -> None:
    with pytest.raises(CacheConfigurationError, match="requires asyncio"):
        async with open_cache("bus:primary", bus=nats_server.url):
            pass


async def test_a_node_without_a_bus_serves_nobody(nats_server: Server) -> None:
    with pytest.raises(CacheConfigurationError, match="a node that serves other processes needs a bus"):
        Node(Settings(), serve=True)


async def test_a_second_worker_shares_what_is_sharable_and_no_more(nats_server: Server, namespace: str) -> None:
    def node(url: str) -> Node:
        return Node(Settings(namespace=namespace, bus=nats_server.url, backends=[url]), serve=True)  # type: ignore[arg-type]

    async with (
        node("null://"),
        node("null://"),
        open_cache("bus:primary", bus=nats_server.url, namespace=namespace) as cache,
    ):
        assert await cache.get("k") is None
    async with node("memory://"):
        with pytest.raises(AddressInUse, match="process"):
            async with node("memory://"):
                pass
