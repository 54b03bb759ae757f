"""Waiting for the end of leases that others hold in Redis: they say it on a channel of the namespace.

The scripts that end a lease publish its token on `<namespace>#leases`, with the name of the error if a loader has failed:

    1 byte    length of the token, and the token
    rest      the name of the error, or nothing

A delete takes a lease away in silence, and a channel keeps nothing. So nobody waits for long: whoever is told that time is
up asks the server again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

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

from .redis_listener import Listening, RedisListener

IDLE = 60.0
"""Seconds after the last wait for which the channel is still listened to."""

LONGEST = 60.0
"""Seconds that one wait takes at most, whatever was asked for."""

Told = Callable[[Reply], None]


class _Waiting(NamedTuple):
    told: Told
    alarm: asyncio.TimerHandle


class LeaseWatch:
    """Who waits in this process for leases of one namespace, at most `limit` of them. For one asyncio event loop.

    Nothing is connected before somebody waits. Ends that were told lately are remembered, at most `memory` of them: who
    begins to wait may have been told of the lease before its end and ask after it.
    """

    def __init__(
        self, make_listener: Callable[[], RedisListener], namespace: str, *, limit: int = 10_000, memory: int = 4096
    ) -> None:
        self._make_listener = make_listener
        self._channel = f"{namespace}#leases"
        self._limit = limit
        self._memory = memory
        self._waiting: dict[str, list[_Waiting]] = {}
        self._count = 0
        self._ended: OrderedDict[str, Reply] = OrderedDict()
        self._listener: RedisListener | None = None
        self._place: Listening | None = None
        self._standing: asyncio.Task[None] | None = None
        self._trouble: CacheError | None = None
        self._idle: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<LeaseWatch {self._channel!r}, {self._count}/{self._limit} waiting>"

    def watch(self, request: WatchLease, told: Told) -> None:
        """Tell `told` what became of a lease: `NotHeld` when it has ended, what its loader has failed with, or `Loading` when
        time is up. A `Failed` says that there is no use in waiting here."""
        if not request.wait >= 0:
            told(Failed.of(BadMessage(f"wait must be a number of seconds from 0, not {request.wait!r}")))
            return
        if (ended := self._ended.get(request.token)) is not None:
            told(ended)
            return
        if self._place is None:
            self._listen()
        if self._trouble is not None:
            told(Failed.of(self._trouble))
        elif self._count >= self._limit:
            told(Failed.of(Overloaded(f"{self._limit} callers wait for leases", "", self._limit)))
        else:
            self._wait(request, told)

    async def close(self) -> None:
        """Tell everybody who waits that it is over, and leave the channel. Safe to call twice."""
        self._tell_all(Failed.of(CacheClosed("the store was closed")))
        if self._idle is not None:
            self._idle.cancel()
        self._rest()
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.close()

    # Who waits

    def _wait(self, request: WatchLease, told: Told) -> None:
        token = request.token

        def late() -> None:
            waiters = self._waiting[token]
            waiters.remove(waiting)
            if not waiters:
                del self._waiting[token]
            self._leaves(1)
            told(Loading(token))

        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        alarm = asyncio.get_running_loop().call_later(min(request.wait, LONGEST), late)
        waiting = _Waiting(told, alarm)
        self._waiting.setdefault(token, []).append(waiting)
        self._count += 1

    def _tell(self, token: str, reply: Reply) -> None:
        waiters = self._waiting.pop(token, ())
        for each in waiters:
            each.alarm.cancel()
            each.told(reply)
        if waiters:
            self._leaves(len(waiters))

    def _tell_all(self, reply: Reply) -> None:
        for token in tuple(self._waiting):
            self._tell(token, reply)

    def _leaves(self, count: int) -> None:
        self._count -= count
        self._rest_soon()

    def _rest_soon(self) -> None:
        if not self._count and self._idle is None:
            self._idle = asyncio.get_running_loop().call_later(IDLE, self._rest)

    # The channel

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = self._make_listener()
        self._trouble = None
        self._place = self._listener.subscribe(self._channel, self._heard, self._missed)
        self._standing = asyncio.create_task(self._stand(self._place))

    async def _stand(self, place: Listening) -> None:
        while True:
            try:
                await place.ready()
            except CacheError as error:
                self._trouble = error
                self._tell_all(Failed.of(error))
                self._rest_soon()  # Nobody waits while there is trouble.
                if not error.transient:
                    return  # Such as a channel that is forbidden: to try again does not help.
            else:
                self._trouble = None
                self._missed()
                return

    def _heard(self, payload: bytes) -> None:
        length = payload[0] if payload else 0
        token = payload[1 : 1 + length].decode(errors="replace")
        error = payload[1 + length :].decode(errors="replace")
        reply: Reply = Failed.of(LoaderFailed(error=error)) if error else NotHeld()
        self._ended[token] = reply
        if len(self._ended) > self._memory:
            self._ended.popitem(last=False)
        self._tell(token, reply)

    def _missed(self) -> None:
        # Something may have ended unheard: who waits looks for itself.
        self._tell_all(NotHeld())

    def _rest(self) -> None:
        """Listen no longer, until somebody waits again."""
        self._idle = None
        place, self._place = self._place, None
        standing, self._standing = self._standing, None
        if standing is not None:
            standing.cancel()
        if place is not None:
            place.close()
        self._ended.clear()  # What ends from now on is not heard.
