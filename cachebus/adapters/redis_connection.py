"""One connection to a Redis server, auto-pipelined: batches go out one after the other, and come back in that order.

Only the connection reads its socket, and it reads every reply to its end, whoever still waits for it. So a caller
that gave up never leaves half a reply behind for the next one; where that cannot be kept, the connection is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import hiredis

from cachebus.actors.ports import Clock
from cachebus.messages import CacheError

from .redis_errors import lost, translate, translate_greeting

Answer: TypeAlias = Callable[["list[Any] | CacheError"], None]
"""Told the replies of a batch, in order; or why there will be none."""

Argument: TypeAlias = str | bytes | int

_MORE: Any = object()  # What hiredis says when it has no whole reply.


# hiredis' own hints know commands of one word only.
pack_words: Callable[[tuple[Argument, ...]], bytes] = cast("Any", hiredis.pack_command)


def pack(*arguments: Argument) -> bytes:
    """A command as bytes."""
    return pack_words(arguments)


class _InFlight:
    __slots__ = ("answer", "replies", "wanted")

    def __init__(self, wanted: int, answer: Answer) -> None:
        self.wanted = wanted
        self.answer = answer
        self.replies: list[Any] = []


class RedisConnection(asyncio.Protocol):
    """A connection with up to `window` batches in flight.

    `server` names it in errors, `greeted` says that the server has taken us in. `silence` is in seconds: as often the server is asked for its time, which keeps the
    connection alive and our idea of the server's clock good; a server that says nothing at all for so long is given up.
    `on_push` is told what the server says unasked, such as a message of a channel.
    """

    def __init__(self, server: str, clock: Clock, *, window: int, silence: float | None) -> None:
        self.server = server
        self.lost: CacheError | None = None
        self.greeted = False
        self.on_push: Callable[[Sequence[Any]], None] | None = None
        self._clock = clock
        self._window = window
        self._silence = silence
        self._offset = float("inf")
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._in_flight: deque[_InFlight] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._heard = True
        self._unsent = 0

    def __repr__(self) -> str:
        state = "lost" if self.lost else "up"
        return f"<RedisConnection to {self.server} {state}, {len(self._in_flight)}/{self._window} batches in flight>"

    @property
    def in_flight(self) -> int:
        """How many batches wait for replies."""
        return len(self._in_flight)

    # For whoever sends

    @property
    def has_room(self) -> bool:
        """Whether another batch may be sent now."""
        return len(self._in_flight) < self._window and not self._paused and self.lost is None

    async def room(self) -> None:
        """Wait until another batch may be sent. Raises `CacheConnectionError` once the connection is lost."""
        while self.lost is None and not self.has_room:
            await self._change()
        if self.lost is not None:
            raise self.lost

    def send(self, data: bytes, wanted: int, answer: Answer) -> None:
        """Send commands with `wanted` replies. Never waits; a lost connection answers at once."""
        if self.lost is not None or self._transport is None:
            answer(self.lost or lost(self.server, "it is not up"))
            return
        self._in_flight.append(_InFlight(wanted, answer))
        self._transport.write(data)

    def ask(self, *commands: bytes) -> asyncio.Future[list[Any]]:
        """Send packed commands; the future has their replies, or the error of the connection."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

        def settle(replies: list[Any] | CacheError) -> None:
            if future.done():
                return
            if isinstance(replies, CacheError):
                future.set_exception(replies)
            else:
                future.set_result(replies)

        self.send(b"".join(commands), len(commands), settle)
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
        return self._clock.monotonic() + self._offset

    def set_time(self, reply: Any, asked_at: float) -> None:
        """Take in the server's reply to `TIME`, asked at `asked_at` of our clock."""
        seconds, micros = reply
        told = int(seconds) + int(micros) * 1e-6
        # It was told between then and now. The earliest moment is the bound, and the best bound so far is kept while
        # it agrees with what was told last: a clock that was set disagrees.
        earliest, latest = told - self._clock.monotonic(), told - asked_at
        self._offset = min(self._offset, latest) if earliest <= self._offset else latest

    def watch(self) -> None:
        """Begin to check the server's health."""
        if self._silence is not None:
            self._timer = asyncio.get_running_loop().call_later(self._silence, self._check)

    async def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self._in_flight:
            await self._change()

    async def gone(self) -> CacheError:
        """Wait until the connection is lost, and say why."""
        while self.lost is None:
            await self._change()
        return self.lost

    def drop(self, error: CacheError) -> None:
        """Give the connection up: what is in flight is answered with `error`."""
        if self.lost is None:
            self.lost = error
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        while self._in_flight:
            self._in_flight.popleft().answer(self.lost)
        self._changed()

    # For the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self.lost is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        said = self._in_flight[0].replies if self._in_flight and not self.greeted else []
        if said and type(said[0]) is hiredis.ReplyError:
            # It would not have us, said so, and closed.
            self.drop(translate_greeting(said[0], self.server))
            return
        self.drop(lost(self.server, "closed by the server" if exc is None else type(exc).__name__))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._changed()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        in_flight, gets = self._in_flight, self._reader.gets
        answered = False
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
                batch = in_flight[0]
                batch.replies.append(reply)
                if len(batch.replies) == batch.wanted:
                    in_flight.popleft()
                    answered = True
                    batch.answer(batch.replies)
        except hiredis.ProtocolError:
            self.drop(lost(self.server, "it sent what is not RESP"))
        except Exception:
            # A fault of ours in taking a reply apart. What follows in the stream is not to be trusted with it.
            self.drop(lost(self.server, "a reply could not be understood"))
            raise
        if answered:
            self._changed()

    # Helpers

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _changed(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _check(self) -> None:
        assert self._transport is not None
        assert self._silence is not None
        unsent = self._transport.get_write_buffer_size()
        if not self._heard and (not unsent or unsent >= self._unsent):
            self.drop(lost(self.server, f"not a word for {self._silence:g} s"))
            return
        self._heard = False
        asked_at = self._clock.monotonic()

        def answered(replies: list[Any] | CacheError) -> None:
            if not isinstance(replies, CacheError) and not isinstance(replies[0], hiredis.ReplyError):
                self.set_time(replies[0], asked_at)

        self.send(pack("TIME"), 1, answered)
        self._unsent = self._transport.get_write_buffer_size()
        self.watch()
