"""One process of a fleet: so many callers ask for one key at once. `python -m tests.loading.worker URL CALLERS SECONDS LEASE`

It says `ready`, begins when a line comes in, and prints what came of it as JSON. It says `loading` when its loader begins.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from cachebus import open_cache


async def main(url: str, callers: int, seconds: float, lease_ttl: float) -> None:
    loads = 0

    async def load() -> str:
        nonlocal loads
        loads += 1
        print("loading", flush=True)
        await asyncio.sleep(seconds)
        return "value"

    async with open_cache(url, namespace="fleet", timeout=20.0) as cache:
        await cache.health()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        began = time.perf_counter()

        async def call() -> Any:
            return await cache.get_or_load("key", load, ttl=60, lease_ttl=lease_ttl)

        values = await asyncio.gather(*(call() for _ in range(callers)))
        took = time.perf_counter() - began
    print(json.dumps({"loads": loads, "values": sorted(set(values)), "answers": len(values), "took": took}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
