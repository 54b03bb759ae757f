"""A connection to one Memcached server: one exchange at a time, driven by the bytes that come.

An exchange is a generator: it yields commands and how many answers they have, and is sent those answers. No task waits
for them. The transport hands in bytes, and the last answer resumes the generator on the stack of the event loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias, TypeVar

from cachebus.actors.ports import SLOWEST_LINE, Clock, Timer, Timers
from cachebus.messages import CacheBackendError, CacheConfigurationError, CacheConnectionError, CacheError, Failed

from .errors import BACKEND, ProtocolError, lost, parse_error

MISS, NOT_STORED, EXISTS = -1, -2, -3
Answer: TypeAlias = tuple[bytes, int] | int | dict[bytes, bytes] | CacheError
"""A value with its CAS token; a CAS token (0 where none was asked for), `MISS`, `NOT_STORED` or `EXISTS`; statistics; or
the error with which the server refused one command."""

T = TypeVar("T")
Exchange: TypeAlias = Generator[tuple[bytes, int], list[Answer], T]
"""Commands and how many answers they have; those answers; and the result."""

Done: TypeAlias = Callable[[Any], None]
"""Called with the result of an exchange, or with the `CacheError` that says why there is none."""

OLDEST = (1, 6, 10)
"""The first version whose meta commands are as we need them: `ms` answers a CAS token, and `md` takes one."""

RESYNC = 60.0
"""Seconds after which the server's clock is read once more."""

COMMAND_TIME = 20e-6
"""Seconds by which each command makes the time limit of an exchange longer, besides `SLOWEST_LINE` for what is sent."""

STALLED_LINE = 100e3
"""Bytes a second above which a line counts as moving: what has moved extends the time limit of an exchange."""

LARGE = 1 << 16
"""Bytes above which commands may not leave at once."""

STALL = 0.03
"""Seconds by which a timer may be late before the event loop counts as having stood still."""

ITEM_OVERHEAD = 320
"""Bytes of an item besides the entry: a header of 48 bytes, a CAS token, flags, a name and two line ends."""

LINE_MAX = 2048
"""Bytes that the first line of an answer may have."""

STATISTICS_MAX = 1000
"""Lines of statistics that an answer may have."""

ITEM_MAX = 1 << 30
"""Bytes of an item that are read, as long as the server has not said how large its items may be."""

_TOKENS = (b"c", b"O")
"""What begins a CAS token, and a mark of ours that the server gives back."""
_CODES = {b"HD": 0, b"EN": MISS, b"NF": MISS, b"NS": NOT_STORED, b"EX": EXISTS}


