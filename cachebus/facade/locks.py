"""Distributed locks: `Lock` for asynchronous code, `SyncLock` for code without an event loop."""

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
"""Longest time, in seconds, that a single request to the lock manager waits for the lock."""

CONFIRMED = 4
"""If the request took at least `ttl / CONFIRMED` seconds, `acquire` renews the lock before it returns."""


class Lock:
    """A named lock with at most one holder at a time across all processes.

    Returned by `Cache.lock`. Use it with `async with`, or with `acquire` and `release`, any number of times.

    The lock is a lease: it expires `ttl` seconds after it was acquired or last renewed, even if its holder hangs. It is
    renewed in the background three times per `ttl`. `lost` is true if the lock may have expired. A paused holder may
    notice that too late, so the protected resource should reject a `token` smaller than one it has seen. See
    `docs/locks.md`.
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
        self._auto_renew = renew
        self._ticket = ""
        self._is_waiting = False
        self._token = 0
        self._expires_at = -math.inf
        self._lost = False

    def __repr__(self) -> str:
        state = "not held" if not self._ticket else "lost" if self.lost else f"held, token {self._token}"
        return f"<{type(self).__name__} {self.name!r} {state}>"

    @property
    def token(self) -> int:
        """Fencing token, larger than that of every earlier holder. It remains available after a release.

        Raises `LockNotHeld` if this object never held the lock.
        """
        if not self._token:
            raise LockNotHeld(name=self.name)
        return self._token

    @property
    def lost(self) -> bool:
        """True if the lock was acquired and not released, but may have expired since."""
        return bool(self._ticket) and (self._lost or self._client.now() >= self._expires_at)

    @property
    def held(self) -> bool:
        """True if the lock is held, to the knowledge of this process."""
        return bool(self._ticket) and not self.lost

    @property
    def remaining(self) -> float:
        """Seconds for which the lock is certainly held without a renewal; 0 if it is not held."""
        return max(0.0, self._expires_at - self._client.now()) if self.held else 0.0

    def check(self) -> None:
        """Raise `LockNotHeld` unless the lock is held, to the knowledge of this process. Sends no request.

        Example:
            ```python
            async with cache.lock("report") as lock:
                lock.check()  # before a step that cannot be undone
            ```
        """
        if not self.held:
            raise LockNotHeld(name=self.name)

    async def acquire(self) -> Self:
        """Acquire the lock, waiting for up to `wait` seconds; 0 makes one attempt. First come, first served.

        Raises:
            LockNotAcquired: If the lock could not be acquired in time.
            CacheError: If the lock manager or its store fails, or this object already holds the lock or waits for it.

        Example:
            ```python
            lock = cache.lock("report", wait=0)
            await lock.acquire()
            try:
                print(lock.token)
            finally:
                await lock.release()
            ```
        """
        if self._is_waiting or self.held:
            raise CacheError(
                f"this object already holds the lock {self.name!r} or is waiting for it; create another one"
            )
        self._reset()
        self._is_waiting = True
        ticket, denied = f"{origin()}-{next(_numbers)}", False
        try:
            reply, sent = await self._attempt(ticket)
            if denied := not isinstance(reply, LockGranted):
                owner, remaining = reply.owner, reply.remaining
                raise LockNotAcquired(timeout=self.wait, name=self.name, owner=owner, remaining=remaining)
            self._ticket, self._token, self._expires_at = ticket, reply.token, sent + self.ttl
            if self._client.now() - sent >= self.ttl / CONFIRMED:
                with suppress(LockNotHeld):
                    await self._renew(self._ask)
                if not self.held:
                    raise LockNotAcquired(timeout=self.wait, name=self.name)  # It expired before the reply arrived.
        except BaseException:
            self._reset()
            if not denied:
                # The lock may have been granted nevertheless, and nothing else would release it.
                self._client.send(ReleaseLock(self.name, ticket, abandon=True))
            raise
        finally:
            self._is_waiting = False
        self._start_renewals()
        return self

    async def _attempt(self, ticket: str) -> tuple[LockGranted | LockDenied, float]:
        """Return the final reply of the lock manager, and the time at which its request was sent."""
        ends = self._client.now() + self.wait
        while True:
            sent = self._client.now()
            left = max(0.0, ends - sent)
            reply = await self._ask(AcquireLock(self.name, self.owner, ticket, self.ttl, left), min(left, SLICE))
            if not isinstance(reply, LockQueued):
                return reply, sent

    async def release(self) -> None:
        """Release the lock.

        Raises:
            LockNotHeld: If the lock is no longer held; any work done after it expired was not protected.
            LockNotOwned: As `LockNotHeld`, of which it is a subclass; it names the current holder.

        Example:
            ```python
            lock = await cache.lock("report").acquire()
            await lock.release()
            ```
        """
        ticket, lost = self._ticket, self._lost
        if not ticket:
            raise LockNotHeld(name=self.name)
        self._reset()
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
        """Extend the lock to `ttl` seconds from now; by default, the current `ttl`. Later renewals use the new `ttl`.

        Raises:
            LockNotHeld: If the lock was lost.

        Example:
            ```python
            async with cache.lock("report", ttl=30) as lock:
                await lock.extend(ttl=300)
                assert lock.remaining > 290
            ```
        """
        if not self._ticket or self._lost:
            raise LockNotHeld(name=self.name)
        if ttl is not None:
            self.ttl = check_seconds("ttl", ttl)
        self._start_renewals()  # Before the request: renewals must use the new `ttl` even if the request fails.
        if not await self._renew(self._ask):
            raise LockNotHeld(name=self.name)

    def _start_renewals(self) -> None:
        if self._auto_renew:
            # On the node's event loop, even if a thread holds the lock.
            self._client.track(self._ticket, self.ttl, lambda: self._renew(self._client.ask))

    async def _renew(self, ask: Any) -> bool:
        ticket, ttl, sent = self._ticket, self.ttl, self._client.now()
        if self._lost or not ticket:
            return False
        try:
            reply = await ask(RenewLock(self.name, ticket, ttl))
        except LockNotHeld:
            self._mark_lost(ticket)
            raise
        if isinstance(reply, NotHeld):
            self._mark_lost(ticket)
            return False
        if self._ticket == ticket:
            self._expires_at = sent + ttl  # Not `self.ttl`: a concurrent `extend` may have changed it.
        return True

    async def is_locked(self) -> bool:
        """Return True if any process holds the lock of this name.

        Example:
            ```python
            assert await cache.lock("report").is_locked() is False
            ```
        """
        return await self.info() is not None

    async def info(self) -> LockInfo | None:
        """Return the holder of this lock, its token and its remaining seconds, or `None` if the lock is free.

        Example:
            ```python
            async with cache.lock("report", owner="nightly job") as lock:
                info = await lock.info()
                assert info.owner == "nightly job"
            ```
        """
        reply = await self._ask(DescribeLock(self.name))
        return reply if isinstance(reply, LockInfo) else None

    async def __aenter__(self) -> Self:
        return await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Release the lock. If the block raised, a failed release is added to that exception as a note."""
        if not self._ticket:
            return  # The block already released it.
        if error is None:
            await self.release()
            return
        if not isinstance(error, Exception):
            # Cancelled or interrupted: awaiting is not allowed here.
            ticket = self._ticket
            self._reset()
            self._client.send(ReleaseLock(self.name, ticket, self.owner, self._token))
            return
        try:
            await self.release()
        except CacheError as failure:
            error.add_note(f"the lock {self.name!r} could not be released: {failure}")

    def _mark_lost(self, ticket: str) -> None:
        self._client.untrack(ticket)
        if self._ticket == ticket:
            self._lost = True

    def _reset(self) -> None:
        self._client.untrack(self._ticket)
        self._ticket, self._lost, self._expires_at = "", False, -math.inf


def _forwarded(name: str) -> Any:
    """Return a property that reads the attribute of the inner `Lock`."""
    return property(attrgetter(f"_inner.{name}"))


class SyncLock:
    """A `Lock` for code without an event loop, returned by `SyncCache.lock`.

    Use it with `with`, or call its methods without `await`. The lock is renewed in the background even while its thread
    is busy. The attributes are those of `Lock`.
    """

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
        """See `Lock.check`."""
        self._inner.check()

    def acquire(self) -> Self:
        """See `Lock.acquire`."""
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
    """Return `owner` if it is a non-empty `str` of valid Unicode; otherwise raise `TypeError` or `ValueError`."""
    if not isinstance(owner, str):
        raise TypeError(f"the owner of a lock must be a str, not {type(owner).__name__}")
    try:
        return check_key(owner)
    except CacheKeyError as error:
        raise ValueError(f"the owner of a lock must be a non-empty str of valid Unicode: {error}") from None


_host = cache(socket.gethostname)
_numbers = itertools.count()  # One number per attempt to acquire a lock.
