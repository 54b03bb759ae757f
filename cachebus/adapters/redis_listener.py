"""Listening to channels of a Redis server: a push for whoever would otherwise have to ask again and again.

    listener = store.listener()                        # of a RedisStore or a RedisClusterStore that is open
    place = listener.subscribe("shop#x", heard, missed)  # returns at once; the first one makes the connection
    await place.ready()                                # what is published from now on is heard
    ...
    place.close()
    await listener.close()

`heard(payload)` is told each message as bytes. A channel keeps nothing: what is published while the connection is away
is lost. So `missed()` is called after each loss, once the channel is heard again: look for yourself then. And look for
yourself after `ready`, not before. Both functions are called on the event loop and must not wait.

There is one connection for all channels, apart from those that carry requests; it is made anew after a loss, for as long
as anybody listens, and checked for signs of life as theirs are. In a cluster it leads to any one server, because a plain
`PUBLISH` goes to all of them. The user needs the commands SUBSCRIBE, UNSUBSCRIBE and PING, and the right to the channels
(`&shop#*`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import hiredis

from cachebus.actors.ports import SYSTEM_CLOCK, Clock
from cachebus.messages import CacheClosed, CacheError

from .redis_connection import Asked, RedisConnection, Waiters, pack
from .redis_errors import lost, translate

PAUSE_MIN = 0.05
PAUSE_MAX = 2.0
"""Seconds between two attempts to connect: the longest pause after the first failure, and after many. How long it really is
is left to chance, so that not everybody comes back at once."""


class Listening:
    """Somebody's place at a channel."""

    def __init__(
        self, listener: RedisListener, channel: bytes, heard: Callable[[bytes], None], missed: Callable[[], None]
    ):
        self._listener = listener
        self.channel = channel
        self.heard = heard
        self.missed = missed
        self.stood = False

    def __repr__(self) -> str:
        return f"<Listening to {self.channel!r}>"

    async def ready(self) -> None:
        """Wait until the server says that we listen. Raises `CacheConnectionError` when an attempt to connect has failed,
        and `CacheConfigurationError` when the server forbids the channel. After the first of these it goes on trying."""
        await self._listener.ready(self)

    def close(self) -> None:
        """Hear nothing any more. Safe to call twice."""
        self._listener.leave(self)


class _Channel(Waiters):
    def __init__(self) -> None:
        super().__init__()
        self.places: list[Listening] = []
        self.standing = False
        self.refused: CacheError | None = None


class RedisListener:
    """Subscriptions to channels over one connection, which `connect` makes. For one asyncio event loop."""

    def __init__(self, connect: Callable[[], Awaitable[RedisConnection]], *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._connect = connect
        self._clock = clock
        self._channels: dict[bytes, _Channel] = {}
        self._connection: RedisConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "up" if self._connection else "away" if self._task else "idle"
        return f"<RedisListener {state}, {len(self._channels)} channels>"

    def subscribe(
        self, channel: str | bytes, heard: Callable[[bytes], None], missed: Callable[[], None] = lambda: None
    ) -> Listening:
        """Listen to a channel. Returns at once; the place's `ready` waits until it holds. Raises `CacheClosed`."""
        if self._closed:
            raise CacheClosed("the listener was closed")
        name = channel.encode() if isinstance(channel, str) else channel
        place = Listening(self, name, heard, missed)
        known = self._channels.get(name)
        asked = known is not None and known.refused is None
        if known is None:
            known = self._channels[name] = _Channel()
        known.refused = None  # It may be allowed by now, and then for everybody.
        if not asked and self._connection is not None:
            self._ask(self._connection, name, known)
        place.stood = known.standing
        known.places.append(place)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return place

    async def ready(self, place: Listening) -> None:
        """As `Listening.ready`."""
        channel = self._channels.get(place.channel)
        if channel is None or place not in channel.places:
            raise CacheClosed(f"{place!r} was closed")
        if channel.refused is not None:
            raise channel.refused
        if not channel.standing:
            await channel.change()

    def leave(self, place: Listening) -> None:
        """As `Listening.close`."""
        channel = self._channels.get(place.channel)
        if channel is None or place not in channel.places:
            return
        channel.places.remove(place)
        if channel.places:
            return
        del self._channels[place.channel]
        channel.wake(CacheClosed(f"{place!r} was closed"))
        if self._connection is not None and channel.refused is None:
            # The PING gives it the one reply that a command of ours has; what it says itself is no reply but a push.
            self._connection.send(pack("UNSUBSCRIBE", place.channel) + _PING, Asked(1, lambda replies: None))

    async def close(self) -> None:
        """Hear nothing any more, and close the connection. Safe to call twice."""
        self._closed = True
        task, self._task = self._task, None
        error = CacheClosed("the listener was closed")
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._connection is not None:
            self._connection.drop(error)
            self._connection = None
        for channel in self._channels.values():
            channel.wake(error)
        self._channels.clear()

    async def _run(self) -> None:
        failures = 0
        while True:
            started = self._clock.monotonic()
            try:
                connection = await self._connect()
            except CacheError as error:
                for channel in self._channels.values():
                    channel.wake(error)
            else:
                await self._listen(connection)
                if self._clock.monotonic() - started > PAUSE_MAX:
                    failures = 0  # It did well for a while.
            longest = min(PAUSE_MAX, PAUSE_MIN * 2**failures)
            failures = min(failures + 1, 16)
            pause = random.uniform(longest / 2, longest)
            await self._clock.sleep_until(self._clock.monotonic() + pause)

    async def _listen(self, connection: RedisConnection) -> None:
        connection.on_push = self._pushed
        self._connection = connection
        for name, channel in self._channels.items():
            if channel.refused is None:
                self._ask(connection, name, channel)
        await connection.gone()
        self._connection = None
        for channel in self._channels.values():
            channel.standing = False

    def _ask(self, connection: RedisConnection, name: bytes, channel: _Channel) -> None:
        def answered(replies: Sequence[Any] | CacheError) -> None:
            if isinstance(replies, CacheError) or connection.lost is not None:
                return  # The connection is gone, and the next one asks again.
            (reply,) = replies
            if isinstance(reply, hiredis.ReplyError):
                # The reply of the PING is still to come, and would be taken for another's: begin anew, without this channel.
                channel.refused = translate(reply)
                channel.wake(channel.refused)
                connection.drop(lost(connection.server, "it refuses a channel"))
                return
            channel.standing = True
            channel.wake()
            for place in tuple(channel.places):
                if place.stood:
                    _call(place.missed)
                place.stood = True

        connection.send(pack("SUBSCRIBE", name) + _PING, Asked(1, answered))

    def _pushed(self, push: Sequence[Any]) -> None:
        if push[0] != b"message":
            return
        channel = self._channels.get(push[1])
        if channel is not None:
            for place in tuple(channel.places):
                _call(place.heard, push[2])


_PING = pack("PING")


def _call(function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception as error:  # What one listener does wrong is not the others' fault, nor the connection's.
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "a listener to a Redis channel failed", "exception": error})
