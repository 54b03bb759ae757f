"""The rate limits of the facades."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .checks import Duration
from .link import Link
from .rate_limits import AsyncRateLimiter, OnLimitError, RateLimiter, admit_request
from .runners import AsyncRunner, ThreadRunner


class CacheLimits:
    """What `Cache` does about rate limits."""

    _link: Link

    def rate_limit(
        self,
        name: str,
        limit: int,
        per: Duration,
        *,
        burst: int | None = None,
        cost: int = 1,
        wait: Duration = 0.0,
        on_error: OnLimitError = "raise",
    ) -> AsyncRateLimiter:
        """A limit of `limit` units in `per` seconds, shared by all who use the same backend and namespace.

        ::

            if not await cache.rate_limit(f"login:{address}", 5, 60):
                return "try again later"

            async with cache.rate_limit("mails", 10, 1, wait=5):
                await send()

        Awaited, it takes `cost` units if they are there, and says what became of that in a `RateLimit`, which is true if
        it is allowed. As a block it is entered if it is allowed, and else raises `RateLimited`. What is refused takes
        nothing.

        * `burst`: so many may be taken at once after a quiet time; by default `limit`. In any t seconds it is at most
          `burst + t * limit / per`.
        * `wait`: where the units are there within so many seconds, take them now and wait for them, in the order of asking.
        * `on_error`: where the backend fails, `"raise"` its error, or `"allow"`: then `RateLimit.unchecked` is true. Both
          count as an error of the cache, and are told as `RequestFailed`.

        The limit has one state for each `name`, whatever the other arguments; it has nothing to do with the value under
        the key `name`, and neither `clear` nor a pattern touches it. Durations are seconds, or a `timedelta`. Raises
        `CacheKeyError`, `TypeError` or `ValueError` at once for what makes no sense, and `CapabilityError` when it is used
        with a store that cannot do it.
        """
        request = admit_request(name, limit, per, burst, cost, wait, on_error)
        return AsyncRateLimiter(lambda: AsyncRunner(self._link), request, on_error)


class SyncCacheLimits:
    """What `SyncCache` does about rate limits."""

    if TYPE_CHECKING:

        @property
        def link(self) -> Link: ...

    def rate_limit(
        self,
        name: str,
        limit: int,
        per: Duration,
        *,
        burst: int | None = None,
        cost: int = 1,
        wait: Duration = 0.0,
        on_error: OnLimitError = "raise",
    ) -> RateLimiter:
        """As `Cache.rate_limit`: `cache.rate_limit(...).check()` is a `RateLimit`, and `with` enters a block."""
        request = admit_request(name, limit, per, burst, cost, wait, on_error)
        return RateLimiter(lambda: ThreadRunner(self.link), request, on_error)
