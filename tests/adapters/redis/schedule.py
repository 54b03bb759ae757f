"""Several stores on one real Redis. A random seed decides the order in which their messages are sent.

`python -m tests.adapters.redis.schedule SEED` replays and prints one interleaving on a single server; with `--cluster`,
on three.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Self

from cachebus.adapters.redis.cluster.store import RedisClusterStore
from cachebus.adapters.redis.commands import slot_of
from cachebus.adapters.redis.connect import Connector, Endpoint
from cachebus.adapters.redis.connection import InFlight, RedisConnection
from cachebus.adapters.redis.store import RedisStore
from cachebus.messages import (
    Add,
    Clear,
    CompareAndSet,
    Delete,
    DeletePattern,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    GetOrLease,
    InvalidateTags,
    LeaseGranted,
    Request,
    Set,
    SetMany,
    Touch,
)
from cachebus.testing.servers import Server, run_redis, run_redis_cluster

STORES, KEYS, TAGS = 3, 2, 2
OPERATIONS = 7
"""Number of operations of each client in one run."""

SETTLING = 12
"""Event loop iterations after which every runnable task has run."""


class Gate:
    """Holds every message sent on any connection, and releases them one at a time."""

    def __init__(self) -> None:
        self.chance = random.Random(0)
        self.waiting: dict[RedisConnection, deque[tuple[bytes, InFlight]]] = {}
        self.open = True
        self._send = RedisConnection.send

    def __enter__(self) -> Self:
        gate, send = self, self._send

        def held(connection: RedisConnection, data: bytes, batch: InFlight) -> None:
            if gate.open:
                send(connection, data, batch)
            else:
                gate.waiting.setdefault(connection, deque()).append((data, batch))

        RedisConnection.send = held  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *_: object) -> None:
        RedisConnection.send = self._send  # type: ignore[method-assign]

    async def step(self) -> bool:
        """Release one message, and return when its reply is processed. Return `False` if none waits."""
        for _ in range(SETTLING):
            await asyncio.sleep(0)
        ready = [connection for connection, queue in self.waiting.items() if queue]
        if not ready:
            return False
        connection = self.chance.choice(ready)
        data, batch = self.waiting[connection].popleft()
        done = asyncio.Event()
        self._send(connection, data, Signalled(batch, done))
        await done.wait()
        return True


class Signalled:
    """Batch in flight, with an event that is set when it is answered."""

    def __init__(self, batch: InFlight, done: asyncio.Event) -> None:
        self.wanted = batch.wanted
        self.changes = batch.changes
        self._batch = batch
        self._done = done

    def answer(self, replies: Any) -> None:
        self._batch.answer(replies)
        self._done.set()


async def lose(store: Any, *names: str) -> None:
    """Delete some keys on a server while the clients run."""
    for name in names:
        if isinstance(store, RedisStore):
            (connection,) = await connections(store)
        else:
            connection = await store._router.topology.node(
                store._router.topology.map.owner(slot_of(name))
            ).pool.connect()
        await connection.call("UNLINK", name)


class World:
    """Versioned source of truth, and clients that load from it, change it, and invalidate what they changed.

    A key has fixed tags: readers know some of them, and only the loader knows the others. `floor` is the minimum
    version that a read starting now must return. `hits` counts the values read.
    """

    def __init__(self, seed: int, stores: Sequence[Any], gate: Gate) -> None:
        self.chance = random.Random(seed)
        self.seed = seed
        self.stores = stores
        self.gate = gate
        self.gate.chance = random.Random(seed + 1)
        self.story: list[str] = []
        self.keys = [f"k{number}" for number in range(KEYS)]
        self.tags = [f"t{number}" for number in range(TAGS)]
        self.tags_of = {
            key: tuple(self.chance.sample(self.tags, self.chance.randrange(1, TAGS + 1))) for key in self.keys
        }
        self.truth = dict.fromkeys(self.keys, 1)
        self.floor = dict.fromkeys(self.keys, 1)
        self.locks = {key: asyncio.Lock() for key in self.keys}
        self.hits = 0
        self.stored = 0
        self.tokens = 0
        self.failures: list[str] = []

    async def run(self) -> None:
        await self.begin()
        self.gate.open = False
        clients = [self.reader, self.reader, self.loader, self.loader, self.loader, self.writer, self.writer]
        tasks = [
            asyncio.create_task(client(self.stores[number % len(self.stores)])) for number, client in enumerate(clients)
        ]
        try:
            while not all(task.done() for task in tasks):
                if not await self.gate.step():
                    assert all(task.done() for task in tasks), "deadlock: every task waits, and no message is pending"
        finally:
            for task in tasks:
                task.cancel()
            self.gate.open = True
        for task in tasks:
            await task
        if self.failures:
            raise AssertionError(f"seed {self.seed}: {self.failures[0]}")

    async def begin(self) -> None:
        """Remove the state of previous runs."""
        self.gate.waiting.clear()
        for store in self.stores:
            store._space.hints.clear()
            store._space.seen = self.chance.random() < 0.7
        for connection in await connections(self.stores[0]):
            await connection.call("FLUSHALL")

    async def ask(self, store: Any, request: Request[Any]) -> Any:
        who = self.stores.index(store)
        # Without the nonce of a lease, which does not depend on the seed.
        asked = re.sub(r"'(\d+-\d+)\.\w+'", r"'\1'", str(request))
        self.story.append(f"{who} asks {asked}")
        (reply,) = await store.execute([request])
        # Without versions and times, which come from the server.
        shown = reply.value if isinstance(reply, Found) else ""
        self.story.append(f"{who} hears {type(reply).__name__} {shown} to {type(request).__name__}")
        if isinstance(reply, Failed) and "had to be checked" not in reply.detail:
            self.failures.append(f"{request} failed: {reply}")
        return reply

    def seen(self, key: str, value: int, floor: int) -> None:
        self.hits += 1
        if value < floor:
            self.failures.append(f"{key} was read as {value}, but {floor} had been made known")

    async def reader(self, store: Any) -> None:
        for _ in range(OPERATIONS):
            key = self.chance.choice(self.keys)
            floors = dict(self.floor)
            reply = await self.ask(store, self.chance.choice((Get(key), GetMany(tuple(self.keys)))))
            if isinstance(reply, Found):
                self.seen(key, reply.value, floors[key])
            elif isinstance(reply, FoundMany):
                for each, found in reply.entries.items():
                    self.seen(each, found.value, floors[each])

    async def loader(self, store: Any) -> None:
        for _ in range(OPERATIONS):
            key = self.chance.choice(self.keys)
            tags = self.tags_of[key]
            declared = self.chance.choice((tags, tags[:1], ()))
            self.tokens += 1
            token = f"{self.seed}-{self.tokens}"
            floor = self.floor[key]
            refresh = self.chance.random() < 0.3
            reply = await self.ask(store, GetOrLease(key, token, token, 60.0, tags=declared, refresh=refresh))
            if isinstance(reply, Found):
                self.seen(key, reply.value, floor)
            if not isinstance(reply, LeaseGranted):
                continue
            value = self.truth[key]
            for _ in range(self.chance.randrange(3)):
                await self.ask(store, Get("none"))  # The load takes a few round trips.
            stored = await self.ask(store, Set(key, value, 60.0, tags, lease=reply.token))
            self.stored += type(stored).__name__ == "Stored"

    async def writer(self, store: Any) -> None:
        for _ in range(OPERATIONS):
            how = self.chance.choice(("delete", "pattern", "tag", "tag", "tags", "clear", "write", "touch", "lose"))
            key, tag = self.chance.choice(self.keys), self.chance.choice(self.tags)
            if how == "touch":
                await self.ask(store, Touch(key, 90.0))
                continue
            if how == "lose":
                sequence = store._space.sequence
                lost = self.chance.choice(
                    ([sequence], [store._space.counter(tag)], [sequence, store._space.counter(tag)])
                )
                self.story.append(f"lost: {lost}")
                await lose(store, *lost)
                continue
            affected = {
                "tag": [each for each in self.keys if tag in self.tags_of[each]],
                "tags": self.keys,
                "clear": self.keys,
            }.get(how, [key])
            async with AsyncExitStack() as held:
                for each in sorted(affected):
                    await held.enter_async_context(self.locks[each])
                for each in affected:
                    self.truth[each] += 1
                versions = {each: self.truth[each] for each in affected}
                self.story.append(f"truth: {versions}")
                for request in self.changes(how, key, tag, versions):
                    reply = await self.ask(store, request)
                    while isinstance(reply, Failed):
                        reply = await self.ask(store, request)
                self.floor.update(versions)
                self.story.append(f"made known: {versions}")

    def changes(self, how: str, key: str, tag: str, versions: dict[str, int]) -> list[Request[Any]]:
        match how:
            case "delete":
                return [Delete(key)]
            case "pattern":
                return [DeletePattern(f"{key}*")]
            case "tag":
                return [InvalidateTags((tag,))]
            case "tags":
                return [InvalidateTags(tuple(self.tags))]
            case "clear":
                return [Clear()]
        tags = self.tags_of[key]
        plain: list[Request[Any]] = [Set(key, versions[key], 60.0, tags), SetMany({key: versions[key]}, 60.0, tags)]
        # A conditional write may not take effect, so a delete precedes it.
        careful = [Add(key, versions[key], 60.0, tags), CompareAndSet(key, versions[key], 1.0, 60.0, tags)]
        return [self.chance.choice(plain)] if self.chance.random() < 0.7 else [Delete(key), self.chance.choice(careful)]


async def open_stores(servers: Sequence[Server], stack: AsyncExitStack) -> list[Any]:
    """Open stores of one namespace, each with separate connections."""
    places = [Endpoint(host=server.host, port=server.port) for server in servers]
    connector = Connector(health_interval=None, max_connections=1)
    stores: list[Any] = []
    for _ in range(STORES):
        store: Any
        if len(servers) == 1:
            store = RedisStore(places, connector, namespace="schedule")
        else:
            store = RedisClusterStore(places, connector, namespace="schedule")
        await store.open()
        stack.push_async_callback(store.close)
        for connection in await connections(store):
            await connection.call("PING")
        stores.append(store)
    return stores


async def connections(store: Any) -> list[RedisConnection]:
    """Return the connection of a store to each of its servers, connecting if needed."""
    if isinstance(store, RedisStore):
        assert store._pool is not None
        return [await store._pool.connect()]
    return [await store._router.topology.node(place).pool.connect() for place in store._router.topology.map.endpoints()]


async def replay(seed: int, servers: Sequence[Server]) -> World:
    """Run one seed. Its `story` records every step, even if the run fails."""
    async with AsyncExitStack() as stack:
        stores = await open_stores(servers, stack)
        with Gate() as gate:
            world = World(seed, stores, gate)
            try:
                await world.run()
            except AssertionError as error:
                world.story.append(str(error))
    return world


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--cluster", action="store_true")
    arguments = parser.parse_args()
    with ExitStack() as servers_of:
        running: Sequence[Server]
        if arguments.cluster:
            running = servers_of.enter_context(run_redis_cluster())
        else:
            running = [servers_of.enter_context(run_redis())]
        print(*asyncio.run(replay(arguments.seed, running)).story, sep="\n")
