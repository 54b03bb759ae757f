"""A connection to one Memcached server. It runs one exchange at a time, driven by the incoming bytes.

An exchange is a generator. It yields commands and the number of their answers, and receives these answers. No task
waits for them: the transport delivers bytes, and the last answer resumes the generator on the stack of the event
loop.
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
"""The answer to one command. One of:

* a value with its CAS token,
* a CAS token (0 if none was requested), `MISS`, `NOT_STORED` or `EXISTS`,
* statistics,
* the error with which the server rejected the command.
"""

T = TypeVar("T")
Exchange: TypeAlias = Generator[tuple[bytes, int], list[Answer], T]
"""A generator that yields commands and the number of their answers, receives the answers, and returns a result."""

Done: TypeAlias = Callable[[Any], None]
"""Called with the result of an exchange, or with the `CacheError` with which it failed."""

OLDEST = (1, 6, 10)
"""The first version with the required meta commands: `ms` returns a CAS token, and `md` takes one."""

RESYNC = 60.0
"""Seconds after which the server's clock is read again."""

COMMAND_TIME = 20e-6
"""Seconds by which each command extends the time limit of an exchange. `SLOWEST_LINE` applies to sent bytes too."""

STALLED_LINE = 100e3
"""Bytes per second above which a transfer counts as progressing. Transferred bytes extend the time limit."""

LARGE = 1 << 16
"""Size in bytes above which commands may not be sent at once."""

STALL = 0.03
"""Seconds by which a timer may be late before the event loop counts as blocked."""

ITEM_OVERHEAD = 320
"""Bytes of an item in addition to the entry: a 48-byte header, a CAS token, flags, a name and two line ends."""

LINE_MAX = 2048
"""Maximum size in bytes of the first line of an answer."""

STATISTICS_MAX = 1000
"""Maximum number of lines of statistics in an answer."""

ITEM_MAX = 1 << 30
"""Maximum size in bytes of an item, until the server's limit is known."""

_TOKENS = (b"c", b"O")
"""First bytes of a CAS token, and of an opaque mark that the server returns unchanged."""
_CODES = {b"HD": 0, b"EN": MISS, b"NF": MISS, b"NS": NOT_STORED, b"EX": EXISTS}


