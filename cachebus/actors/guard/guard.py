"""Guard between a backend actor and its store.

The guard retries idempotent requests, opens the circuit of a failing backend, times out batches that take far longer
than usual, and limits the number of batches in flight. No other part of cachebus does any of this.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio

from cachebus.bus import SlotBatch, open_port
from cachebus.messages import (
    BackendConnected,
    BackendDisconnected,
    CacheError,
    CacheTimeoutError,
    CircuitClosed,
    CircuitOpen,
    CircuitOpened,
    Failed,
)

from ..ports import NO_PROGRESS, BatchStore, OnReplies, PipelinedStore, Progress
from ..runtime.actor import Context
from .attempts import (
    LOCK_REQUESTS,
    SLOW_REQUESTS,
    AdaptiveTimeout,
    Attempt,
    Attempts,
    Batch,
    ConcurrencyLimiter,
    Replies,
    Retries,
    timeout_extension,
)
from .circuit_breaker import CircuitBreaker, CircuitState, Outcome, outcome_of
from .policy import GuardPolicy, GuardStatistics

_CLOSED = CircuitState.CLOSED


class AwaitedStore:
    """Adapter that gives `try_submit` and `submit` to a store that only has `execute`."""

    def __init__(self, store: BatchStore) -> None:
        self._store = store

    def try_submit(self, batch: Batch, on_replies: OnReplies) -> Progress | None:
        """Return `None`, because `execute` must be awaited."""
        return None

    async def submit(self, batch: Batch, on_replies: OnReplies) -> Progress:
        """Execute the batch, and wait for its replies."""
        on_replies(await self._store.execute(batch))
        return NO_PROGRESS


class LazyStore:
    """Store that is opened by its first batch.

    If opening fails, the batch gets the error, so the guard counts it like any other failure. `opened` is called once
    the store is open; from then on the caller may use the store directly.
    """

    def __init__(self, store: BatchStore, opened: Callable[[], None]) -> None:
        self._store = store
        self._opened: Callable[[], None] | None = opened  # `None` once it is open.
        self._opening = anyio.Lock()

    def __repr__(self) -> str:
        return f"<LazyStore {'not open yet' if self._opened else 'open'}, {self._store!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def execute(self, batch: Batch) -> Replies:
        await self._open()
        return await self._store.execute(batch)

    def try_submit(self, batch: Batch, on_replies: OnReplies) -> Progress | None:
        """Return `None`, because opening must be awaited."""
        return None

    async def submit(self, batch: Batch, on_replies: OnReplies) -> Progress:
        await self._open()
        return await as_pipelined(self._store).submit(batch, on_replies)

    async def _open(self) -> None:
        async with self._opening:
            if self._opened is not None:
                await self._store.open()
                opened, self._opened = self._opened, None
                opened()


def as_pipelined(store: BatchStore) -> PipelinedStore | AwaitedStore:
    """Return the store itself if it can have several batches in flight, else an adapter for it."""
    return store if isinstance(store, PipelinedStore) else AwaitedStore(store)


_Store = PipelinedStore | AwaitedStore | LazyStore


class Guard:
    """Guard of one batch store. Belongs to the event loop of its actor.

    `execute` returns the replies. `try_submit` and `submit` pass them to a function, exactly once, after the last
    retry. A batch that the guard refuses raises `CircuitOpen` or `Overloaded`. An error of the store becomes a `Failed`
    for each request. `on_free` is called whenever an attempt ends. After `closed` is set, no requests are retried.
    """

    def __init__(self, policy: GuardPolicy, ctx: Context, store: str, *, seed: int | None = None) -> None:
        self.policy = policy
        self.breaker = CircuitBreaker(policy.breaker, ctx.clock, ctx.address, self._circuit_changed)
        self.on_free: Callable[[], None] = lambda: None
        self.closed = False
        self._ctx = ctx
        self._store = store
        self._now = ctx.clock.monotonic
        self._timeout, self._lock_timeout = AdaptiveTimeout(policy), AdaptiveTimeout(policy)
        self._retries = Retries(policy.retry, ctx, random.Random(seed), lambda: self._successes + self._failures)
        self.attempts = Attempts(ctx, policy.timeout_max, self._give_up)
        self._limiter = ConcurrencyLimiter(policy.max_concurrent, policy.max_waiting, ctx.address)
        self._connected: bool | None = None
        self._failures = 0
        self._successes = 0
        self._rejected = 0
        self._last_failure: float | None = None

    def __repr__(self) -> str:
        return f"<Guard of {self._ctx.address}, {self.breaker.state}, {self._limiter!r}>"

    def statistics(self) -> GuardStatistics:
        """Return the counters of the guard and its current state."""
        is_open = self.breaker.state is CircuitState.OPEN
        return GuardStatistics(
            state=self.breaker.state.value,
            failure_count=self._failures,
            success_count=self._successes,
            last_failure_time=self._last_failure,
            next_attempt=self._ctx.clock.wall() + self.breaker.retry_after if is_open else None,
            current_timeout=self._timeout.current,
            p95=self._timeout.p95,
            lock_timeout=self._lock_timeout.current,
            lock_p95=self._lock_timeout.p95,
            in_flight=self._limiter.taken,
            waiting=len(self._limiter.queue),
            rejected=self._rejected,
            retries=self._retries.count,
        )

    def connected(self) -> None:
        """Record that the store can be reached. Emits `BackendConnected` if that changed."""
        if not self._connected:
            self._connected = True
            self._ctx.emit(BackendConnected, store=self._store)

    def disconnected(self, reason: str) -> None:
        """Record that the store cannot be reached. Emits `BackendDisconnected` if that changed."""
        if self._connected is not False:
            self._connected = False
            self._ctx.emit(BackendDisconnected, store=self._store, reason=reason)

    def fail_all(self, failed: Failed) -> None:
        """Answer all requests in flight with `failed`, after the actor crashed or was stopped."""
        self.closed = True
        for attempt in tuple(self.attempts.outstanding):
            if self.attempts.take(attempt):
                self.breaker.abandoned(attempt.ticket)
                self._limiter.release()
                attempt.then([failed] * len(attempt.requests))

    def try_submit(self, store: _Store, requests: Batch, then: OnReplies, callers: SlotBatch | None = None) -> bool:
        """Send a batch without waiting. Return `False` if it would have to wait. Raises `CircuitOpen`."""
        limiter = self._limiter
        if limiter.taken >= limiter.limit:
            return False
        limiter.taken += 1
        attempt = self._begin(requests, store, then, callers)
        try:
            progress = store.try_submit(requests, partial(self._settle, attempt))
        except CacheError as error:
            self._settle(attempt, [Failed.of(error)] * len(requests))
            return True
        except BaseException:
            self._abandon(attempt)
            raise
        if progress is None:
            self._abandon(attempt)
            return False
        attempt.progress = progress
        return True

    async def submit(
        self, store: _Store, batch: Batch, then: OnReplies, callers: SlotBatch | None = None, *, may_repeat: bool = True
    ) -> None:
        """Send a batch, waiting for the limiter and the store. Raises `CircuitOpen` and `Overloaded`."""
        limiter = self._limiter
        try:
            # Waiting is useless if the circuit is open: the batch would be refused afterwards.
            if limiter.taken >= limiter.limit and (refusal := self.breaker.refusal()) is not None:
                raise refusal
            await limiter.acquire()
        except CacheError:
            self._rejected += 1
            raise
        attempt = self._begin(batch, store, then, callers)
        attempt.may_repeat = may_repeat
        scope = attempt.scope = anyio.CancelScope()
        try:
            with scope:
                attempt.progress = await store.submit(batch, partial(self._settle, attempt))
        except CacheError as error:
            if not scope.cancel_called:
                self._settle(attempt, [Failed.of(error)] * len(batch))
                return
        except BaseException:
            self._abandon(attempt)
            raise
        finally:
            attempt.scope = None
        if scope.cancel_called:
            # The attempt timed out while it was being sent. If it was sent after all, its replies are dropped.
            self._end(attempt, self._timeout_replies(attempt))

    async def execute(self, store: BatchStore, batch: Batch, deadline: float | None) -> Replies:
        """Execute a batch and return its replies, after retries. `deadline` is on the monotonic clock."""
        again = partial(self._ask, AwaitedStore(store), SlotBatch(None, deadline=deadline))
        replies = await again(batch)
        if self._worth_repeating(batch, replies):
            replies = await self._retries.run(again, batch, replies, deadline)
        return replies

    def _begin(self, requests: Batch, store: Any, then: OnReplies, callers: SlotBatch | None) -> Attempt:
        """Begin an attempt for which a permit was taken. Raises `CircuitOpen`."""
        try:
            breaker = self.breaker
            ticket = breaker.period if breaker.state is _CLOSED else breaker.admit()
            timeout = self._lock_timeout if type(requests[0]) in LOCK_REQUESTS else self._timeout
            started = self._now()
            due = started + timeout.current
            short = type(requests[0]) not in SLOW_REQUESTS
            attempt = Attempt(requests, store, then, callers, ticket, timeout, started, due, short)
            attempts = self.attempts
            attempts.outstanding[attempt] = None
        except BaseException as error:
            self._rejected += isinstance(error, CircuitOpen)
            self._limiter.release()
            raise
        attempts.short += short
        if due < attempts.armed_for:
            attempts.arm(due)
        return attempt

    def _settle(self, attempt: Attempt, replies: Replies) -> None:
        """Handle the replies of an attempt, unless it has ended before."""
        attempts = self.attempts
        if attempts.outstanding.pop(attempt, attempt) is not None:
            return
        attempts.short -= attempt.short
        has_failures = Failed in map(type, replies)
        interruption: BaseException | None = None
        try:
            if not (has_failures and self._judge(attempt, replies)):
                self._successes += 1
                breaker = self.breaker
                if breaker.state is not _CLOSED or breaker.failures:
                    breaker.succeeded(attempt.ticket)
                duration = self._now() - attempt.started
                if duration <= self.policy.timeout_min or not timeout_extension(
                    attempt.requests, self.policy.timeout_max
                ):
                    attempt.timeout.answered(duration)
                if not self._connected:
                    self.connected()
        except BaseException as error:
            interruption = error  # The batch must be answered and its permit released in any case.
        limiter = self._limiter
        if limiter.queue:
            limiter.release()
        else:
            limiter.taken -= 1
        if has_failures:
            self._end(attempt, replies)
        else:
            try:
                attempt.then(replies)
            finally:
                self.on_free()  # Last, so that callers that send another request at once join the waiting batch.
        if interruption is not None:
            raise interruption

    def _end(self, attempt: Attempt, replies: Replies) -> None:
        """Deliver replies that include failures, after retries."""
        try:
            if attempt.may_repeat and self._worth_repeating(attempt.requests, replies):
                self._ctx.start_soon(partial(self._go_on, attempt, replies))
            else:
                attempt.then(replies)
        finally:
            self.on_free()

    async def _go_on(self, attempt: Attempt, replies: Replies) -> None:
        again, now = partial(self._ask, attempt.store, attempt.callers), self._now()
        left = None if attempt.callers is None else attempt.callers.seconds_left(now)
        deadline = None if left is None else now + left
        try:
            replies = await self._retries.run(again, attempt.requests, replies, deadline)
        finally:
            attempt.then(replies)

    async def _ask(self, store: _Store, callers: SlotBatch | None, batch: Batch) -> Replies:
        port = open_port()
        await self.submit(store, batch, port.answer, callers, may_repeat=False)
        replies: Replies = await port.wait()
        return replies

    def _worth_repeating(self, batch: Batch, replies: Replies) -> bool:
        return not self.closed and self._retries.worthwhile(batch, replies)

    def _judge(self, attempt: Attempt, replies: Replies) -> bool:
        """Record the outcome of replies that include failures. Return `False` if it is a success for the breaker."""
        outcome, lost = outcome_of(replies, self.policy.excluded)
        if lost is not None:
            self.disconnected(lost)
        if outcome is Outcome.FAILURE:
            self._failed(attempt)
        elif outcome is Outcome.IGNORED:
            self.breaker.abandoned(attempt.ticket)
        return outcome is not Outcome.SUCCESS

    def _failed(self, attempt: Attempt) -> None:
        self._failures += 1
        self._last_failure = self._ctx.clock.wall()
        self.breaker.failed(attempt.ticket)

    def _abandon(self, attempt: Attempt) -> None:
        if self.attempts.take(attempt):
            self.breaker.abandoned(attempt.ticket)
            self._limiter.release()
            self.on_free()

    def _give_up(self, attempt: Attempt, now: float) -> None:
        self.attempts.take(attempt)
        # A timeout often affects many batches together. Counted one by one, they would open the circuit of a server
        # that is only slower than before, and the timeout could not adapt to it.
        counts = not attempt.extended and attempt.timeout.struck(attempt.started, now)
        if not counts or issubclass(CacheTimeoutError, self.policy.excluded):
            self.breaker.abandoned(attempt.ticket)
        else:
            self._failed(attempt)
        self._limiter.release()
        if attempt.scope is not None:
            attempt.scope.cancel()
            self.on_free()
        else:
            self._end(attempt, self._timeout_replies(attempt))

    def _timeout_replies(self, attempt: Attempt) -> Replies:
        detail, address, waited = f"{self._store} did not reply", self._ctx.address, self._now() - attempt.started
        errors = (CacheTimeoutError(detail, address, waited, in_doubt=not each.IDEMPOTENT) for each in attempt.requests)
        return [Failed.of(error) for error in errors]

    def _circuit_changed(self, state: CircuitState) -> None:
        address = self._ctx.address
        if state is CircuitState.OPEN:
            # Refused at once, rather than one by one as permits become free.
            self._limiter.refuse_all(lambda: self.breaker.refusal() or CircuitOpen(address=address))
            failures, recovery = self.breaker.failures, self.policy.breaker.recovery
            self._ctx.emit(CircuitOpened, address=address, failures=failures, retry_after=recovery)
        elif state is _CLOSED:
            self._ctx.emit(CircuitClosed, address=address)
