"""Attempts of a guard: the concurrency limit, the adaptive timeout and the retries of batches."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from cachebus.bus import ReplyPort, SlotBatch, open_port
from cachebus.messages import (
    WIRE_NAMES,
    CacheError,
    Clear,
    DeletePattern,
    Failed,
    Overloaded,
    Reply,
    Request,
    SetMany,
    error_class,
)

from ..ports import NO_PROGRESS, SLOWEST_LINE, Progress, Timer
from ..runtime.actor import Context
from .policy import GuardPolicy, RetryPolicy

if TYPE_CHECKING:
    from tenacity import RetryCallState

Batch = Sequence[Request[Any]]
Replies = Sequence[Reply]

STALL_TOLERANCE = 0.03  # Seconds by which a timer may be late before the event loop counts as stalled.
# Their duration grows with the number of stored keys. They get the longest timeout and do not affect the adaptive one.
SLOW_REQUESTS = frozenset[type[Request[Any]]]({Clear, DeletePattern})
# Lock requests have a separate adaptive timeout.
LOCK_REQUESTS = frozenset(kind for name, kind in WIRE_NAMES.items() if name.startswith("lock."))
SLOWEST_KEY = 100e-6  # Seconds that a backend may take for each key of a request with many keys.
# Growth of the timeout each time that it expires. Starting from 0.1 s, a backend that suddenly takes 0.3 s gets a reply
# in before five failures open its circuit. A backend without replies opens it after 1.3 s (3.1 s with doubling).
GROWTH = 1.5
FACTOR = 3.0  # Ratio of the adaptive timeout to the 95th percentile.

INITIAL_BUDGET = 10.0  # Initial retry budget.
MAX_BUDGET = 100.0  # Maximum retry budget.
_NEVER = float("inf")


class AdaptiveTimeout:
    """Timeout that follows the 95th percentile of the last `timeout_window` durations. All times are in seconds.

    It starts at `timeout_initial` and is then `FACTOR` times the percentile, within the bounds of the policy. Each time
    it expires, it grows by half, until a reply arrives that did not need the longer timeout (after Karn and Partridge,
    SIGCOMM 1987). Otherwise the replies of a backend that has become slow would never be measured.
    """

    def __init__(self, policy: GuardPolicy) -> None:
        self.current = self._base = policy.timeout_initial
        self._lowest, self._highest = policy.timeout_min, policy.timeout_max
        self._penalty = 1.0
        self._struck_at = float("-inf")
        self._recent: deque[float] = deque(maxlen=policy.timeout_window)
        self._sorted: list[float] = []

    def __repr__(self) -> str:
        return f"<AdaptiveTimeout {self.current:.3g} s, p95 {self.p95:.3g} s of {len(self._recent)}>"

    @property
    def p95(self) -> float:
        """95th percentile of the recent durations; 0 before the first."""
        ordered = self._sorted
        return ordered[-(-len(ordered) * 19 // 20) - 1] if ordered else 0.0

    def answered(self, duration: float) -> None:
        """Record the duration of a successful attempt."""
        if self._penalty > 1.0 and duration <= self._base:
            self._penalty = 1.0
        # A sorted list costs two binary searches and two short memory moves: 1 us for a window of 1000.
        recent, ordered = self._recent, self._sorted
        if len(recent) == recent.maxlen:
            del ordered[bisect_left(ordered, recent[0])]
        recent.append(duration)
        insort(ordered, duration)
        p95 = ordered[-(-len(ordered) * 19 // 20) - 1]
        self._base = min(self._highest, max(self._lowest, FACTOR * p95))
        self.current = min(self._highest, self._base * self._penalty)

    def struck(self, started: float, now: float) -> bool:
        """Record that an attempt begun at `started` has timed out `now`. Return `False` if this timeout does not count.

        Attempts that were in flight when an earlier one timed out do not count again. The wait does not enter the
        window, because an outage would then become the usual duration.
        """
        if started < self._struck_at:
            return False
        self._struck_at = now
        if self._base * self._penalty < self._highest:
            self._penalty *= GROWTH
            self.current = min(self._highest, self._base * self._penalty)
        return True


class ConcurrencyLimiter:
    """Limit on concurrent batches, with a bounded queue of waiting callers. Belongs to one event loop.

    `taken` of `limit` permits are in use. At most `queue` callers wait for a permit.
    """

    def __init__(self, limit: int, queue: int, address: str) -> None:
        self.taken = 0
        self.limit = limit
        self._max_queue = queue
        self._address = address
        self.queue: deque[ReplyPort] = deque()
        self._granted: set[ReplyPort] = set()

    def __repr__(self) -> str:
        return f"<ConcurrencyLimiter {self.taken}/{self.limit} taken, {len(self.queue)}/{self._max_queue} waiting>"

    async def acquire(self) -> None:
        """Wait for a permit. Raises `Overloaded` if the queue is full, or the error passed to `refuse_all`."""
        if self.taken < self.limit:
            self.taken += 1
            return
        if len(self.queue) >= self._max_queue:
            detail = f"{self._address} has {self.taken} batches in flight and {len(self.queue)} waiting"
            raise Overloaded(detail, self._address, self._max_queue)
        port = open_port()
        self.queue.append(port)
        try:
            refusal: CacheError | None = await port.wait()
        except BaseException:
            if port in self._granted:
                self._granted.remove(port)
                self.release()  # The permit was granted just before the cancellation.
            elif port in self.queue:
                self.queue.remove(port)
            raise
        if refusal is not None:
            raise refusal
        self._granted.discard(port)

    def release(self) -> None:
        """Release a permit. The caller that has waited longest gets it."""
        if self.queue:
            port = self.queue.popleft()
            self._granted.add(port)
            port.answer(None)
        else:
            self.taken -= 1

    def refuse_all(self, refusal: Callable[[], CacheError]) -> int:
        """Refuse every caller in the queue, each with a new error. Return the number of callers."""
        refused = len(self.queue)
        while self.queue:
            self.queue.popleft().answer(refusal())
        return refused


class Attempt(Struct, eq=False):
    """Batch that was handed to the store.

    `then` is called with its replies. `callers` holds the deadlines of its callers. `scope` cancels the sending while
    that is awaited. `extended` means that the attempt had more time than the adaptive timeout, so a timeout does not
    count against the backend. `short` is false for slow requests, which always have separate batches.
    """

    requests: Batch
    store: Any
    then: Callable[[Replies], None]
    callers: SlotBatch | None
    ticket: int
    timeout: AdaptiveTimeout
    started: float
    due: float
    short: bool
    extended: bool = False
    progress: Progress = NO_PROGRESS
    scope: Any = None
    may_repeat: bool = True


class Attempts:
    """Attempts in flight, and the timer of their timeouts.

    A guard adds each attempt to `outstanding` and calls `arm` if the attempt is due before `armed_for`. `overdue` is
    called with each attempt that has timed out; it must call `take`. `longest` bounds the extension of a timeout, in
    seconds. `short` is the number of attempts without slow requests.

    All attempts share one timer. It is armed again only for an attempt that is due earlier, so a batch costs one
    comparison.
    """

    def __init__(self, ctx: Context, longest: float, overdue: Callable[[Attempt, float], None]) -> None:
        self._timers = ctx.timers
        self._now = ctx.clock.monotonic
        self._longest = longest
        self._overdue = overdue
        self.short = 0
        self.outstanding: dict[Attempt, None] = {}
        self.armed_for = _NEVER
        self._timer: Timer | None = None

    def take(self, attempt: Attempt) -> bool:
        """Remove an attempt. Return `False` if it was removed before."""
        if self.outstanding.pop(attempt, attempt) is not None:
            return False
        self.short -= attempt.short
        return True

    def arm(self, due: float) -> None:
        """Arm the timer for the instant `due` of the monotonic clock."""
        if self._timer is not None:
            self._timer.cancel()
        self.armed_for = due
        self._timer = self._timers.call_at(due, self._check)

    def _check(self) -> None:
        now = self._now()
        # A late timer means that the event loop was stalled. Replies that arrived meanwhile must be read first.
        if (stall := now - self.armed_for) > STALL_TOLERANCE:
            for attempt in self.outstanding:
                attempt.due += stall + STALL_TOLERANCE
        self._timer = None
        self.armed_for = _NEVER
        for attempt in [each for each in self.outstanding if each.due <= now]:
            # Computed only here, because nearly every batch is answered long before.
            self._extend(attempt, now)
            if attempt.due <= now:
                self._overdue(attempt, now)
        next_due = min((each.due for each in self.outstanding), default=_NEVER)
        if next_due < self.armed_for:
            self.arm(next_due)

    def _extend(self, attempt: Attempt, now: float) -> None:
        """Extend the timeout of a large attempt, or while bytes still move, up to the last deadline of the callers."""
        due = attempt.due
        if not attempt.extended:
            due += timeout_extension(attempt.requests, self._longest)
        if (moved := attempt.progress.last_progress) > attempt.started:
            due = max(due, moved + attempt.timeout.current)
        if due <= attempt.due:
            return
        left = None if attempt.callers is None else attempt.callers.seconds_left(now, longest=True)
        if left is not None:
            due = max(attempt.due, min(due, now + left))
        attempt.extended = attempt.extended or due > attempt.due
        attempt.due = due


def timeout_extension(requests: Batch, longest: float) -> float:
    """Return the extra seconds that a batch may take for its bytes and keys; `longest` for slow requests."""
    if not SLOW_REQUESTS.isdisjoint(map(type, requests)):
        return longest
    keys = size = 0
    for request in requests:
        if isinstance(request, SetMany):
            keys += len(request.items)
            values: Iterable[Any] = request.items.values()
        else:
            keys += len(getattr(request, "keys", ()))
            values = (getattr(request, "value", None),)
        size += sum(len(value) for value in values if isinstance(value, bytes | str))
    return size / SLOWEST_LINE + keys * SLOWEST_KEY


class Retries:
    """Retries of one guard, limited by a budget (after Finagle's RetryBudget, Twitter, 2016).

    Each batch adds `policy.budget` retries to the budget, up to `MAX_BUDGET`, so retries never double the load of a
    backend in trouble. The initial `INITIAL_BUDGET` lets a cache with few requests retry too. `batches` returns the
    number of batches so far. `count` is the number of retries made.
    """

    def __init__(self, policy: RetryPolicy, ctx: Context, chance: random.Random, batches: Callable[[], int]) -> None:
        # Not imported at module level, for processes without a remote store, nor in `run`, which must not block.
        import_module("tenacity")
        self.count = 0
        self._policy = policy
        self._clock = ctx.clock
        self._chance = chance
        self._batches = batches
        self._budget = INITIAL_BUDGET
        self._seen = 0

    def __repr__(self) -> str:
        return f"<Retries {self._budget:.3g}/{MAX_BUDGET:g} left, {self.count} made>"

    def worthwhile(self, batch: Batch, replies: Replies) -> bool:
        """Return `True` if some requests of a batch should be retried."""
        return self._policy.attempts > 1 and bool(_repeatable(batch, replies)) and self._allowed()

    async def run(
        self, again: Callable[[Batch], Awaitable[Replies]], batch: Batch, replies: Replies, deadline: float | None
    ) -> Replies:
        """Retry the failed requests that may be retried, and return the replies of the whole batch.

        `again` makes an attempt with a part of the batch. No pause ends after `deadline`, on the monotonic clock. If a
        retry raises, the replies of the previous attempts are returned.
        """
        from tenacity import AsyncRetrying, retry_if_result

        result, clock, policy = list(replies), self._clock, self._policy

        async def once_more() -> bool:
            places = _repeatable(batch, result)
            if not self._allowed():
                return False
            self._budget -= 1
            self.count += 1
            try:
                answers = await again([batch[place] for place in places])
            except CacheError:
                return False  # The circuit opened, or the queue is full. The replies so far are more specific.
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
        # The budget is updated only here, so that a batch without failures costs nothing.
        batches = self._batches()
        self._budget = min(MAX_BUDGET, self._budget + self._policy.budget * (batches - self._seen))
        self._seen = batches
        return self._budget >= 1

    def _pause(self, retry: int) -> float:
        """Return the seconds to wait before the n-th retry."""
        policy = self._policy
        return self._chance.uniform(0.0, min(policy.backoff_max, policy.backoff * 2.0 ** (retry - 1)))


def _repeatable(batch: Batch, replies: Replies) -> list[int]:
    """Return the indexes of the failed requests that are idempotent and failed with a transient error."""
    return [
        place
        for place, reply in enumerate(replies)
        if type(reply) is Failed and batch[place].IDEMPOTENT and error_class(reply.code).transient
    ]
