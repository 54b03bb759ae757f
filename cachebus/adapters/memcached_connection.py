"""A connection to one Memcached server. Everything here blocks, and is for worker threads only."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError

from cachebus.actors.ports import Clock
from cachebus.messages import CacheConfigurationError, CacheConnectionError, CacheError

from .memcached_errors import BACKEND, Nonsense, Refusal, complaint, lost, unreachable

MISS, NOT_STORED, EXISTS = -1, -2, -3
Answer: TypeAlias = tuple[bytes, int] | int | CacheError
"""A value with its CAS token; a CAS token (0 where none was asked for), `MISS`, `NOT_STORED` or `EXISTS`; or what the
server had to say against one command."""

READ_BYTES = 1 << 16
SLOWEST_LINE = 10e6
"""Bytes a second below which a server counts as not answering."""

RESYNC = 60.0
"""Seconds after which the server's clock is read anew."""

_CODES = {b"HD": 0, b"EN": MISS, b"NF": MISS, b"NS": NOT_STORED, b"EX": EXISTS}


class DeadlineSocket:
    """A socket with one deadline for many calls, on the clock's monotonic time."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._sock = sock
        self._now = clock.monotonic
        self.deadline = 0.0

    def allow(self, seconds: float) -> None:
        """Let what follows take so long."""
        self.deadline = self._now() + seconds

    def recv(self, size: int) -> bytes:
        self._sock.settimeout(self._left())
        return self._sock.recv(size)

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._left())
        self._sock.sendall(data)

    def shut(self) -> None:
        """Wake whoever reads or writes, from another thread; they find the end of the file."""
        with contextlib.suppress(OSError):  # Not connected any more.
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _left(self) -> float:
        left = self.deadline - self._now()
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
        """A connection that is ready.

        Raises `CacheConnectionError`, or `CacheConfigurationError` for what another attempt will not mend.
        """
        until = self.clock.monotonic() + self.connect_timeout
        try:
            # Not the driver's own connecting, which tries only the first address of a name.
            raw = socket.create_connection((place.host, place.port), self.connect_timeout)
            try:
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.tls is not None:
                    raw.settimeout(max(until - self.clock.monotonic(), 0.001))
                    raw = self.tls.wrap_socket(raw, server_hostname=place.host)
                sock = DeadlineSocket(raw, self.clock)
                sock.deadline = until
                return Connection(place, sock, self)
            except BaseException:
                raw.close()
                raise
        except (OSError, MemcacheError, CacheError, ValueError, KeyError) as error:
            raise unreachable(error, str(place), self.connect_timeout) from None


class Connection:
    """A connection that asks, and reads every answer to its end or is dropped: no answer is ever another question's.

    `epoch` is what the versions of the server's items begin at, `entry_max` how many bytes an entry may have, and
    `generation` the one that the namespace had when it was last looked at.
    """

    def __init__(self, place: Place, sock: DeadlineSocket, dial: Dial) -> None:
        self.server = str(place)
        self.generation: str | None = None
        self.lost = False
        self._sock = sock
        self._timeout = dial.timeout
        self._clock = dial.clock
        self._client = Client((place.host, place.port), default_noreply=False)
        self._client.sock = sock
        self._serial = 0
        self._offset = 0.0
        self._synced = 0.0
        started = self._sync()
        self.epoch = started * 1e6
        settings: Any = self._client.stats("settings")
        if settings[b"cas_enabled"] != b"yes":
            raise CacheConfigurationError(f"memcached: {self.server} runs without CAS (-C), which cachebus needs")
        # An item has a header of 48 bytes, a CAS token, flags, a name and two line ends besides.
        self.entry_max = int(settings[b"item_size_max"]) - 320

    def __repr__(self) -> str:
        return f"<Connection to {self.server}>"

    def now(self) -> float:
        """The server's Unix time in seconds, as we know it."""
        return self._clock.monotonic() + self._offset

    def refresh(self) -> None:
        """Read the server's clock anew if that was long ago: clocks drift apart. Raises `CacheConnectionError`."""
        if self._clock.monotonic() - self._synced > RESYNC:
            self._sock.allow(self._timeout)
            try:
                self._sync()
            except (OSError, MemcacheError, ValueError, KeyError) as error:
                self.close()
                raise lost(error, self.server, self._timeout) from None

    def ask(self, data: bytes, count: int) -> list[Answer]:
        """The answers to `count` commands. Raises `CacheError` when there are none, and the connection is lost."""
        if self.lost:
            raise CacheConnectionError(f"the connection to {self.server} was lost", BACKEND)
        try:
            self._sock.allow(self._timeout + len(data) / SLOWEST_LINE)
            self._sock.sendall(data)
            return self._read(count)
        except (OSError, Nonsense, Refusal, EOFError, ValueError) as error:
            self.close()
            raise lost(error, self.server, self._timeout) from None
        except BaseException:
            self.close()
            raise

    def shut(self) -> None:
        """Break off what is under way in another thread. The connection is of no more use, but still to be closed."""
        self._sock.shut()

    def close(self) -> None:
        self.lost = True
        self._client.close()

    def _read(self, count: int) -> list[Answer]:
        answers: list[Answer] = []
        buffer = bytearray()
        at = 0
        receive = self._sock.recv
        while len(answers) < count:
            end = buffer.find(b"\r\n", at)
            if end < 0:
                self._more(buffer, receive(READ_BYTES))
                continue
            line = bytes(buffer[at:end])
            if line[:3] == b"VA ":
                words = line.split(b" ")
                start, stop = end + 2, end + 2 + int(words[1])
                while len(buffer) < stop + 2:
                    self._more(buffer, receive(max(READ_BYTES, stop + 2 - len(buffer))))
                if buffer[stop : stop + 2] != b"\r\n":
                    raise Nonsense("a value has another size than was said")
                answers.append((bytes(buffer[start:stop]), _token(words[2])))
                at = stop + 2
                continue
            code = _CODES.get(line[:2]) if line[2:3] in (b"", b" ") else None
            if code is None:
                answers.append(complaint(line))
            elif code == 0 and len(line) > 3:
                answers.append(_token(line[3:]))
            else:
                answers.append(code)
            at = end + 2
        if at != len(buffer):
            raise Nonsense("it says more than it was asked")
        return answers

    def _more(self, buffer: bytearray, data: bytes) -> None:
        if not data:
            raise EOFError
        buffer += data
        self._sock.deadline += len(data) / SLOWEST_LINE

    def _sync(self) -> int:
        """Learn what time it is for the server, and say when it was started."""
        before = self._clock.monotonic()
        stats: Any = self._client.stats()
        after = self._clock.monotonic()
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


def join(commands: Sequence[bytes]) -> bytes:
    """Several commands as one piece."""
    return commands[0] if len(commands) == 1 else b"".join(commands)
