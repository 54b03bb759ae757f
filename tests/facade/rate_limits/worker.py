"""One of several processes that share a limit: `python -m tests.facade.rate_limits.worker JSON`.

It prints `ready`, starts when a line arrives, and prints its results as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from cachebus import RateLimited, open_cache


async def main(
    backend: str, callers: int, seconds: float, limit: dict[str, Any], until_refused: bool = False, **options: Any
) -> None:
    went: list[float] = []
    refused = 0

    async with open_cache(backend, timeout=20.0, **options) as cache:
        await cache.health()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        began = time.time()
        until = time.monotonic() + seconds

        async def call() -> None:
            nonlocal refused
            # Continue until the limit is reached, however slow the machine is.
            while time.monotonic() < until or (until_refused and not refused):
                try:
                    async with cache.rate_limit("shared", **limit):
                        went.append(time.time())
                except RateLimited:
                    refused += 1

        await asyncio.gather(*(call() for _ in range(callers)))
    print(json.dumps({"began": began, "went": went, "refused": refused}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
