"""Rate limiters: a check that returns a `RateLimit`, and a context manager that raises `RateLimited`."""

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
    """Result of a rate limit check, true if the call is `allowed`. Times are seconds from the moment of the reply.

    `remaining` units are available immediately, and all of them after `reset_after`. `retry_after` is when the same
    call would be allowed if no other caller takes units; 0.0 if it is allowed. `unchecked` is true if the backend
    failed and `on_error="allow"` allowed the call.
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
    """Return the request for `rate_limit`.

    Raises `CacheKeyError`, `TypeError` or `ValueError` for invalid arguments.
    """
    check_key(name)
    if on_error not in ("raise", "allow"):
        raise ValueError(f"on_error must be 'raise' or 'allow', not {on_error!r}")
    limit = _units("limit", limit)
    burst = limit if burst is None else _units("burst", burst)
    cost = _units("cost", cost)
    if cost > burst:
        raise ValueError(f"cost must not exceed burst, or no call is ever allowed: {cost} > {burst}")
    seconds = check_seconds("per", per, most=Admit.LONGEST)
    patience = check_seconds("wait", wait, zero=True, most=Admit.LONGEST)
    if burst * seconds / limit > Admit.LONGEST:
        raise ValueError(
            f"a burst of {burst} at {limit} per {seconds:g} s takes longer than {Admit.LONGEST:g} s to recover"
        )
    return Admit(name, limit, seconds, burst, cost, patience)


def _units(name: str, units: Any) -> int:
    if type(units) not in (int, float):
        raise TypeError(f"{name} must be a whole number, not {units!r}")
    if not (1 <= units <= Admit.MOST and units == int(units)):
        raise ValueError(f"{name} must be a whole number from 1 to {Admit.MOST:,}, not {units!r}")
    return int(units)


class AsyncRateLimiter:
    """A rate limiter, returned by `Cache.rate_limit`. Use it any number of times.

    `await limiter` takes units and returns a `RateLimit`. `async with limiter` enters its block if the call is allowed,
    and otherwise raises `RateLimited`.
    """

    def __init__(self, runner: Callable[[], Runner], request: Admit, on_error: OnLimitError) -> None:
        self._runner = runner
        self._request = request
        self._on_error: OnLimitError = on_error

    def __repr__(self) -> str:
        request = self._request
        return f"<{type(self).__name__} {request.key!r} {request.limit} per {request.per:g} s, burst {request.burst}>"

    async def check(self) -> RateLimit:
        """Take units and return a `RateLimit`, after waiting for units taken in advance. Same as `await limiter`.

        Raises:
            CapabilityError: If the store does not support rate limits.
            CacheError: If the backend fails, unless the limiter was made with `on_error="allow"`.

        Example:
            ```python
            limit = await cache.rate_limit("login:192.0.2.7", 5, 60).check()
            assert limit.allowed and limit.remaining == 4
            ```
        """
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
        """Do nothing: units become available again with time."""


class RateLimiter:
    """An `AsyncRateLimiter` for code without an event loop: call `limiter.check()`, or use `with limiter`."""

    def __init__(self, inner: AsyncRateLimiter) -> None:
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner).replace("Async", "", 1)

    check = blocking(AsyncRateLimiter.check)
    __enter__ = blocking(AsyncRateLimiter.__aenter__)
    __exit__ = blocking(AsyncRateLimiter.__aexit__)
