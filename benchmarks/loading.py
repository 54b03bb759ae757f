"""Loading: a hit and a miss of `get_or_load`, and many callers of one cold key in two processes."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable

from cachebus import open_cache
from cachebus.testing.servers import run_memcached, run_redis
from examples import invalidate_during_load

from .timing import Bar, Contender, Figure, Row, announce, measure_async

CALLERS = 500
LOADER = 0.01
ROUNDS = 5

WORKERS = {
    "cachebus": """
async def main(url, load, calls):
    from cachebus import open_cache
    async with open_cache(url, namespace="bench") as cache:
        await cache.health()
        await calls(lambda: cache.get_or_load("key", load, ttl=60))
""",
    "cashews, lock": """
async def main(url, load, calls):
    from cashews import Cache
    cache = Cache()
    cache.setup(url)
    await cache.ping()
    decorated = cache(ttl="60s", key="key", lock=True)(load)
    await calls(decorated)
    await cache.close()
""",
}

_AROUND = """
import asyncio, gc, json, sys, time
{main}
loads = 0
async def load():
    global loads
    loads += 1
    await asyncio.sleep({loader})
    return "value"
async def calls(one):
    gc.collect()  # A full collection takes 30 ms, and would affect some runs and not others.
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began = time.perf_counter()
    values = await asyncio.gather(*(one() for _ in range({callers})))
    print(json.dumps([time.perf_counter() - began, loads, len(values)]), flush=True)
asyncio.run(main(sys.argv[1], load, calls))
"""


def fleet(which: str, url: str) -> tuple[float, int]:
    """Return the seconds until the slower of two processes has all its values, and the loads of both."""
    source = _AROUND.format(main=WORKERS[which], loader=LOADER, callers=CALLERS)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", source, url]
    workers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        for each in workers:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        for each in workers:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        results = [json.loads(each.stdout.readline()) for each in workers if each.stdout is not None]
    finally:
        for each in workers:
            each.kill()
            each.communicate()
    return max(result[0] for result in results), sum(result[1] for result in results)


async def _one_process() -> list[Row]:
    async def load() -> int:
        return 1

    def repeated(call: Callable[[int], Awaitable[object]]) -> Callable[[int], Awaitable[None]]:
        async def work(operations: int) -> None:
            for number in range(operations):
                await call(number)

        return work

    async with open_cache() as cache:
        await cache.set("key", 1)
        fresh = itertools.count()
        get, same_get = (Contender("get", repeated(lambda _: cache.get("key"))) for _ in range(2))
        hit = Contender("get_or_load", repeated(lambda _: cache.get_or_load("key", load, ttl=60)))
        miss = Contender("get_or_load", repeated(lambda _: cache.get_or_load(f"k{next(fresh)}", load, ttl=60)))
        hits = Row("get_or_load, hit, memory", hit, [get], [Bar("get", at_most=1.2)], clock="processor")
        misses = Row("get_or_load, miss, memory", miss, [same_get], clock="processor")
        return [await measure_async(hits, 5_000, 25), await measure_async(misses, 500, 9)]


def rows() -> list[Row]:
    """Return the rows for a hit and a miss of `get_or_load`, against `get`."""
    return asyncio.run(_one_process())


def figures() -> list[Figure]:
    """Return the figures for two processes with one cold key, and for an invalidation during a load."""
    runs: dict[str, list[tuple[float, int]]] = {which: [] for which in WORKERS}
    announce(f"2 x {CALLERS} callers, one cold key, Redis")
    for _ in range(ROUNDS):
        for which, done in runs.items():
            with run_redis() as server:
                done.append(fleet(which, server.url))
    ours, theirs = (runs[which] for which in WORKERS)
    ratio = statistics.median(mine[0] / their[0] for mine, their in zip(ours, theirs, strict=True))
    announce(f"2 x {CALLERS} callers, one cold key, Memcached")
    memcached: list[tuple[float, int]] = []
    for _ in range(ROUNDS):
        with run_memcached() as server:
            memcached.append(fleet("cachebus", server.url))
    with run_redis() as server:
        table = invalidate_during_load.results(server.url)
    fresh = set(table["cachebus"].values()) == {2}
    return [
        *_fleets("Redis", ours),
        Figure(
            "one cold key, Redis / cashews with its lock",
            f"{ratio:.2f}x of {_median(theirs):.1f} ms",
            "<= 1.2x",
            ratio <= 1.2,
        ),
        *_fleets("Memcached", memcached),
        Figure("cachebus: read after an invalidation during a load", "new" if fresh else "OLD", "new", fresh),
        *(
            Figure(f"{which}: the same", ", ".join(f"{way} {_read(value)}" for way, value in row.items()))
            for which, row in table.items()
            if which != "cachebus"
        ),
    ]


def _fleets(store: str, runs: list[tuple[float, int]]) -> list[Figure]:
    title = f"2 x {CALLERS} callers, one cold key, {store}, a loader of {LOADER * 1e3:g} ms"
    loads = [run[1] for run in runs]
    return [
        Figure(title, f"{_median(runs):.1f} ms"),
        Figure(
            f"one cold key, {store}, loads of {len(runs)} runs", ", ".join(map(str, loads)), "1 each", set(loads) == {1}
        ),
    ]


def _median(runs: list[tuple[float, int]]) -> float:
    return statistics.median(seconds for seconds, _ in runs) * 1e3


def _read(value: object) -> str:
    return {1: "OLD", 2: "new"}.get(value, str(value)) if isinstance(value, int) else str(value)
