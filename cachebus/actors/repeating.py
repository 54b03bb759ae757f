"""Once more: the requests of a batch that may be repeated, after pauses, and until when.

The guard imports this when it is made: a process without a remote store has no use for tenacity.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_result

from cachebus.bus import Clock
from cachebus.messages import CacheError, Reply, Request

from .retrying import RetryPolicy, repeatable


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
