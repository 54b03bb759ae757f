"""Locks as callers hold them: `Lock` is awaited, `SyncLock` is for code without an event loop."""

from __future__ import annotations

import itertools
import math
import os
import socket
from contextlib import suppress
from functools import cache, partial
from operator import attrgetter
from types import TracebackType
from typing import Any, Self, TypeVar

from cachebus.bus import origin
from cachebus.client.background_loop import blocking, run
from cachebus.client.lock_client import LockClient
from cachebus.client.validation import Duration, check_key, check_seconds
from cachebus.messages import (
    AcquireLock,
    CacheError,
    CacheKeyError,
    DescribeLock,
    LockDenied,
    LockGranted,
    LockInfo,
    LockNotAcquired,
    LockNotHeld,
    LockQueued,
    NotHeld,
    ReleaseLock,
    RenewLock,
)

R = TypeVar("R")

SLICE = 10.0
"""The longest that one request to the manager waits for the lock, in seconds."""

CONFIRMED = 4
"""A lock whose request took longer than this part of its `ttl` is renewed before it is relied on."""


class Lock:
    """A lock of one name, held by one holder of all processes at a time. Made by `Cache.lock`; used with `async with`, or with
    `acquire` and `release`, any number of times.

    It is a lease: it ends `ttl` seconds after it was acquired or renewed, even if its holder hangs. It is renewed in the
    background three times in that time. `lost` says that it has ended; a paused holder may notice that too late, so what the
    lock protects should refuse a `token` that is smaller than one it has seen. See `docs/locks.md`.
    """

    def __init__(
        self,
        client: LockClient,
        name: str,
        *,
        ttl: Duration = 30.0,
        wait: Duration | None = None,
        renew: bool = True,
        owner: str | None = None,
        blocking: bool = False,
    ) -> None:
        self.name = check_key(name)
        self.ttl = check_seconds("ttl", ttl)
        self.wait = client.timeout if wait is None else check_seconds("wait", wait, zero=True)
        self.owner = f"process {os.getpid()} on {_host()}" if owner is None else check_owner(owner)
        self._client = client
        self._ask: Any = partial(client.ask, blocking=True) if blocking else client.ask
        self._renews = renew
        self._ticket = ""
        self._waits = False
        self._token = 0
        self._expires_at = -math.inf
        self._lost = False

    def __repr__(self) -> str:
        state = "not held" if not self._ticket else "lost" if self.lost else f"held, token {self._token}"
        return f"<{type(self).__name__} {self.name!r} {state}>"

    @property
    def token(self) -> int:
        """The fencing token: larger than that of every holder before. It stays after a release.

        Raises `LockNotHeld` if this object never held the lock.
        """
        if not self._token:
            raise LockNotHeld(name=self.name)
        return self._token

    @property
    def lost(self) -> bool:
        """True if the lock was acquired and not released, and may have ended since."""
        return bool(self._ticket) and (self._lost or self._client.now() >= self._expires_at)

    @property
    def held(self) -> bool:
        """True if the lock is held, as far as is known here."""
        return bool(self._ticket) and not self.lost

    @property
    def remaining(self) -> float:
        """Seconds for which the lock is surely held without being renewed; 0 if it is not held."""
        return max(0.0, self._expires_at - self._client.now()) if self.held else 0.0

    def check(self) -> None:
        """Raise `LockNotHeld` unless the lock is held, as far as is known here. Sends no request."""
        if not self.held:
            raise LockNotHeld(name=self.name)

    async def acquire(self) -> Self:
        """Acquire the lock, waiting for up to `wait` seconds; 0 is one attempt. First come, first served.

        Raises `LockNotAcquired` if it could not be acquired in time, and another `CacheError` if the manager or its store fails:
        a lock is never taken for granted. One object holds one lock: a second `acquire` is an error.
        """
        if self._waits or self.held:
            raise CacheError(f"this object holds the lock {self.name!r} already, or waits for it: make another one")
        self._end()
        self._waits = True
        ticket, refused = f"{origin()}-{next(_numbers)}", False
        try:
            reply, sent = await self._attempt(ticket)
            if refused := not isinstance(reply, LockGranted):
                owner, remaining = reply.owner, reply.remaining
                raise LockNotAcquired(timeout=self.wait, name=self.name, owner=owner, remaining=remaining)
            self._ticket, self._token, self._expires_at = ticket, reply.token, sent + self.ttl
            if self._client.now() - sent >= self.ttl / CONFIRMED:
                with suppress(LockNotHeld):
                    await self._renew(self._ask)
                if not self.held:
                    raise LockNotAcquired(timeout=self.wait, name=self.name)  # It was lost before we knew of it.
        except BaseException:
            self._end()
            if not refused:
                # It may have been granted all the same, and would not be released.
                self._client.send(ReleaseLock(self.name, ticket, abandon=True))
            raise
        finally:
            self._waits = False
        self._keep()
        return self

    async def _attempt(self, ticket: str) -> tuple[LockGranted | LockDenied, float]:
        """Return the last reply, and the time of its request."""
        ends = self._client.now() + self.wait
        while True:
            sent = self._client.now()
            left = max(0.0, ends - sent)
            reply = await self._ask(AcquireLock(self.name, self.owner, ticket, self.ttl, left), min(left, SLICE))
            if not isinstance(reply, LockQueued):
                return reply, sent

    async def release(self) -> None:
        """Release the lock. Raises `LockNotHeld` if it is not held any more: work since its time ran out was not protected.

        `LockNotOwned` is a `LockNotHeld` that names the present holder.
        """
        ticket, lost = self._ticket, self._lost
        if not ticket:
            raise LockNotHeld(name=self.name)
        self._end()
        request = ReleaseLock(self.name, ticket, self.owner, self._token)
        try:
            reply = await self._ask(request)
        except Exception:
            raise
        except BaseException:
            self._client.send(request)
            raise
        if lost or isinstance(reply, NotHeld):
            raise LockNotHeld(name=self.name)

    async def extend(self, ttl: Duration | None = None) -> None:
        """Hold the lock for `ttl` seconds from now, by default as long as before; each renewal prolongs it by as much.

        Raises `LockNotHeld` if it was lost.
        """
        if not self._ticket or self._lost:
            raise LockNotHeld(name=self.name)
        if ttl is not None:
            self.ttl = check_seconds("ttl", ttl)
        self._keep()  # Before the request, because renewals must follow the new time even if it fails.
        if not await self._renew(self._ask):
            raise LockNotHeld(name=self.name)

    def _keep(self) -> None:
        if self._renews:
            # By the node's event loop, also if the lock is held by a thread.
            self._client.track(self._ticket, self.ttl, lambda: self._renew(self._client.ask))

    async def _renew(self, ask: Any) -> bool:
        ticket, ttl, sent = self._ticket, self.ttl, self._client.now()
        if self._lost or not ticket:
            return False
        try:
            reply = await ask(RenewLock(self.name, ticket, ttl))
        except LockNotHeld:
            self._lose(ticket)
            raise
        if isinstance(reply, NotHeld):
            self._lose(ticket)
            return False
        if self._ticket == ticket:
            self._expires_at = sent + ttl  # Not that of an `extend` that was called meanwhile.
        return True

    async def is_locked(self) -> bool:
        """Return whether the lock of this name is held, here or elsewhere."""
        return await self.info() is not None

    async def info(self) -> LockInfo | None:
        """Return the holder of the lock of this name, its token, and the seconds that it has left; `None` if it is free."""
        reply = await self._ask(DescribeLock(self.name))
        return reply if isinstance(reply, LockInfo) else None

    async def __aenter__(self) -> Self:
        return await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Release the lock. A failure to do so does not hide the error that has ended the block."""
        if not self._ticket:
            return  # The body has released it.
        if error is None:
            await self.release()
            return
        if not isinstance(error, Exception):
            # Cancelled or interrupted: nothing may be awaited.
            ticket = self._ticket
            self._end()
            self._client.send(ReleaseLock(self.name, ticket, self.owner, self._token))
            return
        try:
            await self.release()
        except CacheError as trouble:
            error.add_note(f"and the lock {self.name!r} could not be given back: {trouble}")

    def _lose(self, ticket: str) -> None:
        self._client.untrack(ticket)
        if self._ticket == ticket:
            self._lost = True

    def _end(self) -> None:
        self._client.untrack(self._ticket)
        self._ticket, self._lost, self._expires_at = "", False, -math.inf


def _forwarded(name: str) -> Any:
    """Return a property of `SyncLock` that is that of its `Lock`."""
    return property(attrgetter(f"_inner.{name}"))


class SyncLock:
    """A `Lock` for code without an event loop: used with `with`, and everything else without `await`. Made by
    `SyncCache.lock`. It is renewed in the background, whatever its thread does. Its attributes are those of `Lock`."""

    def __init__(self, lock: Lock) -> None:
        self._inner = lock

    def __repr__(self) -> str:
        return repr(self._inner).replace("<Lock", "<SyncLock", 1)

    name: str = _forwarded("name")
    owner: str = _forwarded("owner")
    ttl: float = _forwarded("ttl")
    token: int = _forwarded("token")
    lost: bool = _forwarded("lost")
    held: bool = _forwarded("held")
    remaining: float = _forwarded("remaining")

    def check(self) -> None:
        """As `Lock.check`."""
        self._inner.check()

    def acquire(self) -> Self:
        """As `Lock.acquire`."""
        run(self._inner.acquire())
        return self

    release = blocking(Lock.release)
    extend = blocking(Lock.extend)
    is_locked = blocking(Lock.is_locked)
    info = blocking(Lock.info)

    def __enter__(self) -> Self:
        return self.acquire()

    __exit__ = blocking(Lock.__aexit__)


def check_owner(owner: object) -> str:
    """Return `owner` if it can be sent to others, else raise `TypeError` or `ValueError`."""
    if not isinstance(owner, str):
        raise TypeError(f"the owner of a lock must be a str, not {type(owner).__name__}")
    try:
        return check_key(owner)
    except CacheKeyError as error:
        raise ValueError(f"the owner of a lock must be a str that is not empty, and valid Unicode: {error}") from None


_host = cache(socket.gethostname)
_numbers = itertools.count()  # One for each attempt to acquire a lock.
