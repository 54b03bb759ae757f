"""A request to a worker over NATS against a bare nats-py request, each answered by another process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

import nats

from cachebus import open_cache
from cachebus.testing.servers import Server, run_nats

from .timing import Bar, Contender, Row, measure_async, shared

CALLERS = {1: 500, 10: 2_000, 100: 5_000, 1000: 10_000}
"""Operations per round, by number of callers."""

REACH = {1: 0.95, 10: 1.6, 100: 3.5, 1000: 5}
"""Minimum of our rate over nats-py's."""

PEER = "nats-py request"
VALUE = bytes(100)
NAMESPACE = "bench"
KEYS = ["user:1"] * 1_000

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
    """Run a process that answers requests; enter the block once it has printed `up`."""
    process = subprocess.Popen([sys.executable, "-c", script, server.url, name], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield
    finally:
        process.kill()
        process.communicate()


async def compare(server: Server, rounds: int) -> list[Row]:
    """Return all rows."""
    theirs = await nats.connect(server.url)
    rows: list[Row] = []

    async def request(key: str) -> None:
        await theirs.request("bare", key.encode(), timeout=30.0)

    try:
        async with open_cache("bus:primary", bus=server.url, namespace=NAMESPACE, timeout=30.0) as ours:
            await ours.set("user:1", VALUE)
            for callers, count in CALLERS.items():
                row = Row(
                    f"get of {len(VALUE)} bytes from a worker over NATS, {callers} caller{'s' * (callers > 1)}",
                    Contender("cachebus", shared(callers, ours.get, KEYS)),
                    [Contender(PEER, shared(callers, request, KEYS))],
                    [Bar(PEER, at_least=REACH[callers])],
                )
                rows.append(await measure_async(row, operations=count, rounds=rounds))
    finally:
        await theirs.close()
    return rows


def rows(rounds: int = 7) -> list[Row]:
    """Return all rows of this module, with a new server."""
    with run_nats() as server, running(WORKER, server, NAMESPACE), running(RESPONDER, server, "bare"):
        return asyncio.run(compare(server, rounds))
