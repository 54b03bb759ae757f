"""Options and statistics of a guard."""

from __future__ import annotations

import msgspec

from cachebus.messages import CacheConfigurationError, CacheError

from .circuit_breaker import BreakerPolicy


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Retry options of a guard.

    `attempts` is the maximum number of attempts, including the first. The pause before the n-th retry is a random part
    of `backoff` * 2^(n-1) seconds, capped at `backoff_max` ("full jitter": Brooker, AWS Architecture Blog, 2015).
    `budget` is the number of retries that each batch adds to the retry budget, from 0 to 1.
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


class GuardPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a guard. Times are in seconds.

    `timeout_min` and `timeout_max` bound the adaptive timeout, and `timeout_initial` is its first value.
    `timeout_window` is the number of recent durations from which it is computed. At most `max_concurrent` batches are
    in flight, and at most `max_waiting` callers wait for one of them to end. The circuit breaker ignores errors of the
    classes in `excluded`.
    """

    breaker: BreakerPolicy = msgspec.field(default_factory=BreakerPolicy)
    retry: RetryPolicy = msgspec.field(default_factory=RetryPolicy)
    timeout_min: float = 0.1
    timeout_max: float = 10.0
    timeout_initial: float = 1.0
    timeout_window: int = 1000
    max_concurrent: int = 100
    max_waiting: int = 1000
    excluded: tuple[type[CacheError], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.timeout_min <= self.timeout_max < float("inf"):
            bounds = f"{self.timeout_min!r} and {self.timeout_max!r}"
            raise CacheConfigurationError(f"expected 0 < timeout_min <= timeout_max, in seconds, not {bounds}")
        if not 0 < self.timeout_initial < float("inf"):
            raise CacheConfigurationError(
                f"timeout_initial: expected a number of seconds greater than 0, not {self.timeout_initial!r}"
            )
        for option, least in (("timeout_window", 1), ("max_concurrent", 1), ("max_waiting", 0)):
            if getattr(self, option) < least:
                raise CacheConfigurationError(f"{option}: expected at least {least}, not {getattr(self, option)!r}")


class GuardStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of a guard. Counts are of batches; durations are in seconds.

    `last_failure_time` and `next_attempt` are Unix time. `lock_timeout` and `lock_p95` apply to lock operations,
    `current_timeout` and `p95` to all others. `rejected` counts batches that were not sent because the circuit was open
    or the queue was full.
    """

    state: str
    failure_count: int
    success_count: int
    last_failure_time: float | None
    next_attempt: float | None
    current_timeout: float
    p95: float
    lock_timeout: float
    lock_p95: float
    in_flight: int
    waiting: int
    rejected: int
    retries: int
