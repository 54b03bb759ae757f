"""`make path`: the calls of our own functions that an operation makes, and the files that contain them.

    python -m benchmarks.path                   # a table of every operation
    python -m benchmarks.path redis-hit         # one operation, and its path

`recorder.py` defines a call. Calls in every thread count, including callbacks and work after the reply, until all
loops are idle. Threads with their own event loops stand for other processes, so that both ends are counted. Calls
started by a timer do not count. Other work may still add calls to a run: the shortest path of many runs counts, and
five runs must agree on it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from cachebus import Cache, Node, Settings, open_cache, open_sync_cache
from cachebus.testing.servers import run_memcached, run_nats, run_redis

from .recorder import Call, RecordedLoop, Recorder
from .timing import Figure, announce

BOUNDS = {
    "memory-hit": 3,
    "memory-hit-plain": 3,
    "memory-set": 6,
    "redis-hit": 25,
    "redis-set": 28,
    "redis-load-hit": 31,
    "redis-load-miss": 125,
    "memcached-hit": 32,
    "memcached-set": 38,
    "worker-hit": 58,
    "worker-set": 84,
    "worker-redis-set": 103,
    "event": 40,
}
"""Maximum calls of an operation, at both ends. `tests/benchmarks/test_path.py` checks them."""

REACH = {"memory-hit": 3, "redis-hit": 30, "redis-load-miss": 127, "worker-set": 100}
"""Bars of `make bench`."""

WARM = 40
"""Runs before the first counted one, to warm the caches and to give the adaptive timeouts their samples."""
RUNS, MORE_RUNS = 15, 200
"""Minimum and maximum number of counted runs, until the shortest path has occurred often enough."""
SAME = 5
"""Runs that must make exactly the calls of the shortest path."""
TURNS = 20
"""Loop turns without a call of our functions after which an event loop is idle."""
PAUSE = 0.002
"""Seconds that a server gets to deliver the last message."""

Result = TypeVar("Result")
Run = Callable[[], Awaitable[object]]
Opened = AbstractAsyncContextManager[Run]
Act = Callable[[Cache, int], Awaitable[object]]
"""Operation on a cache; the argument is the number of the run."""


def run_recorded(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in a new `RecordedLoop`."""
    with asyncio.Runner(loop_factory=RecordedLoop) as runner:
        return runner.run(work)


class Loops:
    """Event loops of the other ends, each in its own thread, as if it were another process."""

    def __init__(self) -> None:
        self._loops: list[asyncio.AbstractEventLoop] = []

    @asynccontextmanager
    async def started(self, name: str, end: Callable[[], AbstractAsyncContextManager[object]]) -> AsyncGenerator[None]:
        """Keep `end()` open in a thread of this name until the block ends."""
        here = asyncio.get_running_loop()
        ready: asyncio.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = here.create_future()

        async def run() -> None:
            left = asyncio.Event()
            async with end():
                here.call_soon_threadsafe(ready.set_result, (asyncio.get_running_loop(), left))
                await left.wait()

        with ThreadPoolExecutor(1, thread_name_prefix=name) as threads:
            ended = here.run_in_executor(threads, lambda: run_recorded(run()))
            either: list[asyncio.Future[Any]] = [ready, ended]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()  # Raises the error of the other end.
            loop, left = ready.result()
            self._loops.append(loop)
            try:
                yield
            finally:
                self._loops.remove(loop)
                loop.call_soon_threadsafe(left.set)
                await ended

    async def quiet(self, recorder: Recorder) -> None:
        """Return when no loop has work of cachebus left."""
        here = asyncio.get_running_loop()
        assert isinstance(here, RecordedLoop)
        seen = -1
        while seen != recorder.count:
            seen = recorder.count
            for loop in self._loops:
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_turns(), loop))
            await _turns()
            if self._loops:
                await asyncio.sleep(PAUSE)
                here.by_timer = False  # A timer woke this task, but its next calls belong to the operation.


async def _turns() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


Urls = Mapping[str, str]
"""URLs of the servers `redis`, `memcached` and `nats`, and of `memory`."""

SERVERS = {"redis": run_redis, "memcached": run_memcached, "nats": run_nats}


