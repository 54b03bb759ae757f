"""The simulated processes of `simulation` over a real Memcached: each has its own connections, and a seed decides between
any two commands whose turn it is. `python -m tests.loading.real_server_memcached SEED` replays one seed and tells it.

Time is simulated, but for the server's own, in which nothing expires while a seed runs; so some items are lost by chance.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from uuid import uuid4

from cachebus import CacheError
from cachebus.actors import BackendActor, Supervisor
from cachebus.actors.breaker import BreakerPolicy
from cachebus.actors.cell import Cell
from cachebus.actors.guard_policy import GuardPolicy
from cachebus.adapters.memcached import MemcachedStore, Place
from cachebus.adapters.memcached_connection import Connection, Dial
from cachebus.adapters.memcached_keys import ALL_TAGS
from cachebus.bus import Address
from cachebus.testing.servers import Server, run_memcached

from .simulation import KEYS, Line, SimulatedClock, SimulatedLoop, World, name_of, play, tag_of

POLICY = GuardPolicy(breaker=BreakerPolicy(failure_threshold=10**6), timeout_initial=5.0, timeout_min=5.0)
_SIZED = re.compile(rb"ms \S+ (\d+)")


def commands_of(data: bytes) -> Iterator[bytes]:
    """The commands that a piece of talk is made of."""
    at = 0
    while at < len(data):
        end = data.index(b"\r\n", at) + 2
        if (sized := _SIZED.match(data, at, end)) is not None:
            end += int(sized[1]) + 2
        yield data[at:end]
        at = end


class BlockingLine:
    """A line on which the whole world waits for the answer: to the simulation it takes no time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(5.0)
        self._sock = sock

    @property
    def fit(self) -> bool:
        """Always: whoever asks reads all of each answer."""
        return True

    def allow(self, seconds: float) -> None:
        pass

    async def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    async def receive(self) -> bytes:
        data = self._sock.recv(1 << 16)
        if not data:
            raise EOFError
        return data

    def close(self) -> None:
        pass


class SteppedLane:
    """A `Lane` whose talks are carried out one command at a time, with everybody else's in between."""

    def __init__(self, place: Place, process: Process) -> None:
        self.connection: Connection | None = None
        self._place = place
        self._process = process
        self._turn = asyncio.Lock()

    async def run(self, talk: Callable[[Connection], Any]) -> Any:
        async with self._turn:
            if self.connection is None or self.connection.lost:
                self.connect()
            assert self.connection is not None
            return await self._converse(self.connection, talk(self.connection))

    def connect(self) -> None:
        connection = Dial(clock=self._process.clock).connect(self._place)
        connection._line = BlockingLine(connection._sock)
        # What each process takes for the server's time: not quite the same.
        connection._offset = 1_700_000_000.0 + self._process.skew
        self.connection = connection

    async def close(self) -> None:
        if self.connection is not None:
            self.connection.close()

    async def _converse(self, connection: Connection, talk: Any) -> Any:
        try:
            question = next(talk)
            while True:
                answers: list[Any] = []
                try:
                    for command in commands_of(question[0]):
                        await self._process.turn()
                        assert connection._line is not None
                        answers += await connection._ask(connection._line, command, 1)
                    assert len(answers) == question[1]
                except CacheError as error:
                    question = talk.throw(error)
                else:
                    question = talk.send(answers)
        except StopIteration as done:
            return done.value
        except BaseException:
            connection.close()
            raise


class Process:
    """When a process may say the next word."""

    def __init__(self, line: Line, clock: SimulatedClock, chance: random.Random) -> None:
        self.clock = clock
        self.skew = chance.choice((0.0, 0.0, -0.4, 0.4))
        self._line = line
        self._chance = chance

    async def turn(self) -> None:
        await asyncio.sleep(self._chance.choice((0.0, 0.0, 0.0, 0.001, 0.02)))
        while self._line.paused_until > self.clock.monotonic():
            await asyncio.sleep(self._line.paused_until - self.clock.monotonic())
        if self._line.crashed:
            await asyncio.get_running_loop().create_future()


