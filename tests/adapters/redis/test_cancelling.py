"""Calls cancelled at random moments: the other calls get the value of their own key."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import anyio
import pytest

from cachebus import Cache, CacheError, CacheTimeoutError
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import Server, redis_command, run_redis_cluster

from ...faults.scene import guarded
from ...lateness import within

KEYS = 200
ROUNDS = 60


async def sync(function: Any, *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments)


class Callers:
    """Runs calls that are cancelled at random or time out, and counts their outcomes."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self.cache = cache
        self.chance = random.Random(seed)
        self.wrong: list[Any] = []
        self.came: Counter[str] = Counter()
        self.counted: dict[str, list[int]] = {}

    async def fill(self) -> None:
        for number in range(KEYS):
            await self.cache.set(f"k{number}", f"v{number}")

    async def one(self, number: int) -> None:
        """Make one call of a random kind, whose result identifies its key."""
        cache, key, value = self.cache, f"k{number}", f"v{number}"
        try:
            match self.chance.randrange(6):
                case 0:
                    await cache.set(key, value)
                case 1:
                    others = [f"k{self.chance.randrange(KEYS)}" for _ in range(5)]
                    for name, found in (await cache.get_many([key, *others])).items():
                        self.expect(name, found, f"v{name[1:]}")
                case 2:
                    self.counted.setdefault(f"n{number}", []).append(await cache.increment(f"n{number}"))
                case _:
                    self.expect(key, await cache.get(key), value)
            self.came["answered"] += 1
        except CacheTimeoutError:
            self.came["late"] += 1
        except CacheError as error:
            self.came[type(error).__name__] += 1

    def expect(self, key: str, found: Any, value: str) -> None:
        if found != value:
            self.wrong.append((key, found))

    async def round(self) -> None:
        """Make concurrent calls, and cancel some before or after they are sent."""
        chance = self.chance
        tasks = [asyncio.create_task(self.one(chance.randrange(KEYS))) for _ in range(chance.randrange(1, 60))]
        leaving = chance.sample(tasks, chance.randrange(len(tasks) + 1) // 2)
        while leaving:
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(chance.choice([0, 0, 0.0005, 0.002]))
            leaving.pop().cancel()
        _, hanging = await asyncio.wait(tasks, timeout=within(3.0))
        assert not hanging
        self.came["cancelled"] += sum(task.cancelled() for task in tasks)

    async def served(self) -> None:
        """Wait until the cache has recovered by itself."""
        with anyio.fail_after(within(2.0)):
            while True:
                with contextlib.suppress(CacheError):
                    self.expect("k7", await self.cache.get("k7"), "v7")
                    return
                await asyncio.sleep(0.02)

    def verify(self) -> None:
        """Check that no call got the result of another call, and that no count was returned twice."""
        assert self.wrong == []
        for name, counts in self.counted.items():
            assert len(set(counts)) == len(counts), name
        assert self.came["answered"] > ROUNDS
        assert self.came["cancelled"] > ROUNDS


@pytest.mark.parametrize("seed", range(6))
async def test_each_value_belongs_to_its_key_whoever_goes_away(server: Server, seed: int) -> None:
    await sync(redis_command, server, "FLUSHALL")
    chance = random.Random(seed)
    with Proxy.before(server) as proxy:
        options = f"?window={chance.choice([1, 2, 8])}&max_connections={chance.choice([1, 2])}"
        before = len(asyncio.all_tasks())
        async with guarded(proxy.url(server.url) + options) as cache:
            callers = Callers(cache, seed)
            await callers.fill()
            for number in range(ROUNDS):
                if number % 10 == 0:
                    # With a delay close to the time limit of a batch, some calls time out.
                    await sync(lambda: proxy.switch("latency", seconds=chance.choice([0.0, 0.001, 0.005])))
                if number % 20 == 19:
                    await sync(proxy.cut)
                await callers.round()
            callers.verify()
            assert proxy.open_connections <= 2
            await sync(proxy.switch, "pass")
            await callers.served()
        with anyio.fail_after(within(2.0)):
            while proxy.open_connections or len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(3))
async def test_each_value_belongs_to_its_key_whoever_is_late(server: Server, seed: int) -> None:
    await sync(redis_command, server, "FLUSHALL")
    with Proxy.before(server) as proxy:
        async with guarded(proxy.url(server.url) + "?health_check_interval=none") as cache:
            callers = Callers(cache, seed)
            await callers.fill()
            for number in range(12):
                # The server is silent for longer than the time limit of a batch, then answers every request.
                await sync(proxy.switch, "half_open" if number % 3 == 1 else "pass")
                tasks = [asyncio.create_task(callers.one(callers.chance.randrange(KEYS))) for _ in range(40)]
                _, hanging = await asyncio.wait(tasks, timeout=within(3.0))
                assert not hanging
            await sync(proxy.switch, "pass")
            await callers.served()
            for _ in range(5):
                await asyncio.gather(*(callers.one(number) for number in range(KEYS)))
            assert callers.wrong == []
            assert callers.came["late"] > 0
            assert proxy.connections <= 3, "a timeout does not cost a connection"


async def test_each_value_belongs_to_its_key_in_a_cluster(anyio_backend: str) -> None:
    with ExitStack() as stack:
        servers: Sequence[Server] = await sync(stack.enter_context, run_redis_cluster())
        url = "redis+cluster://" + ",".join(f"{each.host}:{each.port}" for each in servers)
        async with guarded(url) as cache:
            callers = Callers(cache, 1)
            await callers.fill()
            for _ in range(ROUNDS):
                await callers.round()
            callers.verify()
            for server in servers:
                clients = (await sync(redis_command, server, "CLIENT", "LIST", "TYPE", "normal")).splitlines()
                assert sum(b"cmd=client" not in line for line in clients if line.startswith(b"id=")) <= 2
