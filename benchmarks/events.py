"""Events over NATS: events per second to one subscriber in another process, and the caller's time per event.

These are figures, not ratios. A bare nats-py subscriber is shown for comparison.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from typing import Any

from cachebus.bus import Emitter
from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.options import NatsOptions
from cachebus.messages import CacheSet
from cachebus.testing.servers import Server, run_nats

from .timing import Figure, announce

NAMESPACE = "bench"
COUNT = 20_000
ROUNDS = 5
LONGEST = 60.0
"""Seconds that a burst may take until its last event arrives."""
RATE, ADDED = 80_000, 4.0
"""Bars: minimum events per second, and maximum microseconds per event for the caller."""

LISTENER = """
import asyncio, sys, time
import nats
from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.options import NatsOptions
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


async def last_line(listener: Any) -> str:
    """Return the listener's line at the end of a burst. Raises `TimeoutError` if the last event was lost."""
    try:
        async with asyncio.timeout(LONGEST):
            line: str = await asyncio.to_thread(listener.stdout.readline)
            return line
    except TimeoutError:
        listener.kill()  # This ends the reading thread.
        raise


async def bursts(server: Server, *, as_json: bool, listener: Any) -> tuple[float, float]:
    """Return medians: events per second until the listener has the last one, and the caller's time per event in us."""
    options = NatsOptions(servers=(f"{server.host}:{server.port}",), events_as_json=as_json, outbox=COUNT + 1)
    rates: list[float] = []
    added: list[float] = []
    async with NatsBus(NAMESPACE, options) as bus:
        emitter = Emitter(bus, "primary")
        for _ in range(ROUNDS):
            begun, spent = time.time(), 0.0
            for first in range(0, COUNT, 100):
                before = time.thread_time()
                for number in range(first, first + 100):
                    emitter.emit(CacheSet, f"user:{number}", 1.0, 60.0)
                spent += time.thread_time() - before
                await asyncio.sleep(0)
            emitter.emit(CacheSet, "end")
            line = await last_line(listener)
            rates.append(COUNT / (float(line.split()[0]) - begun))
            added.append(spent / COUNT * 1e6)
    return statistics.median(rates), statistics.median(added)


def measure(server: Server, which: str, *, as_json: bool) -> tuple[float, float]:
    """Return both figures, with a listener in another process."""
    arguments = [which, f"{server.host}:{server.port}", str(COUNT * 2)]
    listener = subprocess.Popen([sys.executable, "-c", LISTENER, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "up\n"
        return asyncio.run(bursts(server, as_json=as_json, listener=listener))
    finally:
        listener.kill()
        listener.communicate()


def figures() -> list[Figure]:
    """Return all figures. The bars apply to JSON, the default, between two cachebus processes."""
    done: list[Figure] = []
    with run_nats() as server:
        for which, as_json in (("ours", True), ("ours", False), ("bare", True)):
            form, listener = "JSON" if as_json else "MessagePack", "cachebus" if which == "ours" else "bare nats-py"
            announce(title := f"events over NATS, {form}, to one {listener} subscriber")
            rate, added = measure(server, which, as_json=as_json)
            judged = which == "ours" and as_json
            done.append(Figure(title, f"{rate:,.0f}/s", f">= {RATE:,}/s" * judged, not judged or rate >= RATE))
            if which == "ours":
                bar = f"<= {ADDED:g} us" * judged
                done.append(
                    Figure(
                        f"one event over NATS, {form}, for the caller",
                        f"{added:.2f} us",
                        bar,
                        not judged or added <= ADDED,
                    )
                )
    return done
