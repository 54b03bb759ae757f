"""A connection to one Memcached server: made and greeted by the driver in a worker thread, then used without blocking."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError

from cachebus.actors.ports import Clock
from cachebus.messages import CacheConfigurationError, CacheConnectionError, CacheError

from .memcached_errors import BACKEND, Nonsense, Refusal, complaint, lost, unreachable
from .memcached_line import Line, line_for

MISS, NOT_STORED, EXISTS = -1, -2, -3
Answer: TypeAlias = tuple[bytes, int] | int | CacheError
"""A value with its CAS token; a CAS token (0 where none was asked for), `MISS`, `NOT_STORED` or `EXISTS`; or what the
server had to say against one command."""

T = TypeVar("T")
Talk: TypeAlias = Generator[tuple[bytes, int], list[Answer], T]
"""Commands and how many they are; their answers; and what came of it all."""

OLDEST = (1, 6, 10)
"""The version in which the meta commands came to be what they are: `ms` with the length after the key and a CAS token in its
answer, `md` with one in its question."""

RESYNC = 60.0
"""Seconds after which the server's clock is read anew."""

_CODES = {b"HD": 0, b"EN": MISS, b"NF": MISS, b"NS": NOT_STORED, b"EX": EXISTS}


class DeadlineSocket:
    """What the driver takes for a socket: it blocks, but never beyond one deadline for many calls, on the clock's
    monotonic time."""

    def __init__(self, sock: socket.socket, clock: Clock, deadline: float) -> None:
        self._sock = sock
        self._now = clock.monotonic
        self._deadline = deadline

    def recv(self, size: int) -> bytes:
        self._sock.settimeout(self._left())
        return self._sock.recv(size)

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._left())
        self._sock.sendall(data)

    def _left(self) -> float:
        left = self._deadline - self._now()
        if left <= 0:
            raise TimeoutError
        return left


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server listens."""

    host: str
    port: int = 11211

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """How connections are made. Times are seconds: `connect_timeout` for all of connecting, `timeout` for an answer."""

    clock: Clock
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    connect_timeout: float = 1.0
    timeout: float = 1.0

    def connect(self, place: Place) -> Connection:
        """A connection that is ready. Blocks: for worker threads.

        Raises `CacheConnectionError`, or `CacheConfigurationError` for what another attempt will not mend.
        """
        until = self.clock.monotonic() + self.connect_timeout
        try:
            # Not the driver's own connecting, which tries only the first address of a name.
            sock = socket.create_connection((place.host, place.port), self.connect_timeout)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.tls is not None:
                    sock.settimeout(max(until - self.clock.monotonic(), 0.001))
                    sock = self.tls.wrap_socket(sock, server_hostname=place.host)
                return Connection(str(place), sock, self.clock, self.timeout, until)
            except BaseException:
                sock.close()
                raise
        except (OSError, MemcacheError, CacheError, ValueError, KeyError) as error:
            raise unreachable(error, str(place), self.connect_timeout) from None


class Connection:
    """A connection that asks, and reads every answer to its end or is closed: no answer is ever another question's.

    Making one, and `resync`, block, and are for worker threads: there the driver speaks. `converse` never blocks the
    event loop.

    `epoch` is what the versions of the server's items begin at, `entry_max` how many bytes an entry may have, and
    `generation` the one that the namespace had when it was last looked at. `meters` is what was last seen of rate limits, by
    their names on the wire: raw, with the CAS token.
    """

    def __init__(self, server: str, sock: socket.socket, clock: Clock, timeout: float, deadline: float) -> None:
        self.server = server
        self.generation: str | None = None
        self.meters: dict[str, tuple[bytes, int]] = {}
        self.lost = False
        self._sock = sock
        self._timeout = timeout
        self._clock = clock
        self._offset = 0.0
        self._synced = 0.0
        self._line: Line | None = None
        client: Any = Client(("", 0))
        client.sock = DeadlineSocket(sock, clock, deadline)
        self.epoch = self._sync(client) * 1e6
        settings: Any = client.stats("settings")
        if settings[b"cas_enabled"] != b"yes":
            raise CacheConfigurationError(f"memcached: {server} runs without CAS (-C), which cachebus needs")
        # An item has a header of 48 bytes, a CAS token, flags, a name and two line ends besides.
        self.entry_max = int(settings[b"item_size_max"]) - 320
        sock.setblocking(False)

    def __repr__(self) -> str:
        return f"<Connection to {self.server}>"

    def now(self) -> float:
        """The server's Unix time in seconds, as we know it."""
        return self._clock.monotonic() + self._offset

    @property
    def out_of_sync(self) -> bool:
        """Whether the server's clock was read so long ago that it may have drifted from ours."""
        return self._clock.monotonic() - self._synced > RESYNC

    def look(self) -> None:
        """Close the connection if it is of no use any more: closed by the server, or with words on it that nobody asked
        for, which the next question would take for its answer."""
        if self._line is not None and not self._line.fit:
            self.close()

    def resync(self) -> None:
        """Read the server's clock anew. Blocks. Raises `CacheConnectionError`."""
        client: Any = Client(("", 0))
        client.sock = DeadlineSocket(self._sock, self._clock, self._clock.monotonic() + self._timeout)
        try:
            self._sync(client)
            self._sock.setblocking(False)
        except (OSError, MemcacheError, ValueError, KeyError) as error:
            self.close()
            raise lost(error, self.server, self._timeout) from None

    def pause(self) -> None:
        """Leave the socket to `resync`: the event loop looks at it no more until the next talk."""
        if self._line is not None:
            self._line.close()
            self._line = None

    async def converse(self, talk: Talk[T]) -> T:
        """What a talk comes to: it yields commands and how many they are, and is sent the answers, or thrown the
        `CacheError` that says why there are none. All of it may take `timeout` seconds, and what its bytes take."""
        if self._line is None:
            self._line = line_for(self._sock)
        self._line.allow(self._timeout)
        try:
            question = next(talk)
            while True:
                try:
                    answers = await self._ask(self._line, question[0], question[1])
                except CacheError as error:
                    question = talk.throw(error)
                else:
                    question = talk.send(answers)
        except StopIteration as done:
            result: T = done.value
            return result
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.lost = True
        self.pause()
        self._sock.close()

    async def _ask(self, line: Line, data: bytes, count: int) -> list[Answer]:
        if self.lost:
            raise CacheConnectionError(f"the connection to {self.server} was lost", BACKEND)
        try:
            await line.send(data)
            return await self._read(line, count)
        except (OSError, Nonsense, Refusal, EOFError, ValueError) as error:
            self.close()
            raise lost(error, self.server, self._timeout) from None

    async def _read(self, line: Line, count: int) -> list[Answer]:
        answers: list[Answer] = []
        buffer = await line.receive()
        at = 0
        while len(answers) < count:
            end = buffer.find(b"\r\n", at)
            if end < 0:
                buffer = buffer[at:] + await line.receive()
                at = 0
                continue
            head = buffer[at:end]
            if head[:3] == b"VA ":
                _, size, token = head.split(b" ", 2)
                start, stop = end + 2, end + 2 + int(size)
                if len(buffer) < stop + 2:
                    buffer = await self._rest(line, buffer[start:], stop + 2 - start)
                    start, stop = 0, stop - start
                if buffer[stop : stop + 2] != b"\r\n":
                    raise Nonsense("a value has another size than was said")
                answers.append((buffer[start:stop], _token(token)))
                at = stop + 2
                continue
            code = _CODES.get(head[:2]) if head[2:3] in (b"", b" ") else None
            if code is None:
                answers.append(complaint(head))
            elif code == 0 and len(head) > 3:
                answers.append(_token(head[3:]))
            else:
                answers.append(code)
            at = end + 2
        if at != len(buffer):
            raise Nonsense("it says more than it was asked")
        return answers

    async def _rest(self, line: Line, begun: bytes, size: int) -> bytes:
        """At least `size` bytes, of which some are there."""
        pieces, have = [begun], len(begun)
        while have < size:
            pieces.append(await line.receive())
            have += len(pieces[-1])
        return b"".join(pieces)

    def _sync(self, client: Any) -> int:
        """Learn what time it is for the server, and say when it was started."""
        before = self._clock.monotonic()
        stats: Any = client.stats()
        after = self._clock.monotonic()
        version = bytes(stats[b"version"])
        if tuple(map(int, re.findall(rb"\d+", version)[:3])) < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise CacheConfigurationError(
                f"memcached: {self.server} is Memcached {version.decode('ascii', 'replace')[:20]}, and {needed} is needed"
            )
        at, uptime = int(stats[b"time"]), int(stats[b"uptime"])
        # It names the second that has begun, at some moment between asking and hearing.
        earliest, latest = at - after, at + 1 - before
        ours = self._clock.wall() - after
        # The clocks agree: ours is the finer one. Else the middle of what it may be.
        self._offset = ours if earliest - 0.1 <= ours <= latest + 0.1 else (earliest + latest) / 2
        self._synced = after
        return at - uptime


def _token(word: bytes) -> int:
    """The number of a CAS token, and of the mark of ours that a server gives back."""
    if word[:1] not in (b"c", b"O"):
        raise Nonsense("an answer has no CAS token")
    return int(word[1:])
