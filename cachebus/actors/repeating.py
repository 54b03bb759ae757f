"""Repetitions of the requests of a batch: after pauses, within a budget, and until a deadline.

A guard imports this when it is made: a process without a remote store does not need tenacity.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_result

from cachebus.messages import CacheError, Failed, Reply, Request, error_class

from .actor import Context
from .guard_policy import RetryPolicy

RESERVE = 10.0
MOST = 100.0
"""Repetitions that a budget begins with, and that it can grow to."""


class Retries:
    """The repetitions of one guard, of which there were `count`. `batches` returns the number of batches so far.

    Each batch earns `policy.budget` of a repetition, up to `MOST`. The initial `RESERVE` lets a quiet cache repeat as well.
    So a backend in trouble never has twice its load (after Finagle's RetryBudget, Twitter, 2016).
    """

    def __init__(self, policy: RetryPolicy, ctx: Context, chance: random.Random, batches: Callable[[], int]) -> None:
        self.count = 0
        self._policy = policy
        self._clock = ctx.clock
        self._chance = chance
        self._batches = batches
        self._left = RESERVE
        self._seen = 0

    def __repr__(self) -> str:
        return f"<Retries {self._left:.3g}/{MOST:g} left, {self.count} made>"

    def worthwhile(self, batch: Sequence[Request[Any]], replies: Sequence[Reply]) -> bool:
        """Whether to repeat some requests of a batch."""
        return self._policy.attempts > 1 and bool(_repeatable(batch, replies)) and self._allowed()

    async def run(
        self,
        again: Callable[[Sequence[Request[Any]]], Awaitable[Sequence[Reply]]],
        batch: Sequence[Request[Any]],
        replies: Sequence[Reply],
        deadline: float | None,
    ) -> Sequence[Reply]:
        """Repeat what may be repeated, and return the replies. `again` makes an attempt with a part of the batch.

        No pause ends after `deadline`, on the monotonic clock. If an attempt raises, the replies before it count.
        """
        result, clock, policy = list(replies), self._clock, self._policy

        async def once_more() -> bool:
            places = _repeatable(batch, result)
            if not self._allowed():
                return False
            self._left -= 1
            self.count += 1
            try:
                answers = await again([batch[place] for place in places])
            except CacheError:
                return False  # The circuit has opened, or there is no room: the replies so far say more.
            for place, reply in zip(places, answers, strict=True):
                result[place] = reply
            return bool(_repeatable(batch, result))

        def stop(state: RetryCallState) -> bool:
            return state.attempt_number >= policy.attempts - 1 or over(state.upcoming_sleep)

        def over(seconds: float) -> bool:
            return deadline is not None and clock.monotonic() + seconds >= deadline

        async def sleep(seconds: float) -> None:
            await clock.sleep_until(clock.monotonic() + seconds)

        first = self._pause(1)
        if over(first):
            return result
        await sleep(first)
        await AsyncRetrying(
            sleep=sleep,
            wait=lambda state: self._pause(state.attempt_number + 1),
            stop=stop,
            retry=retry_if_result(bool),
            retry_error_callback=lambda state: None,
        )(once_more)
        return result

    def _allowed(self) -> bool:
        # Earned only here, so that a batch without failures costs nothing.
        batches = self._batches()
        self._left = min(MOST, self._left + self._policy.budget * (batches - self._seen))
        self._seen = batches
        return self._left >= 1

    def _pause(self, repetition: int) -> float:
        """Seconds to wait before the n-th repetition."""
        policy = self._policy
        return self._chance.uniform(0.0, min(policy.backoff_max, policy.backoff * 2.0 ** (repetition - 1)))


def _repeatable(batch: Sequence[Request[Any]], replies: Sequence[Reply]) -> list[int]:
    """The places of failed requests that may be done twice, and that another attempt may help."""
    return [
        place
        for place, reply in enumerate(replies)
        if type(reply) is Failed and batch[place].IDEMPOTENT and error_class(reply.code).transient
    ]