class SteppedStore(MemcachedStore):
    """A store of a simulated process."""

    def __init__(self, places: Sequence[Place], process: Process, **options: Any) -> None:
        super().__init__(places, **options)
        self._process = process

    async def open(self) -> None:
        lanes: Any = {str(place): SteppedLane(place, self._process) for place in self._places}
        self._lanes = lanes
        for lane in lanes.values():
            lane.connect()

    def _server(self, key: str) -> str:
        # Not by the ports, which no seed decides.
        servers = list(self._lanes)
        return servers[sum(key.encode()) % len(servers)]


class MemcachedWorld(World):
    """Processes over one Memcached or several."""

    WAYS: ClassVar[tuple[str, ...]] = ("delete", "delete_many", "tag", "tag", "clear", "set")

    def __init__(
        self,
        loop: SimulatedLoop,
        servers: Sequence[Server],
        make: type[SteppedStore] = SteppedStore,
    ) -> None:
        super().__init__(loop, None, lambda cache: None)  # type: ignore[arg-type]
        self.places = [Place(each.host, each.port) for each in servers]
        self.namespace = f"sim{uuid4().hex[:16]}"
        self.make = make
        self.stores: list[SteppedStore] = []
        self.lost = 0

    async def backends(self, supervisor: Supervisor, clock: SimulatedClock, lines: list[Line]) -> list[Cell]:
        """The backends: one in each process."""
        cells: list[Cell] = []
        for number, line in enumerate(lines):
            process = Process(line, clock, self.chance)
            store = self.make(self.places, process, namespace=self.namespace, clock=clock)
            self.stores.append(store)
            address = Address(f"backend.process{number}")
            cells.append(await supervisor.start(address, functools.partial(BackendActor, store, POLICY)))
        return cells

    async def trouble(self, lines: list[Line], groups: list[list[asyncio.Task[None]]]) -> None:
        await asyncio.gather(super().trouble(lines, groups), self.lose())

    async def lose(self) -> None:
        """Now and then an item is evicted, or all of them."""
        losses = self.chance.choice((0, 0, 2, 5))
        client = Dial(clock=SimulatedClock(self.loop)).connect(self.places[0])
        line = BlockingLine(client._sock)
        try:
            for _ in range(losses):
                await asyncio.sleep(self.chance.uniform(0.0, 0.5))
                heads = [self.stores[0]._keys.head(each) for each in self.generations()]
                keys = self.stores[0]._keys
                names = [keys.generation_name] + [
                    head + tail
                    for head in heads
                    for number in range(KEYS)
                    for tail in (keys.tail(name_of(number))[0], keys.tag(tag_of(number)), ALL_TAGS)
                ]
                name = self.chance.choice(names)
                self.tell(f"{names.index(name) % (1 + 3 * KEYS)} is lost")
                self.lost += 1
                await client._ask(line, f"md {name}\r\n".encode(), 1)
        finally:
            client.close()

    def generations(self) -> list[str]:
        """The namespace's generations at the first server that some process knows of."""
        known: dict[str, None] = {}
        for store in self.stores:
            for lane in list(store._lanes.values())[:1]:
                if lane.connection is not None and lane.connection.generation is not None:
                    known[lane.connection.generation] = None
        return list(known)


def play_memcached(seed: int, servers: Sequence[Server], make: type[SteppedStore] = SteppedStore) -> MemcachedWorld:
    """Run one seed. Raises as `play` does."""
    return play(seed, lambda loop: MemcachedWorld(loop, servers, make))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--servers", type=int, default=1, choices=(1, 2))
    arguments = parser.parse_args()
    with run_memcached() as one, run_memcached() as other:
        reads = 0
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            world = play_memcached(seed, [one, other][: arguments.servers])
            reads += world.reads
            if arguments.seeds == 1:
                print("\n".join(world.story))
    print(f"{arguments.seeds} seeds, {reads} reads, none of them out of date")


if __name__ == "__main__":
    main()
