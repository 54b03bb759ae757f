"""The simulated processes of `simulation` over a real Memcached.

Each process has its own connections, and the seed decides which process sends the next command.
`python -m tests.loading.real_server_memcached SEED` replays a seed and prints its events.

Time is simulated, except that of the server. Nothing expires there while a seed runs, so items are evicted at random.
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
from cachebus.actors.guard.circuit_breaker import BreakerPolicy
from cachebus.actors.guard.policy import GuardPolicy
from cachebus.actors.ports import Clock, OnReplies, Progress
from cachebus.actors.runtime.cell import Cell
from cachebus.adapters.memcached.connection import Connection
from cachebus.adapters.memcached.keys import ALL_TAGS
from cachebus.adapters.memcached.store import Endpoint, MemcachedStore, _Join
from cachebus.bus import Address
from cachebus.messages import Failed, Request
from cachebus.testing.servers import Server, run_memcached

from .simulation import KEYS, Line, SimulatedClock, SimulatedLoop, World, name_of, play, tag_of

POLICY = GuardPolicy(breaker=BreakerPolicy(failure_threshold=10**6), timeout_initial=5.0, timeout_min=5.0)
_SIZED = re.compile(rb"ms \S+ (\d+)")


def commands_of(data: bytes) -> Iterator[bytes]:
    """Return the commands of an exchange."""
    at = 0
    while at < len(data):
        end = data.index(b"\r\n", at) + 2
        if (sized := _SIZED.match(data, at, end)) is not None:
            end += int(sized[1]) + 2
        yield data[at:end]
        at = end


class BlockingSocket:
    """Socket that blocks the whole simulation until the reply arrives, in no simulated time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(5.0)
        self._sock = sock
        self._receiver: Any = None

    @property
    def write(self) -> Callable[[bytes], None]:
        return self._write

    def set_protocol(self, protocol: Any) -> None:
        self._receiver = protocol

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self._sock.close()

    def _write(self, data: bytes) -> None:
        self._sock.sendall(data)
        # A reply may cause further commands to be written on this stack.
        while self._receiver.waiting:
            self._receiver.data_received(self._sock.recv(1 << 16))


class NoTimers:
    """Timers that never fire, because each write waits for its reply."""

    def call_at(self, when: float, callback: Callable[[], Any], /) -> NoTimers:
        return self

    call_after = call_at

    def cancel(self) -> None:
        pass


def connect(endpoint: Endpoint, clock: Clock) -> Connection:
    """Blocking connection."""
    sock: Any = BlockingSocket(socket.create_connection((endpoint.host, endpoint.port), 5.0))
    connection = Connection(str(endpoint), sock, clock, NoTimers(), 5.0)
    ask(connection, connection.handshake())
    connection._synced = float("inf")
    return connection


def ask(connection: Connection, exchange: Any) -> Any:
    """Run an exchange over a blocking connection and return its result."""
    results: list[Any] = []
    connection.begin(exchange, results.append)
    (result,) = results
    if isinstance(result, CacheError):
        raise result
    return result


def asking(data: bytes) -> Any:
    """Single command."""
    return (yield data, 1)


class SteppedServer:
    """Server whose exchanges run one command at a time, interleaved with those of all other processes."""

    def __init__(self, endpoint: Endpoint, process: Process) -> None:
        self.connection: Connection | None = None
        self._endpoint = endpoint
        self._process = process
        self._turn = asyncio.Lock()

    async def run(self, exchange: Callable[[Connection], Any]) -> Any:
        async with self._turn:
            if self.connection is None or self.connection.lost:
                self.connect()
            assert self.connection is not None
            return await self._run(self.connection, exchange(self.connection))

    def connect(self) -> None:
        connection = connect(self._endpoint, self._process.clock)
        # Each process has a slightly different estimate of the server's time.
        connection._offset = 1_700_000_000.0 + self._process.skew
        self.connection = connection

    async def close(self) -> None:
        if self.connection is not None:
            self.connection.close()

    async def _run(self, connection: Connection, exchange: Any) -> Any:
        try:
            question = next(exchange)
            while True:
                answers: list[Any] = []
                try:
                    for command in commands_of(question[0]):
                        await self._process.turn()
                        answers += ask(connection, asking(command))
                    assert len(answers) == question[1]
                except CacheError as error:
                    question = exchange.throw(error)
                else:
                    question = exchange.send(answers)
        except StopIteration as done:
            return done.value
        except BaseException:
            connection.close()
            raise


