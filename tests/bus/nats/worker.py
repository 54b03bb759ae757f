"""A process that serves one actor over NATS until its standard input ends.

    python -m tests.bus.nats.worker host:port namespace actor address visibility

It prints `up` when it serves, or the reason for a failure.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import cast

from cachebus.actors import Actor, BackendActor, Supervisor
from cachebus.adapters.memory.store import MemoryStore
from cachebus.bus import Address, Visibility
from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.options import NatsOptions
from cachebus.messages import CacheError

from .actors import Answering

ACTORS: dict[str, Callable[[], Actor]] = {"answering": Answering, "memory": lambda: BackendActor(MemoryStore())}


async def main(server: str, namespace: str, actor: str, address: str, visibility: str) -> None:
    """Serve."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(sys.stdin, ended.set)
    try:
        async with (
            NatsBus(namespace, NatsOptions(servers=(server,))) as bus,
            Supervisor(bus) as supervisor,
        ):
            await supervisor.start(Address(address), ACTORS[actor], visibility=cast("Visibility", visibility))
            print("up", flush=True)
            await ended.wait()
    except CacheError as error:
        print(repr(error), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
