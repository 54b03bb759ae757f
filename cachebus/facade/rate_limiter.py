"""Rate limits as callers use them: a check that returns its answer, and a block that is entered or not."""

from __future__ import annotations

from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Literal, TypeAlias

import msgspec

from cachebus.client.background_loop import blocking
from cachebus.client.failure_policy import BACKEND_FAILURES
from cachebus.client.validation import Duration, check_key, check_seconds
from cachebus.loading.runners import Runner
from cachebus.messages import Admit, RateLimitDenied, RateLimited

OnLimitError: TypeAlias = Literal["raise", "allow"]


class RateLimit(msgspec.Struct, frozen=True):
    """The answer of a rate limit: true if `allowed`. Times are seconds from the moment of the answer.

    `remaining` units are left to be taken at once, and all are back after `reset_after`. `retry_after` is when the same would
    be allowed if no other caller takes units, 0.0 if it is allowed. `unchecked` says that the backend did not answer, and
    `on_error="allow"` did.
    """

    allowed: bool
    remaining: int
    retry_after: float = 0.0
    reset_after: float = 0.0
    unchecked: bool = False

    def __bool__(self) -> bool:
        return self.allowed


def admit_request(
    name: str, limit: int, per: Duration, burst: int | None, cost: int, wait: Duration, on_error: str
) -> Admit:
    """Return the request for a facade's `rate_limit`. Raises `CacheKeyError`, `TypeError` or `ValueError`."""
    check_key(name)
    if on_error not in ("raise", "allow"):
        raise ValueError(f"on_error must be 'raise' or 'allow', not {on_error!r}")
    limit = _units("limit", limit)
    burst = limit if burst is None else _units("burst", burst)
    cost = _units("cost", cost)
    if cost > burst:
        raise ValueError(f"cost must not be above burst, else it is never allowed: {cost} > {burst}")
    seconds = check_seconds("per", per, most=Admit.LONGEST)
    patience = check_seconds("wait", wait, zero=True, most=Admit.LONGEST)
    if burst * seconds / limit > Admit.LONGEST:
        raise ValueError(
            f"a burst of {burst} at {limit} in {seconds:g} s takes longer than {Admit.LONGEST:g} s to be there again"
        )
    return Admit(name, limit, seconds, burst, cost, patience)


def _units(name: str, units: Any) -> int:
    if type(units) not in (int, float):
        raise TypeError(f"{name} must be a whole number, not {units!r}")
    if not (1 <= units <= Admit.MOST and units == int(units)):
        raise ValueError(f"{name} must be a whole number from 1 to {Admit.MOST:,}, not {units!r}")
    return int(units)


class AsyncRateLimiter:
    """A rate limit of a `Cache`, to be used any number of times. Made by `Cache.rate_limit`.

    `await limiter` takes units from it and returns a `RateLimit`. `async with limiter` is entered if it is allowed, and
    raises `RateLimited` if it is not.
    """

    def __init__(self, runner: Callable[[], Runner], request: Admit, on_error: OnLimitError) -> None:
        self._runner = runner
        self._request = request
        self._on_error: OnLimitError = on_error

    def __repr__(self) -> str:
        asked = self._request
        return f"<{type(self).__name__} {asked.key!r} {asked.limit} in {asked.per:g} s, burst {asked.burst}>"

    async def check(self) -> RateLimit:
        """Take units, and wait for those that were taken in advance. The same as `await limiter`."""
        runner, request = self._runner(), self._request
        try:
            reply = await runner.request_unguarded(request)
        except BACKEND_FAILURES as error:
            runner.client.failures.resolve(request, error, allow=self._on_error == "allow")
            return RateLimit(True, 0, unchecked=True)
        if isinstance(reply, RateLimitDenied):
            return RateLimit(False, reply.remaining, reply.retry_after, reply.reset_after)
        if reply.delay:
            await runner.pause(reply.delay)
        return RateLimit(True, reply.remaining, 0.0, max(0.0, reply.reset_after - reply.delay))

    def __await__(self) -> Generator[Any, Any, RateLimit]:
        return self.check().__await__()

    async def __aenter__(self) -> RateLimit:
        limit = await self.check()
        if not limit.allowed:
            raise RateLimited(key=self._request.key, retry_after=limit.retry_after)
        return limit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Do nothing: the units come back with time."""


class RateLimiter:
    """As `AsyncRateLimiter`, of a `SyncCache`: `limiter.check()`, and `with limiter`."""

    def __init__(self, inner: AsyncRateLimiter) -> None:
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner).replace("Async", "", 1)

    check = blocking(AsyncRateLimiter.check)
    __enter__ = blocking(AsyncRateLimiter.__aenter__)
    __exit__ = blocking(AsyncRateLimiter.__aexit__)