@dataclass(frozen=True)
class Operation:
    """Operation to count. `open` yields a function that runs it once."""

    title: str
    open: Callable[[Urls, Loops], Opened]
    servers: tuple[str, ...] = ()


@asynccontextmanager
async def plain_hit(urls: Urls, loops: Loops) -> AsyncGenerator[Run]:
    """Open a `SyncCache` for `get`."""
    with open_sync_cache(urls["memory"]) as cache:
        cache.set("key", "value")

        async def run() -> None:
            assert cache.get("key") == "value"

        yield run


def on_cache(act: Act, backend: str = "memory") -> Callable[[Urls, Loops], Opened]:
    """Return an opener for an operation on a cache with one backend."""

    @asynccontextmanager
    async def opened(urls: Urls, loops: Loops) -> AsyncGenerator[Run]:
        async with open_cache(urls[backend], namespace="path") as cache:
            await cache.set("key", "value")
            numbers = itertools.count()
            yield lambda: act(cache, next(numbers))

    return opened


def at_worker(act: Act, backend: str = "memory") -> Callable[[Urls, Loops], Opened]:
    """Return an opener for an operation on a cache whose backend runs in a worker behind NATS."""

    @asynccontextmanager
    async def opened(urls: Urls, loops: Loops) -> AsyncGenerator[Run]:
        settings: Any = {"namespace": "path", "backends": [urls[backend]], "bus": urls["nats"]}
        async with (
            loops.started("worker", lambda: Node(Settings(**settings), serve=True)),
            open_cache("bus:primary", bus=urls["nats"], namespace="path") as cache,
        ):
            await cache.set("key", "value")
            numbers = itertools.count()
            yield lambda: act(cache, next(numbers))

    return opened


@asynccontextmanager
async def event_heard(urls: Urls, loops: Loops) -> AsyncGenerator[Run]:
    """Open a memory cache for a `set` that lasts until its event has reached a listener on another bus."""
    here = asyncio.get_running_loop()
    heard = asyncio.Event()

    @asynccontextmanager
    async def listener() -> AsyncGenerator[None]:
        async def listen(cache: Cache) -> None:
            async for _ in cache.events("cache_set"):
                here.call_soon_threadsafe(heard.set)

        async with open_cache("memory://", bus=urls["nats"], namespace="path") as cache:
            listening = asyncio.create_task(listen(cache))
            yield
            listening.cancel()
            await asyncio.wait([listening])

    async with (
        loops.started("listener", listener),
        open_cache("memory://", bus=urls["nats"], namespace="path") as cache,
    ):
        # The first events may be too early for the listener's subscription.
        while not heard.is_set():
            await cache.set("key", "value", ttl=60)
            await asyncio.sleep(PAUSE)

        async def run() -> None:
            heard.clear()
            await cache.set("key", "value", ttl=60)
            await asyncio.wait_for(heard.wait(), 30)

        yield run


async def hit(cache: Cache, number: int) -> None:
    """Run a `get` that finds its key."""
    assert await cache.get("key") == "value"


async def put(cache: Cache, number: int) -> None:
    """Run a `set` that replaces a value."""
    await cache.set("key", "value", ttl=60)


async def load() -> str:
    """Load a value without waiting."""
    return "value"


async def load_hit(cache: Cache, number: int) -> None:
    """Run a `get_or_load` that finds its key."""
    assert await cache.get_or_load("key", load, ttl=60) == "value"


async def load_miss(cache: Cache, number: int) -> None:
    """Run a `get_or_load` that loads and stores."""
    assert await cache.get_or_load(f"cold:{number}", load, ttl=60) == "value"


