"""Subscriptions to Redis channels, and notification of waiters when a lease ends.

The Redis user needs the commands SUBSCRIBE and PING, and access to the channel (`&shop#*`).

The scripts that end a lease publish its token on `<namespace>#leases`, with the name of the error if the loader failed:

    1 byte    length of the token, then the token
    rest      the name of the error, or nothing

A delete ends a lease without a notification, and channels do not store messages. Waits are therefore short: when a wait
times out, the caller queries the server again.
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
"""Maximum seconds between two connection attempts: `PAUSE_MIN` after the first failure, doubling up to `PAUSE_MAX`.
Each pause is random, so that processes do not reconnect at the same time."""

IDLE = 60.0  # Seconds after the last wait before the channel is unsubscribed.
MAX_WAIT = 60.0  # Maximum seconds of one wait. Longer requests are shortened.
OnReply = Callable[[Reply], None]


class ChannelSubscription:
    """Subscription to a channel over a dedicated connection, until `close`. Bound to one asyncio event loop.

    `on_message` receives each message as bytes. Messages published while the connection is down are lost, so
    `on_subscribed` is called after the first connection and after each reconnection: check the current state then.
    `on_error` receives each error before the first connection succeeds. If such an error is permanent, for example
    because the channel is forbidden, it ends the subscription. The callbacks run on the event loop and must not block.

    In a cluster, the connection leads to any server, because `PUBLISH` reaches all of them.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[RedisConnection]],
        channel: str,
        on_message: Callable[[bytes], None],
        on_subscribed: Callable[[], None],
        on_error: Callable[[CacheError], None],
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._connect = connect
        self._channel = channel
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._on_error = on_error
        self._clock = clock
        self.is_up = False
        self._task = asyncio.create_task(self._run())

    def __repr__(self) -> str:
        state = "up" if self.is_up else "closed" if self._task.done() else "away"
        return f"<ChannelSubscription to {self._channel!r}, {state}>"

    def cancel(self) -> None:
        """Stop the subscription. The connection is closed shortly afterwards."""
        self._task.cancel()
        self.is_up = False

    async def close(self) -> None:
        """Stop the subscription and close the connection. Safe to call twice."""
        self.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        failures = 0
        connected = False
        while True:
            started = self._clock.monotonic()
            try:
                connection = await self._connect()
                try:
                    connection.on_push = self._pushed
                    # SUBSCRIBE answers with a push message only, so PING provides the reply to wait for.
                    (reply,) = await connection.ask(pack("SUBSCRIBE", self._channel) + pack("PING"))
                    if isinstance(reply, hiredis.ReplyError):
                        raise translate(reply)
                    self.is_up = connected = True
                    _call(self._on_subscribed)
                    await connection.gone()
                finally:
                    self.is_up = False
                    connection.drop(CacheClosed("the subscription was closed"))
                if self._clock.monotonic() - started > PAUSE_MAX:
                    failures = 0  # The connection was stable.
            except CacheError as error:
                if not connected:
                    _call(self._on_error, error)
                    if not error.transient:
                        return
            longest = min(PAUSE_MAX, PAUSE_MIN * 2**failures)
            failures = min(failures + 1, 16)
            pause = random.uniform(longest / 2, longest)
            await self._clock.sleep_until(self._clock.monotonic() + pause)

    def _pushed(self, push: Sequence[Any]) -> None:
        if push[0] == b"message" and not self._task.cancelling():
            _call(self._on_message, push[2])


def _call(function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception as error:  # A bug in the callback, not a failure of the connection.
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "the callback of a Redis channel failed", "exception": error})


class LeaseWatch:
    """Callers in this process that wait for leases of one namespace, at most `limit`. Bound to one asyncio event loop.

    It connects when the first caller waits. It remembers the last `memory` leases that ended, for a caller that learned
    of a lease before its end but starts to wait afterwards.
    """

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
        self._error: CacheError | None = None
        self._idle: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<LeaseWatch {self._channel!r}, {self._count}/{self._limit} waiting>"

    def watch(self, request: WatchLease, on_reply: OnReply) -> None:
        """Wait for the end of a lease, and call `on_reply` once.

        The reply is `NotHeld` when the lease has ended, `Failed` with `LoaderFailed` if its loader failed, or `Loading`
        when the wait times out. Any other `Failed` means that the store cannot wait for leases.
        """
        if not request.wait >= 0:
            on_reply(Failed.of(BadMessage(f"wait must be zero or more seconds, not {request.wait!r}")))
            return
        if (ended := self._ended.get(request.token)) is not None:
            on_reply(ended)
            return
        if self._subscription is None:
            self._error = None
            self._subscription = self._subscribe(self._channel, self._on_message, self._on_subscribed, self._on_failure)
        if self._error is not None:
            on_reply(Failed.of(self._error))
        elif self._count >= self._limit:
            on_reply(Failed.of(Overloaded(f"{self._limit} callers already wait for leases", "", self._limit)))
        else:
            self._wait(request, on_reply)

    async def close(self) -> None:
        """Fail every waiter, and unsubscribe from the channel. Safe to call twice."""
        self._reply_to_all(Failed.of(CacheClosed("the store was closed")))
        if self._idle is not None:
            self._idle.cancel()
        subscription = self._subscription
        self._unsubscribe()
        if subscription is not None:
            await subscription.close()

    # The waiters

    def _wait(self, request: WatchLease, on_reply: OnReply) -> None:
        token = request.token

        def time_out() -> None:
            waiters = self._waiting[token]
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[token]
            self._remove_waiters(1)
            on_reply(Loading(token))

        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        waiter = (on_reply, asyncio.get_running_loop().call_later(min(request.wait, MAX_WAIT), time_out))
        self._waiting.setdefault(token, []).append(waiter)
        self._count += 1

    def _reply(self, token: str, reply: Reply) -> None:
        waiters = self._waiting.pop(token, ())
        for on_reply, timer in waiters:
            timer.cancel()
            on_reply(reply)
        if waiters:
            self._remove_waiters(len(waiters))

    def _reply_to_all(self, reply: Reply) -> None:
        for token in tuple(self._waiting):
            self._reply(token, reply)

    def _remove_waiters(self, count: int) -> None:
        self._count -= count
        if not self._count and self._idle is None:
            self._idle = asyncio.get_running_loop().call_later(IDLE, self._unsubscribe)

    # The channel

    def _on_failure(self, error: CacheError) -> None:
        self._error = error
        self._reply_to_all(Failed.of(error))
        self._remove_waiters(0)  # Starts the idle timer: no caller waits after an error.

    def _on_subscribed(self) -> None:
        self._error = None
        self._reply_to_all(NotHeld())  # Notifications may have been lost, so the waiters check for themselves.

    def _on_message(self, payload: bytes) -> None:
        length = payload[0] if payload else 0
        token = payload[1 : 1 + length].decode(errors="replace")
        error = payload[1 + length :].decode(errors="replace")
        reply: Reply = Failed.of(LoaderFailed(error=error)) if error else NotHeld()
        self._ended[token] = reply
        if len(self._ended) > self._memory:
            self._ended.popitem(last=False)
        self._reply(token, reply)

    def _unsubscribe(self) -> None:
        """Unsubscribe until the next caller waits."""
        self._idle = None
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.cancel()
        self._ended.clear()  # It would miss the leases that end from now on.
