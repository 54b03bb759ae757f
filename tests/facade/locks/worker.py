"""A process that takes locks: `python -m tests.facade.locks.worker URL [BUS]`.

Each input line is a command. Each output line is its result.

acquire NAME TTL WAIT            had TOKEN, or the code of the error
release NAME                     released, or the code of the error
lost NAME                        True or False
contend NAME CALLERS TIMES PATH  done; each caller takes the lock TIMES times, and records it in PATH
"""

from __future__ import annotations

import asyncio
import os
import sys

from cachebus import CacheError, open_cache
from cachebus.facade.locks import Lock


async def main(url: str, bus: str | None) -> None:
    locks: dict[str, Lock] = {}
    async with open_cache(url, namespace="fleet", bus=bus, timeout=10.0) as cache:

        async def do(word: str, name: str, *rest: str) -> str:
            match word:
                case "acquire":
                    lock = cache.lock(name, ttl=float(rest[0]), wait=float(rest[1]))
                    locks[name] = await lock.acquire()
                    return f"had {lock.token}"
                case "release":
                    await locks[name].release()
                    return "released"
                case "lost":
                    return str(locks[name].lost)
                case "contend":
                    await contend(name, int(rest[0]), int(rest[1]), rest[2])
                    return "done"
                case _:
                    raise ValueError(word)

        async def contend(name: str, callers: int, times: int, path: str) -> None:
            journal = os.open(path, os.O_WRONLY | os.O_APPEND)

            async def call() -> None:
                for _ in range(times):
                    async with cache.lock(name, wait=60) as lock:
                        os.write(journal, b"enter %d\n" % lock.token)
                        await asyncio.sleep(0)
                        os.write(journal, b"leave %d\n" % lock.token)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(callers):
                    tasks.create_task(call())

        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            try:
                said = await do(*line.split())
            except CacheError as error:
                said = error.code
            print(said, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
