"""One connection to a Redis server, auto-pipelined: batches go out one after the other, and come back in that order.

The connection reads every reply to its end, even if its caller has gone. So a caller that gave up never leaves half a reply
behind for the next one; if that cannot be kept, the connection is dropped.
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

from .errors import lost, translate, translate_greeting

Answer: TypeAlias = Callable[["Sequence[Any] | CacheError"], None]
"""Takes the replies of a batch, in order; or why there will be none."""

Argument: TypeAlias = str | bytes | int

UNSENT_MAX = 4 << 20  # Bytes that may wait to be sent before no more batches are.

_MORE: Any = object()  # What hiredis says when it has no whole reply.


# hiredis' own hints know commands of one word only.
pack_words: Callable[[tuple[Argument, ...]], bytes] = cast("Any", hiredis.pack_command)  # Make bytes of a command.


def pack(*arguments: Argument) -> bytes:
    """A command as bytes."""
    return pack_words(arguments)


class InFlight(Protocol):
    """Commands that were sent, `wanted` of them, and what becomes of their replies."""

    @property
    def wanted(self) -> int: ...

    def answer(self, replies: Sequence[Any] | CacheError, /) -> None:
        """Take the replies, in order; or why there will be none."""

    def changes(self) -> Iterable[Any]:
        """The keys that the commands may change."""
        ...


class PendingReplies(Struct, eq=False):
    """Commands that change nothing that is cached, and whose replies go to a function."""

    wanted: int
    answer: Answer

    def changes(self) -> Iterable[Any]:
        return ()


class Change:
    """A change that tasks wait for; `awaited` while there are any."""

    def __init__(self) -> None:
        self.awaited: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Wait for the next change."""
        if self.awaited is None:
            self.awaited = asyncio.get_running_loop().create_future()
        await asyncio.shield(self.awaited)

    def wake(self) -> None:
        """End the wait of every task."""
        if self.awaited is not None:
            self.awaited.set_result(None)
            self.awaited = None


