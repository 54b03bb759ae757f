"""Which requests of a batch may be repeated, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from cachebus.messages import CacheConfigurationError, Failed, Reply, Request, error_class


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often, and after what pauses. `attempts` counts the first one.

    Before the n-th repetition there is a pause of a random part ("full jitter": Brooker, AWS Architecture Blog, 2015) of
    `backoff` * 2^(n-1) seconds, at most `backoff_max`. Each batch that was carried out, well or not, allows for `budget`
    repetitions on the whole.
    """

    attempts: int = 3
    backoff: float = 0.05
    backoff_max: float = 1.0
    budget: float = 0.2

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise CacheConfigurationError(f"attempts: expected at least 1, not {self.attempts!r}")
        if not 0 <= self.budget <= 1:
            raise CacheConfigurationError(f"budget: expected a number from 0 to 1, not {self.budget!r}")
        if not 0 <= self.backoff <= self.backoff_max < float("inf"):
            bounds = f"{self.backoff!r} and {self.backoff_max!r}"
            raise CacheConfigurationError(f"expected 0 <= backoff <= backoff_max, in seconds, not {bounds}")


class RetryBudget:
    """How many repetitions a backend can be asked to bear, so that they never double the load of one in trouble.

    Each batch earns `share` of a repetition, up to `MOST`, and `RESERVE` are there from the start, so that a quiet cache
    may repeat as well (after Finagle's RetryBudget, Twitter, 2016).
    """

    RESERVE = 10.0
    MOST = 100.0

    def __init__(self, share: float) -> None:
        self._share = share
        self._left = self.RESERVE
        self._seen = 0

    def __repr__(self) -> str:
        return f"<RetryBudget {self._left:.3g}/{self.MOST:g}>"

    def allows(self, batches: int) -> bool:
        """Whether one more may be had, now that there have been so many batches in all."""
        # Earned only here, so that a batch that goes well costs nothing.
        self._left = min(self.MOST, self._left + self._share * (batches - self._seen))
        self._seen = batches
        return self._left >= 1

    def take(self) -> None:
        """Have one."""
        self._left -= 1


def repeatable(batch: Sequence[Request[Any]], replies: Sequence[Reply]) -> list[int]:
    """The places of requests that another attempt may mend and that may be done twice."""
    return [
        place
        for place, reply in enumerate(replies)
        if type(reply) is Failed and batch[place].IDEMPOTENT and error_class(reply.code).transient
    ]
