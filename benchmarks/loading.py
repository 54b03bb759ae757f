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
import asyncio, json, sys, time
{main}
loads = 0
async def load():
    global loads
    loads += 1
    await asyncio.sleep({loader})
    return "value"
async def calls(one):
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


async def _seconds(work: Callable[[int], Awaitable[object]], times: int) -> float:
    rounds: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for number in range(times):
            await work(number)
        rounds.append((time.perf_counter() - began) / times)
    return statistics.median(rounds)


async def one_process() -> dict[str, float]:
    """Seconds of a `get` hit, a `get_or_load` hit and a `get_or_load` miss, on the memory store."""

    async def load() -> int:
        return 1

    async with open_cache() as cache:
        await cache.set("key", 1)
        fresh = iter(range(10**9))
        return {
            "get, hit": await _seconds(lambda _: cache.get("key"), 20_000),
            "get_or_load, hit": await _seconds(lambda _: cache.get_or_load("key", load, ttl=60), 20_000),
            "get_or_load, miss": await _seconds(lambda _: cache.get_or_load(f"k{next(fresh)}", load, ttl=60), 2_000),
        }


def main() -> bool:
    """Print the figures; says whether a hit costs no more than 1.3 of a `get`, and a cold key of ours one load."""
    times = asyncio.run(one_process())
    for name, seconds in times.items():
        print(f"{name:20} {seconds * 1e6:8.2f} us")
    print(f"{'hit over get':20} {times['get_or_load, hit'] / times['get, hit']:8.2f} x  (reach: 1.3)")
    good = times["get_or_load, hit"] <= 1.3 * times["get, hit"]
    print(f"2 x {CALLERS} callers, one cold key on Redis, a loader of {LOADER * 1e3:g} ms (reach: 1 load, 60 ms):")
    for which in WORKERS:
        runs: list[tuple[float, int]] = []
        for _ in range(ROUNDS):
            with run_redis() as server:
                runs.append(fleet(which, server.url))
        seconds = statistics.median(run[0] for run in runs)
        print(f"  {which:18} {seconds * 1e3:8.1f} ms, loads {[run[1] for run in runs]}")
        good = good and (which != "cachebus" or all(run[1] == 1 for run in runs))
    print(f"2 x {CALLERS} callers, one cold key on Memcached:")
    runs = []
    for _ in range(ROUNDS):
        with run_memcached() as memcached:
            runs.append(fleet("cachebus", memcached.url))
    seconds = statistics.median(run[0] for run in runs)
    print(f"  {'cachebus':18} {seconds * 1e3:8.1f} ms, loads {[run[1] for run in runs]}")
    return good and all(run[1] == 1 for run in runs)


if __name__ == "__main__":
    main()
