"""Once more: which requests of a batch may be repeated, when, and until when."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_result

from cachebus.bus import Clock
from cachebus.messages import CacheConfigurationError, CacheError, Failed, Reply, Request, error_class


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
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


async def repeat(
    attempt: Callable[[Sequence[Request[Any]]], Awaitable[Sequence[Reply]]],
    batch: Sequence[Request[Any]],
    replies: Sequence[Reply],
    *,
    policy: RetryPolicy,
    clock: Clock,
    chance: random.Random,
    deadline: float | None,
) -> Sequence[Reply]:
    """The replies to a batch after those of them that `repeatable` names were tried again.

    No pause ends after `deadline`, on the clock's monotonic time. Where an attempt raises, the reply before it counts.
    """
    result = list(replies)

    async def once_more() -> bool:
        places = repeatable(batch, result)
        try:
            again = await attempt([batch[place] for place in places])
        except CacheError:
            return False  # The circuit has opened, or there is no room: what is known already is the better answer.
        for place, reply in zip(places, again, strict=True):
            result[place] = reply
        return bool(repeatable(batch, result))

    def wait(state: RetryCallState) -> float:
        return pause(policy, state.attempt_number + 1, chance)

    def stop(state: RetryCallState) -> bool:
        return state.attempt_number >= policy.attempts - 1 or over(state.upcoming_sleep)

    def over(seconds: float) -> bool:
        return deadline is not None and clock.monotonic() + seconds >= deadline

    async def sleep(seconds: float) -> None:
        await clock.sleep_until(clock.monotonic() + seconds)

    first = pause(policy, 1, chance)
    if over(first):
        return result
    await sleep(first)
    await AsyncRetrying(
        sleep=sleep, wait=wait, stop=stop, retry=retry_if_result(bool), retry_error_callback=lambda state: None
    )(once_more)
    return result


def pause(policy: RetryPolicy, repetition: int, chance: random.Random) -> float:
    """Seconds to wait before the n-th repetition."""
    return chance.uniform(0.0, min(policy.backoff_max, policy.backoff * 2.0 ** (repetition - 1)))
