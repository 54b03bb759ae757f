"""Attempts of a guard at batches: how many at a time, how long to wait for each, and how often to repeat it."""

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

PUNCTUAL = 0.03  # Seconds by which a timer may fire late without saying anything about the event loop.
# The duration of these grows with the number of keys stored. They have the longest timeout, and say nothing of others.
SLOW_REQUESTS = frozenset[type[Request[Any]]]({Clear, DeletePattern})
# These have an adaptive timeout of their own.
LOCK_REQUESTS = frozenset(kind for name, kind in WIRE_NAMES.items() if name.startswith("lock."))
SLOWEST_KEY = 100e-6  # Seconds that a backend may take for each key of a request about many.
# Of the timeout, each time that it strikes. From 0.1 s on, a backend that suddenly takes 0.3 s is heard before five failures
# open its circuit. One that does not answer has opened it after 1.3 s; doubling would take 3.1 s.
GROWTH = 1.5
FACTOR = 3.0

RESERVE = 10.0  # Repetitions that a budget begins with.
MOST = 100.0  # Repetitions that a budget can grow to.
_NEVER = float("inf")


class AdaptiveTimeout:
    """A timeout that follows the 95th percentile of the last `timeout_window` durations. All times are seconds.

    It is `FACTOR` times the percentile, within the bounds of the policy, and `timeout_initial` at first. A timeout that
    strikes makes it half as long again until an answer comes that did not need the addition (after Karn and
    Partridge, SIGCOMM 1987). Without that, the answers of a backend that has become slow would never be seen.
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
        """The duration that 95 of 100 calls do not exceed; 0 before the first."""
        ordered = self._sorted
        return ordered[-(-len(ordered) * 19 // 20) - 1] if ordered else 0.0

    def answered(self, duration: float) -> None:
        """Note how long an answer took."""
        if self._penalty > 1.0 and duration <= self._base:
            self._penalty = 1.0
        # Kept in order: two binary searches and two short moves of memory, 1 us for a window of 1000.
        recent, ordered = self._recent, self._sorted
        if len(recent) == recent.maxlen:
            del ordered[bisect_left(ordered, recent[0])]
        recent.append(duration)
        insort(ordered, duration)
        p95 = ordered[-(-len(ordered) * 19 // 20) - 1]
        self._base = min(self._highest, max(self._lowest, FACTOR * p95))
        self.current = min(self._highest, self._base * self._penalty)

    def struck(self, started: float, now: float) -> bool:
        """Note that a call that began at `started` has no answer `now`, and return whether that is news. Calls that
        were under way together when the first of them was given up count once. The wait does not enter the window:
        there an outage would become the usual duration."""
        if started < self._struck_at:
            return False
        self._struck_at = now
        if self._base * self._penalty < self._highest:
            self._penalty *= GROWTH
            self.current = min(self._highest, self._base * self._penalty)
        return True


class ConcurrencyLimiter:
    """At most `limit` batches under way, of which `taken` are, and a bounded queue of callers before it. Belongs to one loop."""

    def __init__(self, limit: int, queue: int, address: str) -> None:
        self.taken = 0
        self.limit = limit
        self._most = queue
        self._address = address
        self.queue: deque[ReplyPort] = deque()
        self._granted: set[ReplyPort] = set()

    def __repr__(self) -> str:
        return f"<ConcurrencyLimiter {self.taken}/{self.limit} taken, {len(self.queue)}/{self._most} waiting>"

    async def acquire(self) -> None:
        """Take a place, waiting for it. Raises `Overloaded` if too many wait already, and the error of `refuse_all`."""
        if self.taken < self.limit:
            self.taken += 1
            return
        if len(self.queue) >= self._most:
            detail = f"{self.taken} batches ask {self._address} and {len(self.queue)} wait"
            raise Overloaded(detail, self._address, self._most)
        port = open_port()
        self.queue.append(port)
        try:
            refusal: CacheError | None = await port.wait()
        except BaseException:
            if port in self._granted:
                self._granted.remove(port)
                self.release()  # The place was ours already, and we do not take it.
            elif port in self.queue:
                self.queue.remove(port)
            raise
        if refusal is not None:
            raise refusal
        self._granted.discard(port)

    def release(self) -> None:
        """Give the place to the caller that has waited longest."""
        if self.queue:
            port = self.queue.popleft()
            self._granted.add(port)
            port.answer(None)
        else:
            self.taken -= 1

    def refuse_all(self, refusal: Callable[[], CacheError]) -> int:
        """Refuse every caller in the queue, each with an error of its own. Returns their number."""
        refused = len(self.queue)
        while self.queue:
            self.queue.popleft().answer(refusal())
        return refused


class Attempt(Struct, eq=False):
    """A batch that was handed to the store.

    `then` takes its replies, and `callers` knows until when they are worth waiting for. `scope` breaks off the sending,
    while that is awaited. `extended`: the attempt had more time than the adaptive timeout, so its end says nothing about the
    backend's health. `short` is false for slow requests; where it matters, those have batches of their own.
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
    """The attempts under way. A guard enters them in `outstanding`, and arms the timer for one that is due before
    `armed_for`. `overdue` is called with each whose time is up; it must call `take`.

    All share one timer, which is armed again only for an attempt that is due earlier, so a batch costs one comparison.
    `longest` bounds the extension of an attempt, in seconds. `short` counts the attempts without slow requests.
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
        """Take an attempt out. `False` if that was done before."""
        if self.outstanding.pop(attempt, attempt) is not None:
            return False
        self.short -= attempt.short
        return True

    def arm(self, due: float) -> None:
        """Look at the attempts again when it is `due`."""
        if self._timer is not None:
            self._timer.cancel()
        self.armed_for = due
        self._timer = self._timers.call_at(due, self._check)

    def _check(self) -> None:
        now = self._now()
        # If the timer is late, this loop stood still. Answers that arrived meanwhile are no failures: they are read first.
        if (stall := now - self.armed_for) > PUNCTUAL:
            for attempt in self.outstanding:
                attempt.due += stall + PUNCTUAL
        self._timer = None
        self.armed_for = _NEVER
        for attempt in [each for each in self.outstanding if each.due <= now]:
            # Only now, because nearly every batch is answered long before.
            self._extend(attempt, now)
            if attempt.due <= now:
                self._overdue(attempt, now)
        next_due = min((each.due for each in self.outstanding), default=_NEVER)
        if next_due < self.armed_for:
            self.arm(next_due)

    def _extend(self, attempt: Attempt, now: float) -> None:
        """Give an attempt more time for its size, and while bytes still move; but none after its callers have gone."""
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
    """Seconds that a batch may take longer than others, for its bytes and keys; `longest` for slow requests."""
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
    """The repetitions of one guard, of which there were `count`. `batches` returns the number of batches so far. Each
    batch earns `policy.budget` of a repetition, up to `MOST`. The initial `RESERVE` lets a quiet cache repeat as
    well. So a backend in trouble never has twice its load (after Finagle's RetryBudget, Twitter, 2016)."""

    def __init__(self, policy: RetryPolicy, ctx: Context, chance: random.Random, batches: Callable[[], int]) -> None:
        import_module("tenacity")  # Late, for processes without a remote store; but not in `run`, where it would block.
        self.count = 0
        self._policy = policy
        self._clock = ctx.clock
        self._chance = chance
        self._batches = batches
        self._left = RESERVE
        self._seen = 0

    def __repr__(self) -> str:
        return f"<Retries {self._left:.3g}/{MOST:g} left, {self.count} made>"

    def worthwhile(self, batch: Batch, replies: Replies) -> bool:
        """Whether to repeat some requests of a batch."""
        return self._policy.attempts > 1 and bool(_repeatable(batch, replies)) and self._allowed()

    async def run(
        self, again: Callable[[Batch], Awaitable[Replies]], batch: Batch, replies: Replies, deadline: float | None
    ) -> Replies:
        """Repeat what may be repeated, and return the replies. `again` makes an attempt with a part of the batch. No
        pause ends after `deadline`, on the monotonic clock. If an attempt raises, the replies before it count."""
        from tenacity import AsyncRetrying, retry_if_result

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


def _repeatable(batch: Batch, replies: Replies) -> list[int]:
    """The places of failed requests that may be done twice, and that another attempt may help."""
    return [
        place
        for place, reply in enumerate(replies)
        if type(reply) is Failed and batch[place].IDEMPOTENT and error_class(reply.code).transient
    ]