class Connection(asyncio.Protocol):
    """The protocol over one transport. Each answer is read to its end, or the connection is dropped.

    * `epoch` is the base of the versions of the server's items.
    * `entry_max` is the maximum size of an entry in bytes.
    * `generation` is the last known generation of the namespace, and `head` the prefix of names under it.
    * `limits` holds the last known items of rate limits by item name: raw value and CAS token.
    * `last_progress` is the time at which bytes were last transferred, on the monotonic clock.
    * `timeout` is the time limit of an exchange in seconds.
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
        """Return the estimated Unix time of the server in seconds."""
        return self._now() + self._offset

    @property
    def waiting(self) -> bool:
        return self._exchange is not None and self.lost is None

    def begin(self, exchange: Exchange[Any], done: Done, count: int = 0) -> None:
        """Start an exchange on an idle connection.

        `done` is called once with the result or the error, possibly before this method returns. If `count` is given, an
        error is passed as that many `Failed` replies.
        """
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
        """Drop the connection. The exchange in flight fails with `error`."""
        if self.lost is None:
            self.lost = error or CacheConnectionError(f"the connection to {self.server} was closed", BACKEND)
            self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._exchange is not None:
            self._resume(None)

    def drop_later(self, error: CacheError) -> None:
        """Drop the connection from within its exchange, which then ends."""
        self.lost = self.lost or error
        self._transport.abort()

    # For the transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(lost(exc or EOFError(), self.server, self.timeout))

    def data_received(self, data: bytes) -> None:
        """Parse incoming bytes. The last expected answer resumes the exchange."""
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
                raise ProtocolError("data without a command")
            at = self._parse(data)
            if len(self._answers) == self._wanted:
                if at != len(data):
                    raise ProtocolError("more answers than commands")
                answers, self._answers = self._answers, []
                self._resume(answers)
            elif self._have:
                self._pieces = [data[at:] if at else data]
        except (ProtocolError, CacheError, ValueError) as error:
            self.close(lost(error, self.server, self.timeout))

    # Driving the exchange

    def _resume(self, answers: Any) -> None:
        """Resume the exchange with these answers, or `None` to start it.

        If the connection is lost, throw the error in.
        """
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
            # A bug. The position in the stream is no longer known, so the connection cannot be used.
            self._exchange = None
            self.close(CacheConnectionError(f"cannot process an answer of {self.server}", BACKEND))
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
        """Parse the complete answers, and return the position of the rest.

        The rest has `_have` bytes; its answer needs at least `_need`.
        """
        answers, wanted, at, size = self._answers, self._wanted, 0, len(data)
        limit = self.entry_max + ITEM_OVERHEAD + 3
        while len(answers) < wanted:
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > LINE_MAX:
                    raise ProtocolError("a line without an end")
                self._have, self._need = size - at, 0
                return at
            code = data[at : at + 2]
            if code == b"VA":
                _, length, token = data[at:end].split(b" ")
                stop = end + 2 + int(length)
                if not end + 2 <= stop < end + limit or token[:1] not in _TOKENS:
                    raise ProtocolError("a value with an invalid size or without a CAS token")
                if size < stop + 2:
                    self._have, self._need = size - at, stop + 2 - at
                    return at
                if data[stop : stop + 2] != b"\r\n":
                    raise ProtocolError("the size of a value does not match its first line")
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
                # Parsed again from the start if incomplete, because it is only requested once a minute.
                stop = data.find(b"\r\nEND\r\n", end)
                if stop < 0:
                    if data.count(b"\r\n", at) > STATISTICS_MAX:
                        raise ProtocolError("statistics without an end")
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
        """End an exchange that has reached its time limit, unless bytes are still being transferred."""
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
            self._limit = max(self._limit, now + STALL)  # The loop was blocked. Read the bytes that arrived first.
        if self._limit <= now:
            self.close(lost(TimeoutError(), self.server, self.timeout))
        else:
            self._arm()

    def _synced_first(self, exchange: Exchange[T]) -> Exchange[T]:
        yield from self.sync()
        return (yield from exchange)

    def sync(self) -> Exchange[None]:
        """Read the server's clock and its start time. Raises `CacheError` if the server is not suitable."""
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
                f"memcached: {self.server} is Memcached {version.decode('ascii', 'replace')[:20]}; {needed} is required"
            )
        # The server reports whole seconds, at some time between the request and the answer.
        earliest, latest = at - after, at + 1 - before
        ours = self.clock.wall() - after
        # If the clocks agree, use the local one, which is more precise. Otherwise use the middle of the possible range.
        self._offset = ours if earliest - 0.1 <= ours <= latest + 0.1 else (earliest + latest) / 2
        self._synced = after
        if not self.epoch:
            self.epoch = (at - uptime) * 1e6

    def handshake(self) -> Exchange[None]:
        """Read the settings of the server before its first use. Raises `CacheError` if the server is not suitable."""
        settings: Any = yield from ask(b"stats settings\r\n")
        try:
            entry_max, cas = int(settings[b"item_size_max"]) - ITEM_OVERHEAD, settings.get(b"cas_enabled")
        except (KeyError, ValueError, TypeError):
            raise self._unlike_memcached() from None
        if cas != b"yes":
            raise CacheConfigurationError(f"memcached: {self.server} runs without CAS (-C), which cachebus requires")
        self.entry_max = entry_max

    def _unlike_memcached(self) -> CacheError:
        return CacheConnectionError(f"{self.server} does not answer like a Memcached server", BACKEND)


# Commands


def read(name: str) -> bytes:
    """Return the command that reads an item and its CAS token."""
    return f"mg {name} v c\r\n".encode()


def store(name: str, entry: bytes, seconds: int, condition: bytes = b"") -> bytes:
    """Return the command that stores an entry and returns its CAS token."""
    return b"ms %b %d T%d c%b\r\n%b\r\n" % (name.encode(), len(entry), seconds, condition, entry)


def ask(command: bytes) -> Exchange[Answer]:
    """Return the answer to one command. If the server rejected it, the `CacheError` is raised."""
    (answer,) = yield command, 1
    if isinstance(answer, CacheError):
        raise answer
    return answer


def first_error(answers: Sequence[Answer]) -> CacheError | None:
    """Return the first error with which the server rejected one of several commands, or `None`."""
    return next((each for each in answers if isinstance(each, CacheError)), None)


def unlike() -> CacheError:
    """Return the error for an answer that does not fit the command."""
    return CacheBackendError("unexpected answer of the server; Memcached 1.6 is required", BACKEND)
