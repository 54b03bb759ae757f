"""Rate limits: whether one more may go on now, later, or not."""

from __future__ import annotations

from typing import ClassVar

from .base import Reply, Request


class Admitted(Reply, frozen=True, gc=False, tag="reply.admitted"):
    """Whoever asked may go on after `delay` seconds, 0.0 for at once. `remaining` is how many more could go on at once
    now; nothing is used any more `reset_after` seconds from now."""

    remaining: int
    reset_after: float = 0.0
    delay: float = 0.0


class RateLimitDenied(Reply, frozen=True, gc=False, tag="reply.rate_limit_denied"):
    """Whoever asked may not go on, and nothing was used. If nobody else takes anything, the same will be admitted
    `retry_after` seconds from now. The rest is as in `Admitted`."""

    remaining: int
    retry_after: float
    reset_after: float = 0.0


class Admit(Request[Admitted | RateLimitDenied], frozen=True, gc=False, tag="rate.admit"):
    """Take `cost` units of a rate limit of `limit` units in `per` seconds, of which `burst` may be taken at once.

    `key` names the limit; it has nothing to do with the value under the same key. Where the units will only be there
    later, they are taken in advance if that is within `wait` seconds.
    """

    key: str
    limit: int
    per: float
    burst: int
    cost: int = 1
    wait: float = 0.0

    MOST: ClassVar[int] = 10**9
    """Units that `limit`, `burst` and `cost` may be."""

    LONGEST: ClassVar[float] = 1e9
    """Seconds that `per`, `wait` and filling up again may take: beyond that numbers of 64 bits get short."""