class Process:
    """Schedule of one process: when it may send its next command."""

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
    """Store of a simulated process."""

    def __init__(self, endpoints: Sequence[Endpoint], process: Process, **options: Any) -> None:
        super().__init__(endpoints, **options)
        self._process = process

    async def open(self) -> None:
        servers: Any = {str(endpoint): SteppedServer(endpoint, self._process) for endpoint in self._endpoints}
        self._servers = servers
        for server in servers.values():
            server.connect()

    def try_submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> None:
        return None

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        shares = self._share_out(batch)
        join = _Join(batch, shares, on_replies)

        async def run(server: Any, share: Any) -> None:
            try:
                part = [request for _, request in share]
                answers = await server.run(lambda connection: self._exchange(connection, part))
            except CacheError as error:
                answers = [Failed.of(error)] * len(share)
            join.take(share, answers)

        await asyncio.gather(*(run(server, share) for server, share in shares.items()))
        return join

    def _server(self, key: str) -> str:
        # Not by the ports, which do not depend on the seed.
        servers = list(self._servers)
        return servers[sum(key.encode()) % len(servers)]


class MemcachedWorld(World):
    """World of processes over one or more Memcached servers."""

    WAYS: ClassVar[tuple[str, ...]] = ("delete", "delete_many", "tag", "tag", "clear", "set")

    def __init__(
        self,
        loop: SimulatedLoop,
        servers: Sequence[Server],
        make: type[SteppedStore] = SteppedStore,
    ) -> None:
        super().__init__(loop, None, lambda cache: None)  # type: ignore[arg-type]
        self.endpoints = [Endpoint(each.host, each.port) for each in servers]
        self.namespace = f"sim{uuid4().hex[:16]}"
        self.make = make
        self.stores: list[SteppedStore] = []
        self.lost = 0

    async def backends(self, supervisor: Supervisor, clock: SimulatedClock, lines: list[Line]) -> list[Cell]:
        """Return the backends, one per process."""
        cells: list[Cell] = []
        for number, line in enumerate(lines):
            process = Process(line, clock, self.chance)
            store = self.make(self.endpoints, process, namespace=self.namespace, clock=clock)
            self.stores.append(store)
            address = Address(f"backend.process{number}")
            cells.append(await supervisor.start(address, functools.partial(BackendActor, store, POLICY)))
        return cells

    async def trouble(self, lines: list[Line], groups: list[list[asyncio.Task[None]]]) -> None:
        await asyncio.gather(super().trouble(lines, groups), self.lose())

    async def lose(self) -> None:
        """Evict an item, or all items, from time to time."""
        losses = self.chance.choice((0, 0, 2, 5))
        client = connect(self.endpoints[0], SimulatedClock(self.loop))
        try:
            for _ in range(losses):
                await asyncio.sleep(self.chance.uniform(0.0, 0.5))
                heads = [self.stores[0]._keys.head(each) for each in self.generations()]
                keys = self.stores[0]._keys
                names = [keys.generation_name.decode()] + [
                    head + tail
                    for head in heads
                    for number in range(KEYS)
                    for tail in (keys.tail(name_of(number))[0], keys.tag(tag_of(number)), ALL_TAGS)
                ]
                name = self.chance.choice(names)
                self.tell(f"{names.index(name) % (1 + 3 * KEYS)} is lost")
                self.lost += 1
                ask(client, asking(f"md {name}\r\n".encode()))
        finally:
            client.close()

    def generations(self) -> list[bytes]:
        """Return the generations of the namespace at the first server, as the processes know them."""
        known: dict[bytes, None] = {}
        for store in self.stores:
            for server in list(store._servers.values())[:1]:
                if server.connection is not None and server.connection.generation:
                    known[server.connection.generation] = None
        return list(known)


def play_memcached(seed: int, servers: Sequence[Server], make: type[SteppedStore] = SteppedStore) -> MemcachedWorld:
    """Run one seed. Raises the same errors as `play`."""
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