class Connection(asyncio.Protocol):
    """The protocol over one transport. Each answer is read to its end, or the connection is dropped.

    `epoch` is the version at which those of the server's items begin, `entry_max` the bytes that an entry may have, and
    `generation` the one that the namespace had when it was last read, with `head`, what the names of its keys begin with.
    `limits` is what was last seen of rate limits, by their names on the wire: raw, with the CAS token. `last_progress` is
    the time, on the clock's monotonic time, at which bytes last came or left; `timeout` the seconds that an exchange has.
    """

    def __init__(self, server: str, transport: asyncio.Transport, clock: Clock, timers: Timers, timeout: float) -> None:
        self.server = server
        self.epoch = 0.0
        self.entry_max = ITEM_MAX
        self.generation: bytes = b""
        self.head = ""
        self.limits: dict[str, tuple[bytes, int]] = {}
        self.lost: CacheError | None = None
        self.last_progress = 0.0
        self.clock = clock
        self.timeout = timeout
        self.mark = 0
        self.on_idle: Callable[[], None] | None = None
        self._transport = transport
        self._now = clock.monotonic
        self._timers = timers
        self._offset = 0.0
        self._synced = float("-inf")
        self._exchange: Exchange[Any] | None = None
        self._done: Done | None = None
        self._count = 0
        self._answers: list[Answer] = []
        self._wanted = 0
        self._pieces: list[bytes] = []
        self._have = self._need = 0
        self._limit = self._armed_for = 0.0
        self._moved = self._unsent = 0
        self._timer: Timer | None = None
        transport.set_protocol(self)
        transport.resume_reading()
        self._write = transport.write

    def __repr__(self) -> str:
        return f"<Connection to {self.server}, {'lost' if self.lost else 'busy' if self._exchange else 'idle'}>"

    def now(self) -> float:
        """Return the server's Unix time in seconds, as we know it."""
        return self._now() + self._offset

    @property
    def waiting(self) -> bool:
        return self._exchange is not None and self.lost is None

    def begin(self, exchange: Exchange[Any], done: Done, count: int = 0) -> None:
        """Start an exchange on an idle connection. `done` is called once with the result or the error, maybe before this
        returns; with a `count`, an error becomes so many `Failed` replies."""
        now = self._now()
        self._done, self._count = done, count
        self._exchange = exchange if now - self._synced < RESYNC else self._synced_first(exchange)
        self._limit = now + self.timeout
        self._moved = 0
        self.last_progress = now
        self._resume(None)
        if (self._timer is None or self._armed_for > self._limit) and self.waiting:
            self._arm()

    def close(self, error: CacheError | None = None) -> None:
        """Drop the connection. The exchange in flight ends with `error`."""
        if self.lost is None:
            self.lost = error or CacheConnectionError(f"the connection to {self.server} was closed", BACKEND)
            self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._exchange is not None:
            self._resume(None)

    def drop_later(self, error: CacheError) -> None:
        """Drop the connection from inside its exchange, which goes on to its end."""
        self.lost = self.lost or error
        self._transport.abort()

    # For the transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(lost(exc or EOFError(), self.server, self.timeout))

    def data_received(self, data: bytes) -> None:
        """Take in bytes. The last answer of a part takes the exchange further."""
        if self.lost is not None:
            return
        size = len(data)
        self._moved += size
        self.last_progress = self._now()
        if self._pieces:
            self._pieces.append(data)
            self._have += size
            if self._have < self._need:
                return
            data = b"".join(self._pieces)
            self._pieces = []
        try:
            if self._exchange is None:
                raise ProtocolError("it sent something that no command asked for")
            at = self._parse(data)
            if len(self._answers) == self._wanted:
                if at != len(data):
                    raise ProtocolError("it sent more answers than there were commands")
                answers, self._answers = self._answers, []
                self._resume(answers)
            elif self._have:
                self._pieces = [data[at:] if at else data]
        except (ProtocolError, CacheError, ValueError) as error:
            self.close(lost(error, self.server, self.timeout))

    # Driving the exchange

    def _resume(self, answers: Any) -> None:
        """Take the next step of the exchange with these answers (`None` to begin). It sees a lost connection as an error."""
        exchange = self._exchange
        assert exchange is not None
        try:
            if self.lost is None:
                data, self._wanted = exchange.send(answers)
                if self.lost is None:
                    self._limit += len(data) / SLOWEST_LINE + self._wanted * COMMAND_TIME
                    self._write(data)
                    if len(data) > LARGE:
                        self._unsent = self._transport.get_write_buffer_size()
                    return
            while True:
                exchange.throw(self.lost)
        except StopIteration as stop:
            result: Any = stop.value
        except CacheError as error:
            result = error
        except Exception:
            # A fault of ours. What follows in the stream cannot be told apart from what was not read.
            self._exchange = None
            self.close(CacheConnectionError(f"an answer of {self.server} could not be understood", BACKEND))
            self._end(self.lost)
            raise
        self._end(result)

    def _end(self, result: Any) -> None:
        done, self._done, self._exchange = self._done, None, None
        assert done is not None
        if self.on_idle is not None:
            self.on_idle()
        done([Failed.of(result)] * self._count if self._count and isinstance(result, CacheError) else result)

    def _parse(self, data: bytes) -> int:
        """Take in the whole answers, and return where the rest begins: `_have` bytes, of an answer of `_need` or more."""
        answers, wanted, at, size = self._answers, self._wanted, 0, len(data)
        limit = self.entry_max + ITEM_OVERHEAD + 3
        while len(answers) < wanted:
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > LINE_MAX:
                    raise ProtocolError("a line that does not end")
                self._have, self._need = size - at, 0
                return at
            code = data[at : at + 2]
            if code == b"VA":
                _, length, token = data[at:end].split(b" ")
                stop = end + 2 + int(length)
                if not end + 2 <= stop < end + limit or token[:1] not in _TOKENS:
                    raise ProtocolError("a value of a size that no item has, or without a CAS token")
                if size < stop + 2:
                    self._have, self._need = size - at, stop + 2 - at
                    return at
                if data[stop : stop + 2] != b"\r\n":
                    raise ProtocolError("a value has another size than its first line says")
                answers.append((data[end + 2 : stop], int(token[1:])))
                at = stop + 2
                continue
            line = data[at:end]
            if (known := _CODES.get(code)) is not None and line[2:3] in (b"", b" "):
                if known == 0 and len(line) > 3:
                    if line[3:4] not in _TOKENS:
                        raise ProtocolError("an answer has no CAS token")
                    known = int(line[4:])
                answers.append(known)
            elif line.startswith(b"STAT "):
                # All of it at once or not at all: it is asked for once a minute.
                stop = data.find(b"\r\nEND\r\n", end)
                if stop < 0:
                    if data.count(b"\r\n", at) > STATISTICS_MAX:
                        raise ProtocolError("statistics that do not end")
                    self._have, self._need = size - at, 0
                    return at
                pairs = [each.split(b" ", 2) for each in data[at:stop].split(b"\r\n")]
                answers.append({pair[1]: pair[2] for pair in pairs if len(pair) == 3})
                end = stop + 5
            else:
                answers.append(parse_error(line))
            at = end + 2
        self._have = 0
        return at

    # Time

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._unsent = self._transport.get_write_buffer_size()
        self._armed_for = self._limit
        self._timer = self._timers.call_at(self._limit, self._check)

    def _check(self) -> None:
        """End an exchange whose time is up, unless its bytes are still moving."""
        self._timer = None
        if self._exchange is None:
            return
        now = self._now()
        unsent = self._transport.get_write_buffer_size()
        if sent := max(self._unsent - unsent, 0):
            self.last_progress = now
        self._limit += (self._moved + sent) / STALLED_LINE
        self._moved = 0
        if now - self._armed_for > STALL:
            self._limit = max(self._limit, now + STALL)  # The loop stood still. What has come meanwhile is heard first.
        if self._limit <= now:
            self.close(lost(TimeoutError(), self.server, self.timeout))
        else:
            self._arm()

    def _synced_first(self, exchange: Exchange[T]) -> Exchange[T]:
        yield from self.sync()
        return (yield from exchange)

    def sync(self) -> Exchange[None]:
        """Learn the server's time and when it was started. Raises `CacheError` for a server that will not do."""
        before = self._now()
        stats: Any = yield from ask(b"stats\r\n")
        after = self._now()
        try:
            version, at, uptime = stats[b"version"], int(stats[b"time"]), int(stats[b"uptime"])
        except (KeyError, ValueError, TypeError):
            raise self._unlike_memcached() from None
        if tuple(map(int, re.findall(rb"\d{1,9}", version)[:3])) < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise CacheConfigurationError(
                f"memcached: {self.server} is Memcached {version.decode('ascii', 'replace')[:20]}, and {needed} is needed"
            )
        # It names the second that has begun, at some moment between the question and the answer.
        earliest, latest = at - after, at + 1 - before
        ours = self.clock.wall() - after
        # The clocks agree: ours is the finer one. Else the middle of what it may be.
        self._offset = ours if earliest - 0.1 <= ours <= latest + 0.1 else (earliest + latest) / 2
        self._synced = after
        if not self.epoch:
            self.epoch = (at - uptime) * 1e6

    def handshake(self) -> Exchange[None]:
        """Learn what has to be known of a server before it is used. Raises `CacheError` for a server that will not do."""
        settings: Any = yield from ask(b"stats settings\r\n")
        try:
            entry_max, cas = int(settings[b"item_size_max"]) - ITEM_OVERHEAD, settings.get(b"cas_enabled")
        except (KeyError, ValueError, TypeError):
            raise self._unlike_memcached() from None
        if cas != b"yes":
            raise CacheConfigurationError(f"memcached: {self.server} runs without CAS (-C), which cachebus needs")
        self.entry_max = entry_max

    def _unlike_memcached(self) -> CacheError:
        return CacheConnectionError(f"{self.server} does not answer as a Memcached does", BACKEND)


# Commands


def read(name: str) -> bytes:
    """Return the command that reads an item and its CAS token."""
    return f"mg {name} v c\r\n".encode()


def store(name: str, entry: bytes, seconds: int, condition: bytes = b"") -> bytes:
    """Return the command that stores an entry and answers its CAS token."""
    return b"ms %b %d T%d c%b\r\n%b\r\n" % (name.encode(), len(entry), seconds, condition, entry)


def ask(command: bytes) -> Exchange[Answer]:
    """Return the answer to one command. Raises the `CacheError` with which the server refused it."""
    (answer,) = yield command, 1
    if isinstance(answer, CacheError):
        raise answer
    return answer


def first_error(answers: Sequence[Answer]) -> CacheError | None:
    """Return the error with which the server refused one of several commands."""
    return next((each for each in answers if isinstance(each, CacheError)), None)


def unlike() -> CacheError:
    """Return the error for an answer of another kind than the command has."""
    return CacheBackendError("the server answered something else; Memcached 1.6 is needed", BACKEND)