OPERATIONS = {
    "memory-hit": Operation("get, hit, memory", on_cache(hit)),
    "memory-hit-plain": Operation("get, hit, memory, SyncCache", plain_hit),
    "memory-set": Operation("set, memory", on_cache(put)),
    "redis-hit": Operation("get, hit, Redis", on_cache(hit, "redis"), ("redis",)),
    "redis-set": Operation("set, Redis", on_cache(put, "redis"), ("redis",)),
    "redis-load-hit": Operation("get_or_load, hit, Redis", on_cache(load_hit, "redis"), ("redis",)),
    "redis-load-miss": Operation("get_or_load, miss, Redis", on_cache(load_miss, "redis"), ("redis",)),
    "memcached-hit": Operation("get, hit, Memcached", on_cache(hit, "memcached"), ("memcached",)),
    "memcached-set": Operation("set, Memcached", on_cache(put, "memcached"), ("memcached",)),
    "worker-hit": Operation("get, hit, worker over NATS, both ends", at_worker(hit), ("nats",)),
    "worker-set": Operation("set, worker over NATS, both ends", at_worker(put), ("nats",)),
    "worker-redis-set": Operation(
        "set, worker over NATS with Redis, both ends", at_worker(put, "redis"), ("nats", "redis")
    ),
    "event": Operation("set, memory, its event at a NATS listener, both ends", event_heard, ("nats",)),
}


class Unsteady(Exception):
    """Raised when no five runs of an operation agree on the shortest path."""


async def _record(operation: Operation, urls: Urls, recorder: Recorder) -> list[Call]:
    loops = Loops()
    paths = Counter[tuple[Call, ...]]()
    async with operation.open(urls, loops) as run:
        for _ in range(WARM):
            await run()
        await loops.quiet(recorder)
        for number in range(MORE_RUNS):
            with recorder.recording():
                await run()
                await loops.quiet(recorder)
            # Calls are ordered only within a thread, because threads run concurrently.
            paths[tuple(sorted(recorder.calls(), key=lambda call: call.thread))] += 1
            shortest = min(paths, key=len)
            if number + 1 >= RUNS and paths[shortest] >= SAME:
                return list(shortest)
    raise Unsteady(
        f"{operation.title}: runs disagree on the shortest path; calls per run: {sorted(map(len, paths.elements()))}"
    )


def record(name: str, urls: Urls) -> list[Call]:
    """Return the calls that an operation makes, against the servers at `urls`. Raises `Unsteady`."""
    recorder = Recorder()
    with recorder.installed():
        return run_recorded(_record(OPERATIONS[name], {"memory": "memory://", **urls}, recorder))


def show_path(calls: list[Call], console: Console) -> None:
    """Print the calls as a tree, one for each thread."""
    threads = list(dict.fromkeys(call.thread for call in calls))
    for thread in threads:
        if len(threads) > 1:
            console.print(f"[bold]{thread}[/bold]")
        for call in calls:
            if call.thread == thread:
                console.print(str(call), highlight=False, markup=False, soft_wrap=True)


def figures() -> list[Figure]:
    """Return the calls of every operation, with their bars."""
    done: list[Figure] = []
    with ExitStack() as stack:
        urls = {name: stack.enter_context(run()).url for name, run in SERVERS.items()}
        for name, operation in OPERATIONS.items():
            announce(operation.title)
            calls = record(name, urls)
            said = f"{len(calls)} calls in {len({call.file for call in calls})} files"
            most = REACH.get(name)
            bar = "" if most is None else f"<= {most} calls"
            done.append(Figure(operation.title, said, bar, most is None or len(calls) <= most))
    return done


def main() -> int:
    """Record the requested operations. Returns 1 if one exceeds its bound."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.path", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "operations", nargs="*", choices=[*OPERATIONS, []], metavar="OPERATION", help=", ".join(OPERATIONS)
    )
    names = parser.parse_args().operations
    console = Console(width=120)
    table = Table("operation", "description", "calls", "files", "bound", title="calls of our own functions")
    good = True
    with ExitStack() as stack:
        urls: dict[str, str] = {}
        for name in names or OPERATIONS:
            operation = OPERATIONS[name]
            for server in set(operation.servers) - set(urls):
                urls[server] = stack.enter_context(SERVERS[server]()).url
            calls = record(name, urls)
            if names:
                console.rule(operation.title)
                show_path(calls, console)
            reached = len(calls) <= BOUNDS[name]
            good = good and reached
            verdict = f"<= {BOUNDS[name]} {'ok' if reached else 'MISSED'}"
            table.add_row(name, operation.title, str(len(calls)), str(len({call.file for call in calls})), verdict)
    console.print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
