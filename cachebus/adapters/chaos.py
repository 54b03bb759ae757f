"""The chaos store, which adds reproducible delays and failures to another store."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cachebus.actors.ports import SYSTEM_CLOCK, BatchStore, Clock, Gauges, InlineStore
from cachebus.messages import (
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    CacheTimeoutError,
    CapabilityError,
    Failed,
    Reply,
    Request,
)


@dataclass(slots=True)
class ChaosCounts:
    """Counters of the requests to a chaos store and of the faults that it injected."""

    batches: int = 0
    operations: int = 0
    delays: int = 0
    failed_batches: int = 0
    failed_operations: int = 0
    lost_replies: int = 0


class ChaosStore:
    """A `BatchStore` that injects faults into another store, to test how an application handles outages.

    Each rate is a probability from 0 to 1, and you can change it at any time: `failure_rate = 1.0` is an outage.

    * `failure_rate`: probability that a batch fails. It is not carried out, and `error` is raised.
    * `operation_failure_rate`: probability that one operation fails. Only this one is not carried out, and its reply is
      `Failed` with `error`.
    * `lost_reply_rate`: probability that the reply to a batch is lost. The batch is carried out, and then
      `CacheTimeoutError` is raised, as if the connection had broken.
    * `delay`: shortest and longest pause before each batch, in seconds.

    `error` creates an error from a message, as the classes of the error tree do. The same `seed` has the same effect on
    the same sequence of batches, on every platform. Changing one rate does not affect the others. `counts` has the
    counters. Expiry and eviction inside an inline store are not reported.
    """

    def __init__(
        self,
        inner: InlineStore | BatchStore,
        *,
        seed: int,
        failure_rate: float = 0.0,
        operation_failure_rate: float = 0.0,
        lost_reply_rate: float = 0.0,
        error: Callable[[str], CacheError] = CacheConnectionError,
        delay: tuple[float, float] = (0.0, 0.0),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not 0 <= delay[0] <= delay[1] < float("inf"):
            raise CacheConfigurationError(f"delay: expected 0 <= shortest <= longest, in seconds, not {delay!r}")
        self.inner = inner
        self.name = f"chaos+{inner.name}"
        self.capabilities = inner.capabilities
        self.failure_rate = failure_rate
        self.operation_failure_rate = operation_failure_rate
        self.lost_reply_rate = lost_reply_rate
        self.error = error
        self.delay = delay
        for option in ("failure_rate", "operation_failure_rate", "lost_reply_rate"):
            if not 0 <= (rate := getattr(self, option)) <= 1:
                raise CacheConfigurationError(f"{option}: expected a probability from 0 to 1, not {rate!r}")
        self.counts = ChaosCounts()
        self._random = random.Random(seed)
        self._clock = clock

    def __repr__(self) -> str:
        return f"<ChaosStore around {self.inner!r}, {self.counts}>"

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    def gauges(self) -> Gauges:
        return self.inner.gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        # Draw the same number of random values in any case, and before the first await. Then neither concurrent batches
        # nor rates of 0 change the sequence.
        draw = self._random.random
        pause = self.delay[0] + (self.delay[1] - self.delay[0]) * draw()
        fails = draw() < self.failure_rate
        loses_reply = draw() < self.lost_reply_rate
        spoiled = [draw() < self.operation_failure_rate for _ in batch]
        self.counts.batches += 1
        self.counts.operations += len(batch)
        if pause > 0:
            self.counts.delays += 1
            await self._clock.sleep_until(self._clock.monotonic() + pause)
        if fails:
            self.counts.failed_batches += 1
            raise self.error("chaos: the batch failed and was not carried out")
        kept = [request for request, spoil in zip(batch, spoiled, strict=True) if not spoil]
        if isinstance(self.inner, InlineStore):
            done = iter([_run(self.inner, request) for request in kept])
        else:
            done = iter(await self.inner.execute(kept) if kept else ())
        self.counts.failed_operations += sum(spoiled)
        if loses_reply:
            self.counts.lost_replies += 1
            raise CacheTimeoutError("no reply, although the batch was carried out,", self.name, pause)
        failed = "chaos: the operation failed and was not carried out"
        return [Failed.of(self.error(failed)) if spoil else next(done) for spoil in spoiled]


def _run(store: InlineStore, request: Request[Any]) -> Reply:
    verb = store.verb(type(request))
    try:
        if verb is None:
            raise CapabilityError(store=store.name, capability=type(request).__name__)
        return verb(request)
    except CacheError as error:
        return Failed.of(error)
