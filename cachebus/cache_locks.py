"""The locking half of the facades."""

from __future__ import annotations

from .checks import Duration
from .link import Link
from .locks import Lock, SyncLock


class CacheLocks:
    """What `Cache` does about locks."""

    _link: Link

    def lock(
        self,
        name: str,
        *,
        ttl: Duration = 30.0,
        wait: Duration | None = None,
        renew: bool = True,
        owner: str | None = None,
    ) -> Lock:
        """A lock of that name, to be had with `async with` or `acquire`: by one holder at a time of all that share the store
        where locks are kept. `docs/locks.md` says what it promises, and what the `token` is for.

        It ends `ttl` seconds after it was had unless it is renewed, which with `renew` happens by itself. `wait` is how long
        to wait for it: left out, as long as a call may take (`timeout`); 0 is one attempt. `owner` is what others are told.
        Durations are seconds or a `timedelta`. Whatever `on_error` says, a lock is had or an error is raised.

        Raises `CacheKeyError`, `TypeError` or `ValueError` for what these cannot be.
        """
        return Lock(self._link.locks, name, ttl=ttl, wait=wait, renew=renew, owner=owner)


class SyncCacheLocks:
    """What `SyncCache` does about locks."""

    @property
    def link(self) -> Link:
        """The way to the backend."""
        raise NotImplementedError

    def lock(
        self,
        name: str,
        *,
        ttl: Duration = 30.0,
        wait: Duration | None = None,
        renew: bool = True,
        owner: str | None = None,
    ) -> SyncLock:
        """As `Cache.lock`, to be had with `with` or `acquire`."""
        way = self.link.locks
        return SyncLock(Lock(way, name, ttl=ttl, wait=wait, renew=renew, owner=owner, blocking=True))
