"""Simulation of several processes over one store: a seed decides every delay, every order and every fault.

A seed always gives the same run. `python -m tests.loading.simulation SEED` replays a run and prints its events; `--seeds N`
runs N seeds, starting with SEED.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import itertools
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar, TypeVar

from cachebus import Cache, CacheError, LoadResult
from cachebus.actors import BackendActor, Supervisor, Timer
from cachebus.actors.runtime.cell import Cell
from cachebus.adapters.memory.store import MemoryStore
from cachebus.bus import Address, Emitter, LocalBus
from cachebus.client.backend_client import BackendClient
from cachebus.client.failure_policy import FailurePolicy
from cachebus.messages import CacheTimeoutError, GetOrLease, Missing, ReleaseLease, RenewLease

T = TypeVar("T")
W = TypeVar("W", bound="World")

PROCESSES, KEYS, TAGS = 3, 2, 2
TIMEOUT = 5.0


class Stuck(AssertionError):
    """Raised when all tasks wait and no event is scheduled."""


class NumberedTask(asyncio.Task[Any]):
    """Task with a sequence number."""

    def __init__(self, coroutine: Any, *, loop: SimulatedLoop, **options: Any) -> None:
        super().__init__(coroutine, loop=loop, **options)
        self.number = loop.next_number()


class SimulatedLoop(asyncio.BaseEventLoop):
    """Event loop without I/O, on simulated time.

    It runs one ready callback at a time, chosen by a seeded generator. Time advances only when no callback is ready.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = random.Random(seed)
        self._now = 0.0
        self._numbers = itertools.count()

    def create_task(self, coro: Any, *, name: object = None, context: Any = None) -> Any:
        # Not by a task factory, with which loads would not begin at once.
        return NumberedTask(coro, loop=self, context=context)

    def next_number(self) -> int:
        return next(self._numbers)

    def time(self) -> float:
        return self._now

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _run_once(self) -> None:
        ready: deque[Any] = self._ready  # type: ignore[attr-defined]
        scheduled: list[Any] = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise Stuck("all tasks wait, and no event is scheduled")
            self._now = max(self._now, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        handle = self._chosen(ready)
        if not handle._cancelled:
            handle._run()

    def _chosen(self, ready: deque[Any]) -> Any:
        if len(ready) == 1:
            return ready.popleft()
        # anyio wakes the tasks of a scope in set order, which does not depend on the seed.
        order = sorted(range(len(ready)), key=lambda at: (_number_of(ready[at]), at))
        at = order[self.chance.randrange(len(order))]
        handle = ready[at]
        del ready[at]
        return handle


def _number_of(handle: Any) -> float:
    task = getattr(handle._callback, "__self__", None)
    return task.number if isinstance(task, NumberedTask) else float("inf")


class SimulatedClock:
    """Clock of a simulated event loop."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self.monotonic: Callable[[], float] = loop.time
        self.wall: Callable[[], float] = lambda: 1_700_000_000.0 + loop.time()

    async def sleep_until(self, instant: float) -> None:
        await asyncio.sleep(max(0.0, instant - self.monotonic()))


class Line:
    """Simulated bus of one process: sends messages in order, and delivers each reply after a random delay.

    A crashed process sends and receives nothing more; a paused process sends later. Lease messages may be executed a
    second time, much later, like a copy that was resent for lack of a reply and then delayed.
    """

    COPIED = (GetOrLease, RenewLease, ReleaseLease)

    def __init__(self, bus: LocalBus, chance: random.Random, *, lost: float, copied: float = 0.0) -> None:
        self.bus = bus
        self.clock = bus.clock
        self.subscriptions = bus.subscriptions
        self.crashed = False
        self.paused_until = 0.0
        self._chance = chance
        self._lost = lost
        self._copied = copied
        self._out: asyncio.Queue[tuple[Any, Any, asyncio.Future[Any] | None]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = {asyncio.ensure_future(self._send_out())}

    async def request(self, address: Address, message: Any, timeout: float) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._out.put_nowait((address, message, answer))
        try:
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            raise CacheTimeoutError("no answer", address, timeout) from None

    async def wait_reply(self, address: Address, message: Any, reply: Any, timeout: float) -> Any:
        return await self.request(address, message, timeout)

    def send(self, address: Address, message: Any) -> None:
        self._out.put_nowait((address, message, None))

    async def _send_out(self) -> None:
        while True:
            address, message, answer = await self._out.get()
            await asyncio.sleep(self._delay())
            while self.paused_until > self.clock.monotonic():
                await asyncio.sleep(self.paused_until - self.clock.monotonic())
            if self.crashed:
                return
            if isinstance(message, self.COPIED) and self._chance.random() < self._copied:
                self._beside(self._copy(address, message, answer))
            if answer is None:
                self.bus.send(address, message)
            elif not answer.done():
                # Posted at once, to keep the order of sending; the reply may come at any time.
                reply = self.bus.recipient(address).turn(type(message))(message)
                self._beside(self._answer(address, message, reply, answer))

    async def _copy(self, address: Address, message: Any, answer: asyncio.Future[Any] | None) -> None:
        await asyncio.sleep(self._chance.choice((0.01, 0.2, 1.0, 3.0)))
        reply = self.bus.recipient(address).turn(type(message))(message)
        await self._answer(address, message, reply, answer or asyncio.get_running_loop().create_future())

    async def _answer(self, address: Address, message: Any, reply: Any, answer: asyncio.Future[Any]) -> None:
        try:
            result = await self.bus.wait_reply(address, message, reply, 1000.0)
        except CacheError as error:
            result = error
        await asyncio.sleep(self._delay())
        if self.crashed or answer.done() or self._chance.random() < self._lost:
            return
        if isinstance(result, CacheError):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    def _delay(self) -> float:
        return self._chance.choice((0.0, 0.0, 0.001, 0.01, 0.1))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def call_at(self, when: float, callback: Callable[[], Any]) -> Timer:
        loop = asyncio.get_running_loop()

        def call() -> None:
            if self.paused_until > self.clock.monotonic():
                loop.call_later(self.paused_until - self.clock.monotonic(), call)
            elif not self.crashed:
                callback()

        return loop.call_at(when, call)

    def call_after(self, delay: float, callback: Callable[[], Any]) -> Timer:
        return self.call_at(self.clock.monotonic() + delay, callback)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


class LineLink(BackendClient):
    """Client over a line, without inline replies."""

    __slots__ = ()

    def __init__(self, line: Line, address: Address) -> None:
        self.bus = line  # type: ignore[assignment]
        self.address = address
        self.timeout = TIMEOUT
        self.epoch = line.clock.wall() - line.clock.monotonic()
        self.emitter = Emitter(line.bus, "sim")
        self.failures = FailurePolicy("raise", self.emitter)
        self.timers = line
        self.try_inline_get = self.try_inline_set = self.try_inline_lease = lambda message: None


class World:
    """Versioned source of truth, with the processes that read, write and fail."""

    WAYS: ClassVar[tuple[str, ...]] = ("delete", "delete_many", "pattern", "tag", "clear", "set")
    """Ways to invalidate a changed key."""

    def __init__(self, loop: SimulatedLoop, store: type[MemoryStore], prepare: Callable[[Cache], None]) -> None:
        self.loop = loop
        self.chance = loop.chance
        self.store = store
        self.prepare = prepare
        self.truth = [1] * KEYS
        self.absent: list[set[int]] = [set() for _ in range(KEYS)]
        """Versions at which the source has no value, so that `None` is loaded."""
        self.floor = [1] * KEYS
        """Oldest version that a read beginning now may return, because a later invalidation has returned."""
        self.writing = [asyncio.Lock() for _ in range(KEYS)]
        self.story: list[str] = []
        self.reads = 0
        self.loads = 0

    def tell(self, what: str) -> None:
        self.story.append(f"{self.loop.time():8.3f}  {what}")

    # Processes

    async def run(self) -> None:
        clock = SimulatedClock(self.loop)
        bus = LocalBus("sim", clock=clock)
        async with Supervisor(bus, seed=1, inline_turns=self.chance.random() < 0.5) as supervisor:
            lost = self.chance.choice((0.0, 0.0, 0.02))
            copied = self.chance.choice((0.0, 0.0, 0.3))
            lines = [Line(bus, self.chance, lost=lost, copied=copied) for _ in range(PROCESSES)]
            cells = await self.backends(supervisor, clock, lines)
            groups: list[list[asyncio.Task[None]]] = []
            for number, (line, cell) in enumerate(zip(lines, cells, strict=True)):
                cache = Cache(lambda: None).attach(LineLink(line, cell.address))  # type: ignore[arg-type, return-value]
                cache.loads.table.random = random.Random(self.chance.random())
                cache.loads.table.has_notifications = (
                    False  # What it would learn when it first waits: this store lets callers wait.
                )
                self.prepare(cache)
                work = [self.reader(cache, number) for _ in range(2)] + [self.writer(cache, number)]
                groups.append([asyncio.ensure_future(each) for each in work])
            trouble = asyncio.ensure_future(self.trouble(lines, groups))
            await asyncio.gather(*(task for group in groups for task in group), return_exceptions=True)
            trouble.cancel()
            for task in (task for group in groups for task in group):
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error
            for line in lines:
                line.close()
            assert not any(cell.restarts for cell in cells), "the store crashed"
        bus.close()

    async def backends(self, supervisor: Supervisor, clock: SimulatedClock, lines: list[Line]) -> list[Cell]:
        """Return the backend of each process; here all share one."""
        address = Address("backend.sim")
        cell = await supervisor.start(address, lambda: BackendActor(self.store(clock=clock, max_leases=100)))
        return [cell] * len(lines)

    async def trouble(self, lines: list[Line], groups: list[list[asyncio.Task[None]]]) -> None:
        """Crash a process, or pause one for longer than a lease, or neither."""
        await asyncio.sleep(self.chance.uniform(0.0, 2.0))
        victim = self.chance.randrange(PROCESSES)
        match self.chance.choice(("crash", "pause", "pause", "nothing")):
            case "crash":
                self.tell(f"process {victim} crashes")
                lines[victim].crashed = True
                for task in groups[victim]:
                    task.cancel()
            case "pause":
                seconds = self.chance.uniform(0.2, 3.0)
                self.tell(f"process {victim} is paused for {seconds:.3f} s")
                lines[victim].paused_until = self.loop.time() + seconds
            case _:
                pass

    # Operations

    async def reader(self, cache: Cache, process: int) -> None:
        for _ in range(self.chance.randint(1, 4)):
            await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.3)))
            key = self.chance.randrange(KEYS)
            options: dict[str, Any] = {
                "ttl": self.chance.choice((0.2, 1.0, 10.0)),
                "stale_for": self.chance.choice((0.0, 5.0)),
                "lease_ttl": self.chance.choice((0.3, 2.0)),
                "refresh": self.chance.choice((None, 0.5, "xfetch")),
                "wait_limit": self.chance.choice((0.5, 8.0)),
                "wait": self.chance.choice(("load", "stale")),
                "soft_timeout": self.chance.choice((None, None, 0.0, 0.1)),
                "hard_timeout": self.chance.choice((None, None, 1.0)),
                "negative_ttl": self.chance.choice((None, 0.1)),
                "idle_ttl": self.chance.choice((None, None, 0.4)),
            }
            declared = self.chance.random() < 0.5
            if declared:
                options["tags"] = [tag_of(key)]
            floors = list(self.floor)
            doing = self.chance.choice(("get", "load", "load", "load", "many", "cancel"))
            try:
                match doing:
                    case "get":
                        reply = await cache.lookup(name_of(key))
                        values = {} if isinstance(reply, Missing) else {key: reply.value}
                    case "many":
                        del options["refresh"], options["idle_ttl"]
                        loaded = await cache.get_or_load_many(
                            [name_of(each) for each in range(KEYS)], self.loader_of_many(), **options
                        )
                        values = {each: loaded[name_of(each)] for each in range(KEYS)}
                    case "cancel":
                        reading = asyncio.ensure_future(
                            cache.get_or_load(name_of(key), self.loader(key, declared), **options)
                        )
                        try:
                            await asyncio.wait([reading], timeout=self.chance.choice((0.0, 0.01, 0.1)))
                        finally:
                            reading.cancel()
                        ended: Any = await asyncio.gather(reading, return_exceptions=True)
                        values = {} if isinstance(ended[0], BaseException) else {key: ended[0]}
                    case _:
                        values = {key: await cache.get_or_load(name_of(key), self.loader(key, declared), **options)}
            except (CacheError, Broken):
                continue
            for each, value in values.items():
                self.reads += 1
                self.tell(f"process {process} reads {name_of(each)}: {value} by {doing}, at least {floors[each]}")
                if value is None:
                    # The version of a `None` is unknown; at least one allowed version must have no value.
                    value = max(self.absent[each], default=0)
                if value < floors[each]:
                    raise AssertionError(f"{name_of(each)} was read as {value}, but {floors[each]} had been made known")

    async def writer(self, cache: Cache, process: int) -> None:
        for _ in range(self.chance.randint(1, 4)):
            await asyncio.sleep(self.chance.choice((0.0, 0.05, 0.5)))
            key = self.chance.randrange(KEYS)
            how = self.chance.choice(self.WAYS)
            keys = {"tag": [each for each in range(KEYS) if tag_of(each) == tag_of(key)], "clear": list(range(KEYS))}
            changed = keys.get(how, [key])
            # One writer per key at a time: the cache does not define which of two concurrent writes is the last.
            async with contextlib.AsyncExitStack() as locks:
                for each in changed:
                    await locks.enter_async_context(self.writing[each])
                for each in changed:
                    self.truth[each] += 1
                    if self.chance.random() < 0.2:
                        self.absent[each].add(self.truth[each])
                versions = {each: self.truth[each] for each in changed}
                self.tell(f"process {process} writes {versions} and begins to {how}")
                try:
                    await self.make_known(cache, how, key, versions[key])
                except CacheError:
                    continue  # It is unknown whether the write was executed, so nothing is guaranteed.
                for each, version in versions.items():
                    self.floor[each] = max(self.floor[each], version)
                self.tell(f"process {process} has done so: at least {versions}")

    async def make_known(self, cache: Cache, how: str, key: int, version: int) -> None:
        name = name_of(key)
        match how:
            case "delete":
                await cache.delete(name)
            case "delete_many":
                await cache.delete_many([name])
            case "pattern":
                await cache.delete_pattern(f"{name}*")
            case "tag":
                await cache.invalidate_tags(tag_of(key))
            case "clear":
                await cache.clear()
            case _:
                await cache.set(name, self.value(key, version), ttl=1.0, tags=[tag_of(key)])

    def value(self, key: int, version: int) -> int | None:
        """Return the value of a key at a version of the source."""
        return None if version in self.absent[key] else version

    def loader(self, key: int, declared: bool) -> Callable[[], Awaitable[Any]]:
        async def load() -> Any:
            self.loads += 1
            await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.2)))
            value = self.value(key, self.truth[key])
            self.tell(f"a loader reads {name_of(key)}: {value}")
            await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.2, 1.0)))
            if self.chance.random() < 0.1:
                raise Broken
            if self.chance.random() < 0.1:
                return LoadResult(value, store=False, tags=() if declared else (tag_of(key),))
            return value if declared else LoadResult(value, tags=(tag_of(key),))

        return load

    def loader_of_many(self) -> Callable[[list[str]], Awaitable[Any]]:
        async def load(names: list[str]) -> dict[str, Any]:
            self.loads += 1
            found = {name: self.value(key_of(name), self.truth[key_of(name)]) for name in names}
            values = {name: LoadResult(value, tags=(tag_of(key_of(name)),)) for name, value in found.items()}
            self.tell(f"a loader reads {values}")
            await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.2, 1.0)))
            if self.chance.random() < 0.1:
                raise Broken
            return values

        return load


class Broken(Exception):
    """Error of a loader."""


def name_of(key: int) -> str:
    return f"key{key}"


def key_of(name: str) -> int:
    return int(name.removeprefix("key"))


def tag_of(key: int) -> str:
    return f"tag{key % TAGS}"


def simulate(
    seed: int, store: type[MemoryStore] = MemoryStore, prepare: Callable[[Cache], None] = lambda cache: None
) -> World:
    """Run one seed of processes over one memory store. See `play`."""
    return play(seed, lambda loop: World(loop, store, prepare))


def play(seed: int, make: Callable[[SimulatedLoop], W]) -> W:
    """Run one seed of a world.

    Raises `AssertionError`, with the seed and the log of events, if a read returned an outdated value or a caller never
    got a reply.
    """
    loop = SimulatedLoop(seed)
    asyncio.set_event_loop(loop)
    world = make(loop)
    logger = logging.getLogger("cachebus")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # Many replies are lost here, as intended.
    try:
        loop.run_until_complete(asyncio.wait_for(world.run(), 600.0))
    except (AssertionError, TimeoutError) as error:
        story = "\n".join(world.story)
        raise AssertionError(f"seed {seed}: {str(error) or 'a caller never gets a reply'}\n{story}") from error
    finally:
        logger.setLevel(level)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(1.0))
        asyncio.set_event_loop(None)
        loop.close()
    return world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    reads = 0
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        world = simulate(seed)
        reads += world.reads
        if arguments.seeds == 1:
            print("\n".join(world.story))
    print(f"{arguments.seeds} seeds, {reads} reads, none of them out of date")


if __name__ == "__main__":
    main()
