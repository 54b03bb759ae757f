"""Auto-pipelined connection to a Redis server: batches are sent without waiting and answered in the same order.

The connection reads every reply completely, even if its caller was cancelled or timed out. A caller therefore never
gets another caller's reply. If the stream cannot be read to the end, the connection is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import hiredis
from msgspec import Struct

from cachebus.actors.ports import SLOWEST_LINE, Clock
from cachebus.messages import CacheError

from .errors import lost, translate, translate_handshake_error

OnRawReplies: TypeAlias = Callable[["Sequence[Any] | CacheError"], None]
"""Callback for the replies of a batch, in order, or for the error that replaces them."""

Argument: TypeAlias = str | bytes | int

UNSENT_MAX = 4 << 20  # Unsent bytes above which no further batch is accepted.

_MORE: Any = object()  # Returned by hiredis when no complete reply is buffered.


# The type hints of hiredis accept single-word commands only.
pack_words: Callable[[tuple[Argument, ...]], bytes] = cast("Any", hiredis.pack_command)


def pack(*arguments: Argument) -> bytes:
    """Encode a command."""
    return pack_words(arguments)


class InFlight(Protocol):
    """Batch of `wanted` commands whose replies are pending."""

    @property
    def wanted(self) -> int: ...

    def answer(self, replies: Sequence[Any] | CacheError, /) -> None:
        """Process the replies, in order, or the error that replaces them."""

    def changes(self) -> Iterable[Any]:
        """Return the keys that the commands may change."""
        ...


class PendingReplies(Struct, eq=False):
    """Commands that change no entry and whose replies go to a callback."""

    wanted: int
    answer: OnRawReplies

    def changes(self) -> Iterable[Any]:
        return ()


class Change:
    """Condition that tasks wait for. `awaited` is `None` while no task waits."""

    def __init__(self) -> None:
        self.awaited: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Wait for the next change."""
        if self.awaited is None:
            self.awaited = asyncio.get_running_loop().create_future()
        await asyncio.shield(self.awaited)

    def wake(self) -> None:
        """Wake every waiting task."""
        if self.awaited is not None:
            self.awaited.set_result(None)
            self.awaited = None


