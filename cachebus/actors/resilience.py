"""The guard between a backend's actor and its store: what keeps one backend's trouble from becoming everybody's.

It repeats what may be repeated, leaves a failing backend alone, gives up on what takes far longer than usual, and limits
how many batches are under way at a time. Nothing else in cachebus does any of this.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum, auto
from functools import partial
from typing import Any

import anyio

from cachebus.bus import open_port
from cachebus.messages import (
    BackendConnected,
    BackendDisconnected,
    CacheConnectionError,
    CacheError,
    CacheTimeoutError,
    CircuitClosed,
    CircuitOpen,
    CircuitOpened,
    Failed,
    Overloaded,
    Reply,
    Request,
    error_class,
)

from .attempts import LOCK_REQUESTS, SLOW_REQUESTS, Attempt, Attempts, CallDeadlines, FixedDeadline, timeout_extension
from .breaker import CircuitBreaker, CircuitState
from .concurrency_limit import ConcurrencyLimiter
from .context import Context
from .guard_policy import GuardPolicy, GuardStatistics
from .latency import AdaptiveTimeout
from .ports import BatchStore, OnReplies, PipelinedStore
from .retrying import RetryBudget, repeatable
from .scopes import asyncio_scope

_CLOSED = CircuitState.CLOSED


class Outcome(Enum):
    """What a batch says about its backend: it did its work, it did nothing of it, or the replies say nothing about that."""

    SUCCESS = auto()
    FAILURE = auto()
    IGNORED = auto()


SUCCESS, FAILURE, IGNORED = Outcome


class Guard:
    """Stands before one batch store. Belongs to one event loop, that of its actor.

    `execute` returns the replies; `try_submit` and `submit` hand them to a function, once, when everything that is worth
    repeating was repeated. A batch that the guard refuses raises `CircuitOpen` or `Overloaded`; what the store raises
    becomes a `Failed` for each request. `on_free` is called whenever an attempt has ended, `on_open` when the circuit opens.
    """

    def __init__(
        self,
        policy: GuardPolicy,
        ctx: Context,
        store: str,
        *,
        seed: int | None = None,
        on_free: Callable[[], None] = lambda: None,
    ) -> None:
        from .repeating import repeat  # Here, and not with the first failure: a guard is made where imports may block.

        self.policy = policy
        self.breaker = CircuitBreaker(policy.breaker, ctx.clock, ctx.address, self._circuit_changed)
        self.on_free = on_free
        self._repeat = repeat
        self._ctx = ctx
        self._store = store
        self._now = ctx.clock.monotonic
        self._timeout = self._new_timeout()
        self._lock_timeout = self._new_timeout()
        self._budget = RetryBudget(policy.retry.budget)
        self._chance = random.Random(seed)
        self.attempts = Attempts(ctx, policy.timeout_max, self._give_up)
        self._limiter = ConcurrencyLimiter(policy.max_concurrent, policy.max_waiting, ctx.address)
        self._closed = False
        self._connected: bool | None = None
        self._failures = 0
        self._successes = 0
        self._rejected = 0
        self._retries = 0
        self._last_failure: float | None = None

    def __repr__(self) -> str:
        return f"<Guard of {self._ctx.address}, {self.breaker.state}, {self._limiter!r}>"

    def statistics(self) -> GuardStatistics:
        """What the guard has seen, and its present state."""
        wait = self.breaker.retry_after
        is_open = self.breaker.state is CircuitState.OPEN
        return GuardStatistics(
            state=self.breaker.state.value,
            failure_count=self._failures,
            success_count=self._successes,
            last_failure_time=self._last_failure,
            next_attempt=self._ctx.clock.wall() + wait if is_open else None,
            current_timeout=self._timeout.current,
            p95=self._timeout.p95,
            lock_timeout=self._lock_timeout.current,
            lock_p95=self._lock_timeout.p95,
            in_flight=self._limiter.taken,
            waiting=self._limiter.waiting,
            rejected=self._rejected,
            retries=self._retries,
        )

    def connected(self) -> None:
        """Note that the store can be reached."""
        if not self._connected:
            self._connected = True
            if BackendConnected in self._ctx.audience.kinds:
                self._ctx.emit(BackendConnected(store=self._store))

    def disconnected(self, reason: str) -> None:
        """Note that the store cannot be reached."""
        if self._connected is not False:
            self._connected = False
            if BackendDisconnected in self._ctx.audience.kinds:
                self._ctx.emit(BackendDisconnected(store=self._store, reason=reason))

    def close(self) -> None:
        """Repeat nothing from now on: the store is about to be closed."""
        self._closed = True

    def fail_all(self, failed: Failed) -> None:
        """Answer everything that is under way with `failed`: the actor has crashed or was stopped."""
        self._closed = True
        for attempt in self.attempts.take_all():
            self.breaker.abandoned(attempt.ticket)
            self._limiter.release()
            attempt.then([failed] * len(attempt.requests))

    # A store that answers later

    def try_submit(
        self,
        store: PipelinedStore,
        requests: Sequence[Request[Any]],
        then: OnReplies,
        callers: CallDeadlines | None = None,
    ) -> bool:
        """Send a batch, if nothing has to be waited for; else `False`. Raises `CircuitOpen`."""
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
        self,
        store: PipelinedStore,
        requests: Sequence[Request[Any]],
        then: OnReplies,
        callers: CallDeadlines | None = None,
        *,
        may_repeat: bool = True,
    ) -> None:
        """Send a batch, waiting for a place and for the store. Raises `CircuitOpen` and `Overloaded`."""
        await self._acquire()
        attempt = self._begin(requests, store, then, callers)
        attempt.may_repeat = may_repeat
        scope = attempt.scope = asyncio_scope()
        try:
            with scope:
                attempt.progress = await store.submit(requests, partial(self._settle, attempt))
        except CacheError as error:
            if not scope.cancel_called:
                self._settle(attempt, [Failed.of(error)] * len(requests))
                return
        except BaseException:
            self._abandon(attempt)
            raise
        finally:
            attempt.scope = None
        if scope.cancel_called:
            # Given up while it was being sent. Should it have been sent after all, its replies are dropped.
            self._end(attempt, self._too_late(attempt))

    # A store that answers at once

    async def execute(
        self, store: BatchStore, batch: Sequence[Request[Any]], deadline: float | None
    ) -> Sequence[Reply]:
        """Carry out a batch, and repeat what failed of it where that may mend it. `deadline` is on the clock's monotonic
        time."""
        callers = FixedDeadline(deadline)

        async def attempt(part: Sequence[Request[Any]]) -> Sequence[Reply]:
            return await self._executed(store, part, callers)

        replies = await attempt(batch)
        if self._worth_repeating(batch, replies):
            replies = await self._repeated(attempt, batch, replies, callers)
        return replies

    async def _executed(
        self, store: BatchStore, batch: Sequence[Request[Any]], callers: CallDeadlines
    ) -> Sequence[Reply]:
        await self._acquire()
        attempt = self._begin(batch, store, _drop, callers)
        replies: Sequence[Reply] = ()
        scope = attempt.scope = anyio.CancelScope()
        try:
            with scope:
                replies = await store.execute(batch)
        except CacheError as error:
            replies = [Failed.of(error)] * len(batch)
        except BaseException:
            self._abandon(attempt)
            raise
        if scope.cancelled_caught:
            return self._too_late(attempt)
        attempt.may_repeat = False  # That is done here.
        self._settle(attempt, replies)
        return replies

    # On the way out

    async def _acquire(self) -> None:
        if self._limiter.try_acquire():
            return
        # Behind an open circuit there is nothing to wait for: a place would only lead to the refusal.
        if (refusal := self.breaker.refusal()) is not None:
            self._rejected += 1
            raise refusal
        try:
            await self._limiter.acquire()
        except CacheError:
            self._rejected += 1
            raise

    def _begin(
        self, requests: Sequence[Request[Any]], store: Any, then: OnReplies, callers: CallDeadlines | None
    ) -> Attempt:
        """An attempt that the circuit lets through, with the place that was taken for it. Raises `CircuitOpen`."""
        breaker = self.breaker
        if breaker.state is _CLOSED:
            ticket = breaker.period
        else:
            try:
                ticket = breaker.admit()
            except CircuitOpen:
                self._rejected += 1
                self._limiter.release()
                raise
        timeout = self._lock_timeout if type(requests[0]) in LOCK_REQUESTS else self._timeout
        started = self._now()
        due = started + timeout.current
        short = type(requests[0]) not in SLOW_REQUESTS
        attempt = Attempt(requests, store, then, callers, ticket, timeout, started, due, short)
        attempts = self.attempts
        attempts.outstanding[attempt] = None
        attempts.short += short
        if due < attempts.armed_for:
            attempts.arm(due, started)
        return attempt

    # On the way back

    def _settle(self, attempt: Attempt, replies: Sequence[Reply]) -> None:
        """Take the replies of an attempt, unless it was given up before they came."""
        attempts = self.attempts
        if attempts.outstanding.pop(attempt, attempt) is not None:
            return
        attempts.short -= attempt.short
        has_failures = Failed in map(type, replies)
        if not (has_failures and self._judge(attempt, replies)):
            self._successes += 1
            breaker = self.breaker
            if breaker.state is not _CLOSED or breaker.failures:
                breaker.succeeded(attempt.ticket)
            duration = self._now() - attempt.started
            if duration <= self.policy.timeout_min or not timeout_extension(attempt.requests, self.policy.timeout_max):
                attempt.timeout.answered(duration)
            if not self._connected:
                self.connected()
        limiter = self._limiter
        if limiter.queue:
            limiter.release()
        else:
            limiter.taken -= 1
        if has_failures:
            self._end(attempt, replies)
            return
        try:
            attempt.then(replies)
        finally:
            self.on_free()  # Last: callers that ask again at once come into the batch that waited for this one.

    def _end(self, attempt: Attempt, replies: Sequence[Reply]) -> None:
        """Hand on replies of which some are failures, or repeat what is worth it before."""
        try:
            if attempt.may_repeat and self._worth_repeating(attempt.requests, replies):
                self._ctx.start_soon(partial(self._go_on, attempt, replies))
            else:
                attempt.then(replies)
        finally:
            self.on_free()

    async def _go_on(self, attempt: Attempt, replies: Sequence[Reply]) -> None:
        async def again(part: Sequence[Request[Any]]) -> Sequence[Reply]:
            port = open_port()
            await self.submit(attempt.store, part, port.answer, attempt.callers, may_repeat=False)
            answer: Sequence[Reply] = await port.wait()
            return answer

        answer = replies
        try:
            answer = await self._repeated(again, attempt.requests, replies, attempt.callers)
        finally:
            attempt.then(answer)

    def _judge(self, attempt: Attempt, replies: Sequence[Reply]) -> bool:
        """Take in replies of which some are failures. `False` if they are a success to the circuit breaker."""
        outcome, lost = outcome_of(replies, self.policy.excluded)
        if lost is not None:
            self.disconnected(lost)
        if outcome is SUCCESS:
            return False
        if outcome is FAILURE:
            self._failed(attempt)
        else:
            self.breaker.abandoned(attempt.ticket)
        return True

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
        # Many batches under way are struck together. Counted one by one they would open the circuit of a server that has
        # only become slower, before the timeout could follow it.
        news = not attempt.extended and attempt.timeout.struck(attempt.started, now)
        if not news or issubclass(CacheTimeoutError, self.policy.excluded):
            self.breaker.abandoned(attempt.ticket)
        else:
            self._failed(attempt)
        self._limiter.release()
        if attempt.scope is not None:
            attempt.scope.cancel()
            self.on_free()
        else:
            self._end(attempt, self._too_late(attempt))

    def _too_late(self, attempt: Attempt) -> Sequence[Reply]:
        waited = self._now() - attempt.started
        detail, address = f"{self._store} gave no answer", self._ctx.address
        return [
            Failed.of(CacheTimeoutError(detail, address, waited, in_doubt=not each.IDEMPOTENT))
            for each in attempt.requests
        ]

    def _circuit_changed(self, state: CircuitState) -> None:
        kinds = self._ctx.audience.kinds
        if state is CircuitState.OPEN:
            # Refused now, and not one by one as the places before them become free.
            self._limiter.refuse_all(lambda: self.breaker.refusal() or CircuitOpen(address=self._ctx.address))
        if state is CircuitState.OPEN and CircuitOpened in kinds:
            self._ctx.emit(
                CircuitOpened(
                    address=self._ctx.address,
                    failures=self.breaker.failures,
                    retry_after=self.policy.breaker.recovery,
                )
            )
        elif state is CircuitState.CLOSED and CircuitClosed in kinds:
            self._ctx.emit(CircuitClosed(address=self._ctx.address))

    # Repeating

    def _worth_repeating(self, batch: Sequence[Request[Any]], replies: Sequence[Reply]) -> bool:
        return (
            Failed in map(type, replies)
            and self.policy.retry.attempts > 1
            and not self._closed
            and bool(repeatable(batch, replies))
            and self._budget.allows(self._successes + self._failures)
        )

    async def _repeated(
        self,
        again: Callable[[Sequence[Request[Any]]], Awaitable[Sequence[Reply]]],
        batch: Sequence[Request[Any]],
        replies: Sequence[Reply],
        callers: CallDeadlines | None,
    ) -> Sequence[Reply]:
        async def counted(part: Sequence[Request[Any]]) -> Sequence[Reply]:
            if not self._budget.allows(self._successes + self._failures):
                raise Overloaded("the budget for repetitions is used up", self._ctx.address)
            self._budget.take()
            self._retries += 1
            return await again(part)

        now = self._now()
        left = None if callers is None else callers.seconds_left(now)
        return await self._repeat(
            counted,
            batch,
            replies,
            policy=self.policy.retry,
            clock=self._ctx.clock,
            chance=self._chance,
            deadline=None if left is None else now + left,
        )

    def _new_timeout(self) -> AdaptiveTimeout:
        policy = self.policy
        return AdaptiveTimeout(
            window=policy.timeout_window,
            lowest=policy.timeout_min,
            highest=policy.timeout_max,
            initial=policy.timeout_initial,
        )


def outcome_of(replies: Sequence[Reply], excluded: tuple[type[CacheError], ...]) -> tuple[Outcome, str | None]:
    """What a batch of which something failed says about the backend, and why it cannot be reached, if that is so.

    It has failed if it answered nothing of the batch, and for a reason that may pass. Errors of `excluded` classes count
    neither way, and neither does a refusal, such as that of a password: nobody has looked at the request.
    """
    failures = [(error_class(each.code), each.detail) for each in replies if isinstance(each, Failed)]
    counting = [(kind, detail) for kind, detail in failures if kind.transient and not issubclass(kind, excluded)]
    lost = next((detail for kind, detail in counting if issubclass(kind, CacheConnectionError)), None)
    if len(failures) < len(replies):
        return SUCCESS, lost
    if counting:
        return FAILURE, lost
    if all(kind.transient or issubclass(kind, excluded) or _is_refusal(kind) for kind, _ in failures):
        return IGNORED, lost
    return SUCCESS, lost


def _is_refusal(kind: type[CacheError]) -> bool:
    return kind.code in ("configuration", "closed")


def _drop(replies: Sequence[Reply]) -> None:
    pass
