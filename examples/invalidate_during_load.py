"""An invalidation during a load, in cachebus and in other libraries.

A load begins, the row changes and its key is invalidated, the load ends, and a reader reads the key.

    python examples/invalidate_during_load.py [redis://...]

This runs with cachebus, and with cashews, aiocache and dogpile.cache if they are installed (`pip install
cachebus[bench]`). Each library invalidates by a delete, a tag and a clear and, if you give a Redis URL, by a delete
from another process. The source holds 1 at first, and 2 after the invalidation. A read of 1 is stale until the entry
expires. A dash marks a feature that a library does not have.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

WAYS = ("delete", "tag", "clear", "another process")
Load = Callable[[], Awaitable[int]]
Invalidate = Callable[[], Awaitable[Any]]


class Source:
    """A row with a slow read."""

    def __init__(self) -> None:
        self.row = 1
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def load(self) -> int:
        value = self.row
        self.begun.set()
        await self.go_on.wait()
        return value


async def play(get_or_load: Callable[[Load], Awaitable[int]], invalidate: Invalidate) -> int:
    """Run the interleaving and return the result of the last read."""
    source = Source()
    first = asyncio.ensure_future(get_or_load(source.load))
    await source.begun.wait()
    source.row = 2
    await invalidate()
    source.go_on.set()
    await first
    return await get_or_load(source.load)


async def elsewhere(program: str, *arguments: str) -> None:
    """Run a program in another process."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, *arguments)
    if await process.wait():
        raise RuntimeError("the other process failed")


async def with_cachebus(way: str, url: str, key: str) -> int | None:
    from cachebus import open_cache

    delete = (
        "import sys, cachebus\nwith cachebus.open_sync_cache(sys.argv[1]) as cache: assert cache.delete(sys.argv[2])"
    )
    async with open_cache(url or "memory://") as cache:
        ways: dict[str, Invalidate] = {
            "delete": lambda: cache.delete(key),
            "tag": lambda: cache.invalidate_tags("rows"),
            "clear": cache.clear,
            "another process": lambda: elsewhere(delete, url, key),
        }
        tags = ["rows"] if way == "tag" else []
        return await play(lambda load: cache.get_or_load(key, load, ttl=60, tags=tags), ways[way])


async def with_cashews(way: str, url: str, key: str) -> int | None:
    from cashews import Cache

    delete = (
        "import sys, asyncio, cashews\ncashews.cache.setup(sys.argv[1])\nasyncio.run(cashews.cache.delete(sys.argv[2]))"
    )
    cache = Cache()
    cache.setup(url or "mem://")
    ways: dict[str, Invalidate] = {
        "delete": lambda: cache.delete(key),
        "tag": lambda: cache.delete_tags("rows"),
        "clear": cache.clear,
        "another process": lambda: elsewhere(delete, url, key),
    }
    cache.register_tag("rows", key)
    tags = ("rows",) if way == "tag" else ()
    value = await play(lambda load: cache(ttl="60s", key=key, lock=True, tags=tags)(load)(), ways[way])
    await cache.close()
    return value


async def with_aiocache(way: str, url: str, key: str) -> int | None:
    from aiocache import cached_stampede

    if way not in ("delete", "clear"):
        return None  # aiocache has no tags. Its Redis store is left out, because it stores in the same way.
    loaders: list[Load] = []

    async def newest() -> int:
        return await loaders[-1]()

    decorate: Any = cached_stampede(key=key, ttl=60)
    read = decorate(newest)

    def get_or_load(load: Load) -> Any:
        loaders.append(load)
        return read()

    return await play(get_or_load, lambda: read.cache.delete(key) if way == "delete" else read.cache.clear())


async def with_dogpile(way: str, url: str, key: str) -> int | None:
    from dogpile.cache import make_region

    delete = (
        "import sys\nfrom dogpile.cache import make_region\n"
        "make_region().configure('dogpile.cache.redis', arguments={'url': sys.argv[1]}).delete(sys.argv[2])"
    )
    region: Any = make_region()
    if url:
        region.configure("dogpile.cache.redis", expiration_time=60, arguments={"url": url})
    else:
        region.configure("dogpile.cache.memory", expiration_time=60)
    loop = asyncio.get_running_loop()

    def get_or_load(load: Load) -> Awaitable[int]:
        async def call() -> int:
            return await load()

        def create() -> int:
            return asyncio.run_coroutine_threadsafe(call(), loop).result()

        return asyncio.to_thread(region.get_or_create, key, create)

    ways: dict[str, Invalidate] = {
        "delete": lambda: asyncio.to_thread(region.delete, key),
        "clear": lambda: asyncio.to_thread(region.invalidate),
        "another process": lambda: elsewhere(delete, url, key),
    }
    return await play(get_or_load, ways[way]) if way in ways else None


PLAYERS = {
    "cachebus": with_cachebus,
    "cashews": with_cashews,
    "aiocache": with_aiocache,
    "dogpile.cache": with_dogpile,
}


def results(redis: str = "") -> dict[str, dict[str, int | None]]:
    """Return the last read of each installed library, by kind of invalidation."""
    found: dict[str, dict[str, int | None]] = {}
    for name, player in PLAYERS.items():
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            ways = [way for way in WAYS if redis or way != "another process"]
            found[name] = {
                way: asyncio.run(player(way, redis if way == "another process" else "", f"row {uuid4().hex}"))
                for way in ways
            }
    return found


def main(redis: str = "") -> None:
    """Print the last read of each library; 2 is current."""
    table = results(redis)
    ways = list(table["cachebus"])
    print(f"{'':14}", *(f"{way:>15}" for way in ways))
    for name, row in table.items():
        said = {None: "-", 2: "2", 1: "1, stale"}
        print(f"{name:14}", *(f"{said[row[way]]:>15}" for way in ways))
    for name in PLAYERS:
        if name not in table:
            print(f"{name:14} is not installed")


if __name__ == "__main__":
    main(*sys.argv[1:])
