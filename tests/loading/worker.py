"""One process of a fleet, with many concurrent callers for one key.

It prints `ready`, starts when it reads a line, and prints its results as JSON. It prints `loading` when its loader starts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

from cachebus import open_cache


async def main(given: argparse.Namespace) -> None:
    loads = 0

    async def load() -> str:
        nonlocal loads
        loads += 1
        print("loading", flush=True)
        await asyncio.sleep(given.seconds)
        if given.fails:
            raise OSError("the source is away")
        return f"value {given.name}".strip()

    async with open_cache(given.url, bus=given.bus, namespace=given.namespace, timeout=20.0) as cache:
        await cache.health()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        began = time.perf_counter()

        async def call() -> Any:
            return await cache.get_or_load(given.key, load, ttl=given.ttl, stale_for=60.0, lease_ttl=given.lease_ttl)

        answers = await asyncio.gather(*(call() for _ in range(given.callers)), return_exceptions=True)
        took = time.perf_counter() - began
    errors = [each for each in answers if isinstance(each, BaseException)]
    result = {
        "loads": loads,
        "values": sorted({each for each in answers if isinstance(each, str)}),
        "errors": sorted({f"{type(each).__name__}: {getattr(each, 'error', each)}" for each in errors}),
        "answers": len(answers),
        "took": took,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--bus")
    parser.add_argument("--namespace", default="fleet")
    parser.add_argument("--key", default="key")
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.01)
    parser.add_argument("--ttl", type=float, default=60.0)
    parser.add_argument("--lease-ttl", type=float, default=10.0)
    parser.add_argument("--fails", action="store_true")
    parser.add_argument("--name", default="")
    asyncio.run(main(parser.parse_args()))
