"""Rate limits as callers use them: a check that says how things stand, and a block that is entered or not."""

from __future__ import annotations

from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Literal, TypeAlias

import msgspec

from cachebus.messages import Admit, RateLimitDenied, RateLimited

from .checks import Duration, check_key, check_seconds
from .failures import BACKEND_FAILURES
from .link import run
from .ways import Awaiting, Blocking

OnLimitError: TypeAlias = Literal["raise", "allow"]


class RateLimit(msgspec.Struct, frozen=True):
    """What a rate limit said: true if `allowed`. Times are seconds from the moment of the answer.

    `remaining` is how many more could go on at once, and nothing is used any more after `reset_after`. `retry_after` is
    when the same would be allowed if nobody else takes anything, 0.0 if it is. `unchecked` says that the backend did not
    answer, and `on_error="allow"` did.
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
    """The request of a facade's `rate_limit`, checked. Raises `CacheKeyError`, `TypeError` or `ValueError`."""
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


async def _check(way: Awaiting | Blocking, request: Admit, on_error: OnLimitError) -> RateLimit:
    """Ask, and wait for what was taken in advance."""
    link = way.link
    probe = link.probe if isinstance(way, Awaiting) else link.probe_blocking
    try:
        reply = await probe(request, link.timeout)
    except BACKEND_FAILURES as error:
        link.failures.settle(request, error, allow=on_error == "allow")
        return RateLimit(True, 0, unchecked=True)
    if isinstance(reply, RateLimitDenied):
        return RateLimit(False, reply.remaining, reply.retry_after, reply.reset_after)
    if reply.delay:
        await way.pause(reply.delay)
    return RateLimit(True, reply.remaining, 0.0, max(0.0, reply.reset_after - reply.delay))


def _entered(request: Admit, limit: RateLimit) -> RateLimit:
    if not limit.allowed:
        raise RateLimited(key=request.key, retry_after=limit.retry_after)
    return limit


class AsyncRateLimiter:
    """A rate limit of a `Cache`, to be used as often as you like. Made by `Cache.rate_limit`.

    `await limiter` takes from it and says what became of that; `async with limiter` is entered when it is allowed, and
    raises `RateLimited` when it is not.
    """

    def __init__(self, way: Callable[[], Awaiting], request: Admit, on_error: OnLimitError) -> None:
        self._way = way
        self._request = request
        self._on_error: OnLimitError = on_error

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {_described(self._request)}>"

    async def check(self) -> RateLimit:
        """The same as `await limiter`."""
        return await _check(self._way(), self._request, self._on_error)

    def __await__(self) -> Generator[Any, Any, RateLimit]:
        return self.check().__await__()

    async def __aenter__(self) -> RateLimit:
        return _entered(self._request, await self.check())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Nothing to give back: what was taken comes back with time."""


class RateLimiter:
    """As `AsyncRateLimiter`, of a `SyncCache`: `limiter.check()`, and `with limiter`."""

    def __init__(self, way: Callable[[], Blocking], request: Admit, on_error: OnLimitError) -> None:
        self._way = way
        self._request = request
        self._on_error: OnLimitError = on_error

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {_described(self._request)}>"

    def check(self) -> RateLimit:
        """Take from it, and say what became of that."""
        return run(_check(self._way(), self._request, self._on_error))

    def __enter__(self) -> RateLimit:
        return _entered(self._request, self.check())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Nothing to give back: what was taken comes back with time."""


def _described(request: Admit) -> str:
    return f"{request.key!r} {request.limit} in {request.per:g} s, burst {request.burst}"
