"""How often, and after what pauses, requests are repeated."""

from __future__ import annotations

import msgspec

from cachebus.messages import CacheConfigurationError


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