class RedisConnection(asyncio.Protocol):
    """A connection with up to `window` batches in flight, which are answered in order.

    `server` names it in errors, `greeted` says that the handshake is over. Every `health_interval` seconds the server is
    asked for its time, which keeps the connection alive and our idea of the server's clock good. A server that is silent for
    so long, and for the time that the bytes in flight may take, is given up. `on_push` takes what the server sends unasked,
    such as a message of a channel. `heard_at` is when bytes last came, `offset` what the server's clock is ahead of the
    monotonic one.
    """

    def __init__(self, server: str, clock: Clock, *, window: int, health_interval: float | None) -> None:
        self.server = server
        self.lost: CacheError | None = None
        self.greeted = False
        self.on_push: Callable[[Sequence[Any]], None] | None = None
        self._clock = clock
        self._monotonic = clock.monotonic
        self.window = window
        self._health_interval = health_interval
        self.offset = float("inf")
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self.in_flight: deque[InFlight] = deque()
        self._replies: list[Any] = []  # Of the batch that is answered next.
        self._change = Change()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.paused = False
        self.heard_at = self._sent_at = self._checked_at = float("-inf")
        self._unsent = 0  # Bytes that waited to be sent, when that was last looked at.
        self._recent = 0  # Bytes written since the server was last heard.

    def __repr__(self) -> str:
        state = "lost" if self.lost else "up"
        return f"<RedisConnection to {self.server} {state}, {len(self.in_flight)}/{self.window} batches in flight>"

    # For the sender

    @property
    def last_progress(self) -> float:
        """When bytes last came from the server, or left to it, on the monotonic clock."""
        if self._transport is not None:
            unsent = self._transport.get_write_buffer_size()
            if unsent < self._unsent:
                self._sent_at = self._monotonic()
            self._unsent = unsent
        return max(self.heard_at, self._sent_at)

    @property
    def has_room(self) -> bool:
        """Whether another batch may be sent now."""
        return len(self.in_flight) < self.window and not self.paused and self.lost is None

    async def room(self) -> None:
        """Wait until another batch may be sent. Raises `CacheConnectionError` once the connection is lost."""
        while self.lost is None and not self.has_room:
            await self._change.wait()
        if self.lost is not None:
            raise self.lost

    def send(self, data: bytes, batch: InFlight) -> None:
        """Send commands. Never waits; a lost connection answers at once."""
        if self.lost is not None or self._transport is None:
            batch.answer(self.lost or lost(self.server, "it is not up"))
            return
        self.in_flight.append(batch)
        self._recent += len(data)
        self._transport.write(data)

    def ask(self, *commands: bytes) -> asyncio.Future[list[Any]]:
        """Send packed commands; the future has their replies, or the error of the connection."""
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
        """The reply to one command, once there is room for it. Raises what the server says is wrong."""
        await self.room()
        (reply,) = await self.ask(pack(*arguments))
        if isinstance(reply, hiredis.ReplyError):
            raise translate(reply)
        return reply

    def now(self) -> float:
        """The server's Unix time in seconds, by its word and our monotonic clock: not before it, so that what we say is
        left of a time to live is not more than there is."""
        return self._monotonic() + self.offset

    def set_time(self, reply: Any, asked_at: float) -> None:
        """Take in the server's reply to `TIME`, asked at `asked_at` of our clock."""
        seconds, micros = reply
        time = int(seconds) + int(micros) * 1e-6
        # It was the time at a moment between then and now. The earliest moment is the bound, and the best bound so far is
        # kept while it agrees with the last reply: a clock that was set disagrees.
        earliest, latest = time - self._clock.monotonic(), time - asked_at
        self.offset = min(self.offset, latest) if earliest <= self.offset else latest

    def watch(self) -> None:
        """Begin to check the server's health."""
        if self._health_interval is not None:
            self._timer = asyncio.get_running_loop().call_later(self._health_interval, self._check)

    async def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self.in_flight:
            await self._change.wait()

    async def gone(self) -> CacheError:
        """Wait until the connection is lost, and say why."""
        while self.lost is None:
            await self._change.wait()
        return self.lost

    def drop(self, error: CacheError) -> None:
        """Give the connection up: what is in flight is answered with `error`."""
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
        said = self._replies if not self.greeted else []
        if said and type(said[0]) is hiredis.ReplyError:
            # It would not have us, said so, and closed.
            self.drop(translate_greeting(said[0], self.server))
            return
        self.drop(lost(self.server, "closed by the server" if exc is None else type(exc).__name__))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._change.wake()

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._monotonic()
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
                    if type(reply) is hiredis.ReplyError and not self.greeted:
                        self.drop(translate_greeting(reply, self.server))  # Said before it was asked anything.
                    else:
                        self.drop(lost(self.server, "it sent a reply that nobody asked for"))
                    return
                replies.append(reply)
                if len(replies) == in_flight[0].wanted:
                    batch = in_flight.popleft()
                    self._replies = []
                    batch.answer(replies)
                    replies = self._replies
        except hiredis.ProtocolError:
            self.drop(lost(self.server, "it sent what is not RESP"))
        except Exception:
            # A fault of ours: what cannot be read in a reply is an error of its own request. What follows in the stream is not
            # to be trusted with it.
            self.drop(error := lost(self.server, "a reply could not be understood"))
            if batch is not None:
                batch.answer(error)
            raise
        if batch is not None and self._change.awaited:
            self._change.wake()

    # Helpers

    def _check(self) -> None:
        assert self._health_interval is not None
        now = self._monotonic()
        patience = self._health_interval + self._recent / SLOWEST_LINE
        if self.heard_at <= self._checked_at and self.last_progress <= now - patience:
            self.drop(lost(self.server, f"not a word for {now - self.heard_at:g} s"))
            return
        self._checked_at = now

        def answered(replies: Sequence[Any] | CacheError) -> None:
            if not isinstance(replies, CacheError) and not isinstance(replies[0], hiredis.ReplyError):
                self.set_time(replies[0], now)

        self.send(pack("TIME"), PendingReplies(1, answered))
        self.watch()
