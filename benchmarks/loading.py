"""Loading: a hit through `get_or_load`, a miss, and many callers of one cold key in two processes."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

from cachebus import open_cache
from cachebus.testing.servers import run_memcached, run_redis
from examples import invalidate_during_load

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
    gc.collect()  # A full collection takes 30 ms of its own, and would fall into some runs and not into others.
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began = time.perf_counter()
    values = await asyncio.gather(*(one() for _ in range({callers})))
    print(json.dumps([time.perf_counter() - began, loads, len(values)]), flush=True)
asyncio.run(main(sys.argv[1], load, calls))
"""


def fleet(which: str, url: str) -> tuple[float, int]:
    """Seconds until the slower of two processes has all its values, and the loads of both."""
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


async def _seconds(work: dict[str, tuple[Callable[[int], Awaitable[object]], int]]) -> dict[str, float]:
    """Seconds of each work, the least of many rounds that take turns: of a busy machine that is the quietest moment."""
    least = dict.fromkeys(work, float("inf"))
    for _ in range(10 * ROUNDS):
        for name, (call, times) in work.items():
            began = time.perf_counter()
            for number in range(times):
                await call(number)
            least[name] = min(least[name], (time.perf_counter() - began) / times)
    return least


async def one_process() -> dict[str, float]:
    """Seconds of a `get` hit, a `get_or_load` hit and a `get_or_load` miss, on the memory store."""

    async def load() -> int:
        return 1

    async with open_cache() as cache:
        await cache.set("key", 1)
        fresh = iter(range(10**9))
        return await _seconds(
            {
                "get, hit": (lambda _: cache.get("key"), 2_000),
                "get_or_load, hit": (lambda _: cache.get_or_load("key", load, ttl=60), 2_000),
                "get_or_load, miss": (lambda _: cache.get_or_load(f"k{next(fresh)}", load, ttl=60), 200),
            }
        )


def main() -> bool:
    """Print the figures; says whether a hit costs no more than 1.3 of a `get`, and a cold key of ours one load."""
    times = asyncio.run(one_process())
    for name, seconds in times.items():
        print(f"{name:20} {seconds * 1e6:8.2f} us")
    print(f"{'hit over get':20} {times['get_or_load, hit'] / times['get, hit']:8.2f} x  (reach: 1.3)")
    good = times["get_or_load, hit"] <= 1.3 * times["get, hit"]
    print(f"2 x {CALLERS} callers, one cold key on Redis, a loader of {LOADER * 1e3:g} ms (reach: 1 load, 60 ms):")
    # In turns, so that a busy moment of the machine meets both.
    runs: dict[str, list[tuple[float, int]]] = {which: [] for which in WORKERS}
    for _ in range(ROUNDS):
        for which, done in runs.items():
            with run_redis() as server:
                done.append(fleet(which, server.url))
    for which, done in runs.items():
        seconds = [run[0] * 1e3 for run in done]
        loads = [run[1] for run in done]
        print(f"  {which:18} {statistics.median(seconds):8.1f} ms, best {min(seconds):.1f} ms, loads {loads}")
    ours, theirs = (runs[which] for which in WORKERS)
    ratio = statistics.median(mine[0] / their[0] for mine, their in zip(ours, theirs, strict=True))
    print(f"  {'ours over cashews':18} {ratio:8.2f} x")
    good = good and all(run[1] == 1 for run in ours)
    print(f"2 x {CALLERS} callers, one cold key on Memcached:")
    on_memcached: list[tuple[float, int]] = []
    for _ in range(ROUNDS):
        with run_memcached() as server:
            on_memcached.append(fleet("cachebus", server.url))
    milliseconds = statistics.median(run[0] for run in on_memcached) * 1e3
    print(f"  {'cachebus':18} {milliseconds:8.1f} ms, loads {[run[1] for run in on_memcached]}")
    good = good and all(run[1] == 1 for run in on_memcached)
    print(
        "A load begins, the row changes and its key is invalidated, the load ends; what is read then (2 is up to date):"
    )
    with run_redis() as server:
        table = invalidate_during_load.results(server.url)
    for which, row in table.items():
        print(f"  {which:18} {', '.join(f'{way} {value}' for way, value in row.items())}")
    return good and set(table["cachebus"].values()) == {2}


if __name__ == "__main__":
    main()
