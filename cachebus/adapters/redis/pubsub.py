"""Channels of a Redis server, and waiting for the end of leases that others hold: they say it on a channel.

The user needs the commands SUBSCRIBE and PING, and the right to the channel (`&shop#*`).

The scripts that end a lease publish its token on `<namespace>#leases`, with the name of the error if a loader has failed:

    1 byte    length of the token, and the token
    rest      the name of the error, or nothing

A delete takes a lease away in silence, and a channel keeps nothing. So waits are short: a caller whose time is up asks the
server again.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import hiredis

from cachebus.actors.ports import SYSTEM_CLOCK, Clock
from cachebus.messages import (
    BadMessage,
    CacheClosed,
    CacheError,
    Failed,
    LoaderFailed,
    Loading,
    NotHeld,
    Overloaded,
    Reply,
    WatchLease,
)

from .connection import RedisConnection, pack
from .errors import translate

PAUSE_MIN = 0.05
PAUSE_MAX = 2.0
"""Seconds between two attempts to connect: the longest pause after the first failure, and after many. A pause is random, so
that not all processes come back at once."""

IDLE = 60.0  # Seconds after the last wait for which the channel is still listened to.
LONGEST = 60.0  # Seconds that one wait takes at most, whatever was asked for.
OnReply = Callable[[Reply], None]


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


class LeaseWatch:
    """The callers in this process that wait for leases of one namespace, at most `limit`. For one asyncio event loop.
    Nothing is connected before the first caller waits. At most `memory` recent ends are remembered: a caller may have
    heard of a lease before its end and ask after it."""

    def __init__(
        self, subscribe: Callable[..., ChannelSubscription], namespace: str, *, limit: int = 10_000, memory: int = 4096
    ) -> None:
        self._subscribe = subscribe
        self._channel = f"{namespace}#leases"
        self._limit = limit
        self._memory = memory
        self._waiting: dict[str, list[tuple[OnReply, asyncio.TimerHandle]]] = {}
        self._count = 0
        self._ended: OrderedDict[str, Reply] = OrderedDict()
        self._subscription: ChannelSubscription | None = None
        self._trouble: CacheError | None = None
        self._idle: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<LeaseWatch {self._channel!r}, {self._count}/{self._limit} waiting>"

    def watch(self, request: WatchLease, on_reply: OnReply) -> None:
        """Call `on_reply` with what became of a lease: `NotHeld` when it has ended, what its loader has failed with, or `Loading`
        when time is up. A `Failed` of the store says that there is no use in waiting here."""
        if not request.wait >= 0:
            on_reply(Failed.of(BadMessage(f"wait must be a number of seconds from 0, not {request.wait!r}")))
            return
        if (ended := self._ended.get(request.token)) is not None:
            on_reply(ended)
            return
        if self._subscription is None:
            self._trouble = None
            self._subscription = self._subscribe(self._channel, self._heard, self._subscribed, self._refused)
        if self._trouble is not None:
            on_reply(Failed.of(self._trouble))
        elif self._count >= self._limit:
            on_reply(Failed.of(Overloaded(f"{self._limit} callers wait for leases", "", self._limit)))
        else:
            self._wait(request, on_reply)

    async def close(self) -> None:
        """Tell every waiter that it is over, and leave the channel. Safe to call twice."""
        self._tell_all(Failed.of(CacheClosed("the store was closed")))
        if self._idle is not None:
            self._idle.cancel()
        subscription = self._subscription
        self._rest()
        if subscription is not None:
            await subscription.close()

    # The waiters

    def _wait(self, request: WatchLease, on_reply: OnReply) -> None:
        token = request.token

        def late() -> None:
            waiters = self._waiting[token]
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[token]
            self._leave(1)
            on_reply(Loading(token))

        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        waiter = (on_reply, asyncio.get_running_loop().call_later(min(request.wait, LONGEST), late))
        self._waiting.setdefault(token, []).append(waiter)
        self._count += 1

    def _tell(self, token: str, reply: Reply) -> None:
        waiters = self._waiting.pop(token, ())
        for on_reply, timer in waiters:
            timer.cancel()
            on_reply(reply)
        if waiters:
            self._leave(len(waiters))

    def _tell_all(self, reply: Reply) -> None:
        for token in tuple(self._waiting):
            self._tell(token, reply)

    def _leave(self, count: int) -> None:
        self._count -= count
        if not self._count and self._idle is None:
            self._idle = asyncio.get_running_loop().call_later(IDLE, self._rest)

    # The channel

    def _refused(self, error: CacheError) -> None:
        self._trouble = error
        self._tell_all(Failed.of(error))
        self._leave(0)  # No callers wait while there is trouble.

    def _subscribed(self) -> None:
        self._trouble = None
        self._tell_all(NotHeld())  # Something may have ended unheard: the waiters look for themselves.

    def _heard(self, payload: bytes) -> None:
        length = payload[0] if payload else 0
        token = payload[1 : 1 + length].decode(errors="replace")
        error = payload[1 + length :].decode(errors="replace")
        reply: Reply = Failed.of(LoaderFailed(error=error)) if error else NotHeld()
        self._ended[token] = reply
        if len(self._ended) > self._memory:
            self._ended.popitem(last=False)
        self._tell(token, reply)

    def _rest(self) -> None:
        """Listen no longer, until the next caller waits."""
        self._idle = None
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.cancel()
        self._ended.clear()  # What ends from now on is not heard.
