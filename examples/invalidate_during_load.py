"""What other caches lose: a load begins, the row changes and its key is deleted, the load ends, somebody reads.

`python examples/invalidate_during_load.py` plays it with cachebus, and with those of cashews, aiocache and dogpile.cache that
are installed (`pip install cachebus[bench]`). The source holds 1 at first and 2 from the delete on: a read that gives 1 is
out of date, and stays so until the entry expires.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable
from typing import Any


class Source:
    """A row, and a slow way to read it."""

    def __init__(self) -> None:
        self.row = 1
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def load(self) -> int:
        value = self.row
        self.begun.set()
        await self.go_on.wait()
        return value


async def play(
    get_or_load: Callable[[Callable[[], Awaitable[int]]], Awaitable[int]], delete: Callable[[], Awaitable[Any]]
) -> int:
    """The interleaving; what the last read gives."""
    source = Source()
    first = asyncio.ensure_future(get_or_load(source.load))
    await source.begun.wait()
    source.row = 2
    await delete()
    source.go_on.set()
    await first
    return await get_or_load(source.load)


async def with_cachebus() -> int:
    from cachebus import open_cache

    async with open_cache() as cache:
        return await play(lambda load: cache.get_or_load("row", load, ttl=60), lambda: cache.delete("row"))


async def with_cashews() -> int:
    from cashews import Cache

    cache = Cache()
    cache.setup("mem://")
    return await play(lambda load: cache(ttl="60s", key="row", lock=True)(load)(), lambda: cache.delete("row"))


async def with_aiocache() -> int:
    from aiocache import cached_stampede

    loaders: list[Callable[[], Awaitable[int]]] = []

    async def newest() -> int:
        return await loaders[-1]()

    decorate: Any = cached_stampede(key="row", ttl=60)
    read = decorate(newest)

    def get_or_load(load: Callable[[], Awaitable[int]]) -> Any:
        loaders.append(load)
        return read()

    return await play(get_or_load, lambda: read.cache.delete("row"))


async def with_dogpile() -> int:
    from dogpile.cache import make_region

    region = make_region().configure("dogpile.cache.memory", expiration_time=60)
    loop = asyncio.get_running_loop()

    def get_or_load(load: Callable[[], Awaitable[int]]) -> Awaitable[int]:
        async def call() -> int:
            return await load()

        def create() -> int:
            return asyncio.run_coroutine_threadsafe(call(), loop).result()

        return asyncio.to_thread(region.get_or_create, "row", create)

    return await play(get_or_load, lambda: asyncio.to_thread(region.delete, "row"))


PLAYERS = {
    "cachebus": with_cachebus,
    "cashews": with_cashews,
    "aiocache": with_aiocache,
    "dogpile.cache": with_dogpile,
}


def main() -> None:
    for name, player in PLAYERS.items():
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            print(f"{name:14} is not installed")
            continue
        value = asyncio.run(player())
        print(f"{name:14} reads {value}: {'up to date' if value == 2 else 'what was deleted'}")


if __name__ == "__main__":
    main()
