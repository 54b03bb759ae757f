"""Events out to NATS: how many a second reach a subscriber in another process, and what one costs whoever tells it.

`python -m benchmarks.events` prints both. They are figures, not ratios: a bare subscriber of nats-py is shown beside them.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

from cachebus.bus import Emitter
from cachebus.bus.nats import NatsBus
from cachebus.bus.nats_options import NatsOptions
from cachebus.messages import CacheSet
from cachebus.testing.servers import Server, run_nats

NAMESPACE = "bench"
COUNT = 40_000
ROUNDS = 3
REACH_RATE = 80_000
REACH_ADDED = 5.0

LISTENER = """
import asyncio, sys, time
import nats
from cachebus.bus.nats import NatsBus
from cachebus.bus.nats_options import NatsOptions
from cachebus.messages import CacheSet

async def ours(host, count):
    async with NatsBus("bench", NatsOptions(servers=(host,))) as bus:
        with bus.subscribe(CacheSet, capacity=count) as heard:
            await bus.settled()
            print("up", flush=True)
            async for event in heard:
                if event.key == "end":
                    print(time.time(), len(heard), bus.counters.events_received, flush=True)

async def bare(host, count):
    client = await nats.connect(host)
    heard = 0
    async def take(msg):
        nonlocal heard
        heard += 1
        if b'"end"' in msg.data:
            print(time.time(), 0, heard, flush=True)
    await client.subscribe("cachebus.v1.bench.evt.cache_set.*", cb=take)
    await client.flush()
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run({"ours": ours, "bare": bare}[sys.argv[1]](sys.argv[2], int(sys.argv[3])))
"""


async def burst(server: Server, *, as_json: bool, listener: Any) -> tuple[float, float]:
    """Events a second until a listener has had the last one, and microseconds that telling one takes the caller."""
    options = NatsOptions(servers=(f"{server.host}:{server.port}",), events_as_json=as_json, outbox=COUNT + 1)
    async with NatsBus(NAMESPACE, options) as bus:
        emitter = Emitter(bus, "primary")
        best, added = 0.0, float("inf")
        for _ in range(ROUNDS):
            begun, spent = time.time(), 0.0
            for first in range(0, COUNT, 100):
                before = time.perf_counter()
                for number in range(first, first + 100):
                    emitter.tell(CacheSet, f"user:{number}", 1.0, 60.0)
                spent += time.perf_counter() - before
                await asyncio.sleep(0)
            emitter.tell(CacheSet, "end")
            line = await asyncio.to_thread(listener.stdout.readline)
            best = max(best, COUNT / (float(line.split()[0]) - begun))
            added = min(added, spent / COUNT * 1e6)
    return best, added


def measure(server: Server, who: str, *, as_json: bool) -> tuple[float, float]:
    """One figure of each, with a listener of its own process."""
    arguments = [who, f"{server.host}:{server.port}", str(COUNT * 2)]
    listener = subprocess.Popen([sys.executable, "-c", LISTENER, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "up\n"
        return asyncio.run(burst(server, as_json=as_json, listener=listener))
    finally:
        listener.kill()
        listener.communicate()


def main() -> None:
    """Print every figure."""
    with run_nats() as server:
        for who in ("ours", "bare"):
            for as_json in (True, False):
                if who == "bare" and not as_json:
                    continue  # It looks for the end in JSON.
                rate, added = measure(server, who, as_json=as_json)
                form = "JSON" if as_json else "msgpack"
                print(
                    f"{form:8} to {'cachebus' if who == 'ours' else 'bare nats-py'}: {rate:9,.0f} events/s "
                    f"(reach {REACH_RATE:,}), {added:.2f} us to tell one (reach {REACH_ADDED:g})"
                )


if __name__ == "__main__":
    main()
