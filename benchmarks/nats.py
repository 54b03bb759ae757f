"""A request to a worker over NATS beside a bare request and reply of nats-py, each answered by a process of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

import nats

from cachebus import open_cache
from cachebus.testing.servers import Server, run_nats

from .timing import Bar, Contender, Row, measure_async

CALLERS = {1: 500, 10: 2_000, 100: 5_000, 1000: 10_000}
"""How many callers there are, and how many operations they share in a round."""

REACH = {1: 0.8, 100: 4.0}
"""Our rate over nats-py's, at least."""

PEER = "nats-py request"
VALUE = bytes(100)
NAMESPACE = "bench"

WORKER = """
import asyncio, sys
from cachebus import Node, Settings

async def main():
    settings = Settings(namespace=sys.argv[2], backends=["memory://"], bus=sys.argv[1])
    async with Node(settings, serve=True):
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""

RESPONDER = """
import asyncio, sys
import nats

async def main():
    client = await nats.connect(sys.argv[1])

    async def answer(msg):
        await msg.respond(bytes(100))

    await client.subscribe(sys.argv[2], cb=answer)
    await client.flush()
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def running(script: str, server: Server, name: str) -> Generator[None]:
    """A process that answers, from when it says `up`."""
    process = subprocess.Popen([sys.executable, "-c", script, server.url, name], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield
    finally:
        process.kill()
        process.communicate()


def by(callers: int, operation: Callable[[], Awaitable[Any]]) -> Callable[[int], Awaitable[None]]:
    """Work that `callers` tasks share, each waiting for one answer before it asks again."""

    async def work(operations: int) -> None:
        async def caller() -> None:
            for _ in range(operations // callers):
                await operation()

        await asyncio.gather(*(caller() for _ in range(callers)))

    return work


async def compare(server: Server, rounds: int) -> list[Row]:
    """Every row."""
    theirs = await nats.connect(server.url)
    rows: list[Row] = []

    async def request() -> None:
        await theirs.request("bare", b"user:1", timeout=30.0)

    try:
        async with open_cache("bus:primary", bus=server.url, namespace=NAMESPACE, timeout=30.0) as ours:
            await ours.set("user:1", VALUE)
            for callers, count in CALLERS.items():
                row = Row(
                    f"get of {len(VALUE)} bytes from a worker, {callers} callers",
                    Contender("cachebus", by(callers, lambda: ours.get("user:1"))),
                    [Contender(PEER, by(callers, request))],
                    [Bar(PEER, 1 / REACH[callers])] if callers in REACH else [],
                )
                rows.append(await measure_async(row, operations=count, rounds=rounds))
    finally:
        await theirs.close()
    return rows


def rows(rounds: int = 7) -> list[Row]:
    """Every row of this module, against a server of its own."""
    with run_nats() as server, running(WORKER, server, NAMESPACE), running(RESPONDER, server, "bare"):
        return asyncio.run(compare(server, rounds))