class RedisConnection(asyncio.Protocol):
    """Connection with up to `window` batches in flight, answered in order.

    `server` is the name used in errors; `handshake_done` is true once the server has answered the handshake. `on_push`
    receives unsolicited messages, such as those of a channel. `received_at` is the monotonic time of the last bytes
    received. `offset` is how far the server's clock is ahead of the monotonic clock, in seconds.

    Every `health_interval` seconds, the connection sends `TIME`. The reply keeps the connection alive and `offset`
    accurate. If nothing arrives for that interval, plus the time that the bytes in flight may take, the connection is
    dropped.
    """

    def __init__(self, server: str, clock: Clock, *, window: int, health_interval: float | None) -> None:
        self.server = server
        self.lost: CacheError | None = None
        self.handshake_done = False
        self.on_push: Callable[[Sequence[Any]], None] | None = None
        self._clock = clock
        self._monotonic = clock.monotonic
        self.window = window
        self._health_interval = health_interval
        self.offset = float("inf")
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self.in_flight: deque[InFlight] = deque()
        self._replies: list[Any] = []  # Replies so far to the oldest batch in flight.
        self._change = Change()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.paused = False
        self.received_at = self._sent_at = self._checked_at = float("-inf")
        self._unsent = 0  # Size of the write buffer when last checked.
        self._recent = 0  # Bytes written since the last bytes were received.

    def __repr__(self) -> str:
        state = "lost" if self.lost else "up"
        return f"<RedisConnection to {self.server} {state}, {len(self.in_flight)}/{self.window} batches in flight>"

    # For the sender

    @property
    def last_progress(self) -> float:
        """Monotonic time at which bytes were last received from the server or sent to it."""
        if self._transport is not None:
            unsent = self._transport.get_write_buffer_size()
            if unsent < self._unsent:
                self._sent_at = self._monotonic()
            self._unsent = unsent
        return max(self.received_at, self._sent_at)

    @property
    def has_room(self) -> bool:
        """True if another batch may be sent now."""
        return len(self.in_flight) < self.window and not self.paused and self.lost is None

    async def room(self) -> None:
        """Wait until another batch may be sent. Raises `CacheConnectionError` once the connection is lost."""
        while self.lost is None and not self.has_room:
            await self._change.wait()
        if self.lost is not None:
            raise self.lost

    def send(self, data: bytes, batch: InFlight) -> None:
        """Send commands without waiting. On a lost connection, answer the batch with the error at once."""
        if self.lost is not None or self._transport is None:
            batch.answer(self.lost or lost(self.server, "it is not established"))
            return
        self.in_flight.append(batch)
        self._recent += len(data)
        self._transport.write(data)

    def ask(self, *commands: bytes) -> asyncio.Future[list[Any]]:
        """Send packed commands. The future resolves to their replies, or raises the connection's error."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

        def settle(replies: Sequence[Any] | CacheError) -> None:
            if future.done():
                return
            if isinstance(replies, CacheError):
                future.set_exception(replies)
            else:
                future.set_result(list(replies))

        self.send(b"".join(commands), PendingReplies(len(commands), settle))
        return future

    async def call(self, *arguments: Argument) -> Any:
        """Send one command when there is room, and return its reply. Raises `CacheError` for an error reply."""
        await self.room()
        (reply,) = await self.ask(pack(*arguments))
        if isinstance(reply, hiredis.ReplyError):
            raise translate(reply)
        return reply

    def now(self) -> float:
        """Return the server's estimated Unix time in seconds.

        The estimate is never early, so that a reported time to live is never longer than the real one.
        """
        return self._monotonic() + self.offset

    def set_time(self, reply: Any, asked_at: float) -> None:
        """Update the clock offset from a reply to `TIME`, sent at `asked_at` on the local monotonic clock."""
        seconds, micros = reply
        time = int(seconds) + int(micros) * 1e-6
        # The server read its clock between `asked_at` and now, so the offset lies between these two bounds. The
        # smallest upper bound so far is kept, unless it contradicts this reply: then the server's clock was set.
        earliest, latest = time - self._clock.monotonic(), time - asked_at
        self.offset = min(self.offset, latest) if earliest <= self.offset else latest

    def watch(self) -> None:
        """Schedule the next health check."""
        if self._health_interval is not None:
            self._timer = asyncio.get_running_loop().call_later(self._health_interval, self._check)

    async def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self.in_flight:
            await self._change.wait()

    async def gone(self) -> CacheError:
        """Wait until the connection is lost, and return the error."""
        while self.lost is None:
            await self._change.wait()
        return self.lost

    def drop(self, error: CacheError) -> None:
        """Close the connection, and answer every batch in flight with `error`."""
        if self.lost is None:
            self.lost = error
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        while self.in_flight:
            self.in_flight.popleft().answer(self.lost)
        self._change.wake()

    # For the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=UNSENT_MAX)
        if self.lost is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        early_replies = self._replies if not self.handshake_done else []
        if early_replies and type(early_replies[0]) is hiredis.ReplyError:
            # The server sent a reason and closed the connection.
            self.drop(translate_handshake_error(early_replies[0], self.server))
            return
        self.drop(lost(self.server, "closed by the server" if exc is None else type(exc).__name__))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._change.wake()

    def data_received(self, data: bytes) -> None:
        self.received_at = self._monotonic()
        self._recent = 0
        in_flight, gets, replies = self.in_flight, self._reader.gets, self._replies
        batch: InFlight | None = None
        try:
            self._reader.feed(data)
            while (reply := gets()) is not _MORE:
                if type(reply) is hiredis.PushNotification:
                    if self.on_push is not None:
                        self.on_push(reply)
                    continue
                if not in_flight:
                    if type(reply) is hiredis.ReplyError and not self.handshake_done:
                        self.drop(
                            translate_handshake_error(reply, self.server)
                        )  # Sent before any command, such as "too many clients".
                    else:
                        self.drop(lost(self.server, "it sent a reply without a request"))
                    return
                replies.append(reply)
                if len(replies) == in_flight[0].wanted:
                    batch = in_flight.popleft()
                    self._replies = []
                    batch.answer(replies)
                    replies = self._replies
        except hiredis.ProtocolError:
            self.drop(lost(self.server, "it sent invalid RESP"))
        except Exception:
            # A bug in cachebus: an unreadable reply is reported on its own request and does not get here. The position
            # in the stream is no longer known.
            self.drop(error := lost(self.server, "a reply could not be processed"))
            if batch is not None:
                batch.answer(error)
            raise
        if batch is not None and self._change.awaited:
            self._change.wake()

    # Helpers

    def _check(self) -> None:
        assert self._health_interval is not None
        now = self._monotonic()
        max_silence = self._health_interval + self._recent / SLOWEST_LINE
        if self.received_at <= self._checked_at and self.last_progress <= now - max_silence:
            self.drop(lost(self.server, f"nothing received for {now - self.received_at:g} s"))
            return
        self._checked_at = now

        def answered(replies: Sequence[Any] | CacheError) -> None:
            if not isinstance(replies, CacheError) and not isinstance(replies[0], hiredis.ReplyError):
                self.set_time(replies[0], now)

        self.send(pack("TIME"), PendingReplies(1, answered))
        self.watch()
