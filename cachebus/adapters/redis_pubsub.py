"""Subscriptions to channels of a Redis server, for callers that would otherwise have to ask again and again.

The user needs the commands SUBSCRIBE and PING, and the right to the channel (`&shop#*`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import hiredis

from cachebus.actors.ports import SYSTEM_CLOCK, Clock
from cachebus.messages import CacheClosed, CacheError

from .redis_connection import RedisConnection, pack
from .redis_errors import translate

PAUSE_MIN = 0.05
PAUSE_MAX = 2.0
"""Seconds between two attempts to connect: the longest pause after the first failure, and after many. A pause is random, so
that not all processes come back at once."""


class ChannelSubscription:
    """A channel that is listened to until `close`, over a connection of its own. For one asyncio event loop.

    `heard` gets each message as bytes. A channel keeps nothing: what is published while the connection is away is lost. So
    `subscribed` is called whenever the server begins to tell us messages, at first and after each loss; look for yourself
    then. Until the first time `failed` gets each error; one that is not transient, such as a channel that is forbidden, ends
    the subscription. The functions are called on the event loop and must not wait.

    In a cluster the connection leads to any one server, because a plain `PUBLISH` goes to all of them.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[RedisConnection]],
        channel: str,
        heard: Callable[[bytes], None],
        subscribed: Callable[[], None],
        failed: Callable[[CacheError], None],
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._connect = connect
        self._channel = channel
        self._heard = heard
        self._subscribed = subscribed
        self._failed = failed
        self._clock = clock
        self.is_up = False
        self._task = asyncio.create_task(self._run())

    def __repr__(self) -> str:
        state = "up" if self.is_up else "closed" if self._task.done() else "away"
        return f"<ChannelSubscription to {self._channel!r}, {state}>"

    def cancel(self) -> None:
        """Hear nothing any more. The connection is closed soon."""
        self._task.cancel()
        self.is_up = False

    async def close(self) -> None:
        """Hear nothing any more, and close the connection. Safe to call twice."""
        self.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        failures = 0
        stood = False
        while True:
            started = self._clock.monotonic()
            try:
                connection = await self._connect()
                try:
                    connection.on_push = self._pushed
                    # The PING gives SUBSCRIBE the one reply that a command of ours has; what it says itself is a push.
                    (reply,) = await connection.ask(pack("SUBSCRIBE", self._channel) + pack("PING"))
                    if isinstance(reply, hiredis.ReplyError):
                        raise translate(reply)
                    self.is_up = stood = True
                    _call(self._subscribed)
                    await connection.gone()
                finally:
                    self.is_up = False
                    connection.drop(CacheClosed("the subscription was closed"))
                if self._clock.monotonic() - started > PAUSE_MAX:
                    failures = 0  # It did well for a while.
            except CacheError as error:
                if not stood:
                    _call(self._failed, error)
                    if not error.transient:
                        return
            longest = min(PAUSE_MAX, PAUSE_MIN * 2**failures)
            failures = min(failures + 1, 16)
            pause = random.uniform(longest / 2, longest)
            await self._clock.sleep_until(self._clock.monotonic() + pause)

    def _pushed(self, push: Sequence[Any]) -> None:
        if push[0] == b"message" and not self._task.cancelling():
            _call(self._heard, push[2])


def _call(function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception as error:  # A fault of the caller's, and not of the connection.
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "a listener to a Redis channel failed", "exception": error})
