"""The guard between a backend's actor and its store: what keeps one backend's trouble from becoming everybody's.

It repeats what may be repeated, leaves a failing backend alone, gives up on what takes far longer than usual, and lets
only so many batches ask at a time. Nothing else in cachebus does any of this.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio

from cachebus.bus import open_port
from cachebus.messages import (
    BackendConnected,
    BackendDisconnected,
    CacheError,
    CacheTimeoutError,
    CircuitClosed,
    CircuitOpen,
    CircuitOpened,
    Failed,
    Overloaded,
    Reply,
    Request,
)

from .allowance import allowance
from .breaker import CircuitBreaker, CircuitState
from .context import Context
from .guard_policy import GuardPolicy, GuardStatistics
from .latency import AdaptiveTimeout
from .places import Places
from .ports import BatchStore, PipelinedStore, Replied
from .retrying import RetryBudget, repeat, repeatable
from .scopes import asyncio_scope
from .verdict import Verdict, judge

_NEVER = float("inf")


class _Attempt:
    """A batch that was handed to the store and not settled yet."""

    __slots__ = ("batch", "due", "extended", "give_up", "started", "ticket", "timeout")

    def __init__(
        self, batch: Sequence[Request[Any]], ticket: int, timeout: AdaptiveTimeout, started: float, due: float
    ) -> None:
        self.batch = batch
        self.ticket = ticket
        self.timeout = timeout
        self.started = started
        self.due = due
        self.extended = False
        self.give_up: Callable[[], None] | None = None


class Guard:
    """Stands before one batch store. Belongs to one event loop, that of its actor.

    `execute` and `submit` are those of the store, with the deadline of the batch on the clock's monotonic time. A batch
    that the guard refuses raises `CircuitOpen` or `Overloaded`; what the store raises becomes everybody's `Failed`.
    """

    def __init__(self, policy: GuardPolicy, ctx: Context, store: str, *, seed: int | None = None) -> None:
        self.policy = policy
        self._ctx = ctx
        self._store = store
        self._clock = ctx.clock
        self._now = ctx.clock.monotonic
        self._breaker = CircuitBreaker(policy.breaker, ctx.clock, ctx.address, self._circuit_changed)
        self._timeout = self._new_timeout()
        self._lock_timeout = self._new_timeout()
        self._budget = RetryBudget(policy.retry.budget)
        self._chance = random.Random(seed)
        self._outstanding: dict[_Attempt, None] = {}
        self._places = Places(policy.max_concurrent, policy.max_waiting, ctx.address)
        self._closed = False
        self._armed_for = _NEVER
        self._disarm: Callable[[], None] | None = None
        self._connected: bool | None = None
        self._failures = 0
        self._successes = 0
        self._rejected = 0
        self._retries = 0
        self._last_failure: float | None = None

    def __repr__(self) -> str:
        return f"<Guard of {self._ctx.address}, {self._breaker.state}, {self._places!r}>"

    def statistics(self) -> GuardStatistics:
        """What the guard has seen, and where it stands."""
        wait = self._breaker.retry_after
        is_open = self._breaker.state is CircuitState.OPEN
        return GuardStatistics(
            state=self._breaker.state.value,
            failure_count=self._failures,
            success_count=self._successes,
            last_failure_time=self._last_failure,
            next_attempt=self._clock.wall() + wait if is_open else None,
            current_timeout=self._timeout.current,
            p95=self._timeout.p95,
            lock_timeout=self._lock_timeout.current,
            lock_p95=self._lock_timeout.p95,
            in_flight=self._places.taken,
            waiting=self._places.waiting,
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

    # A store that answers

    async def execute(
        self, store: BatchStore, batch: Sequence[Request[Any]], deadline: float | None
    ) -> Sequence[Reply]:
        """Carry out a batch, and what failed of it again where that may mend it."""

        async def attempt(part: Sequence[Request[Any]]) -> Sequence[Reply]:
            return await self._executed(store, part)

        replies = await attempt(batch)
        if self._worth_repeating(batch, replies):
            replies = await self._repeated(attempt, batch, replies, deadline)
        return replies

    async def _executed(self, store: BatchStore, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        attempt = await self._begin(batch)
        replies: Sequence[Reply] = ()
        scope = anyio.CancelScope()
        attempt.give_up = scope.cancel
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
        self._settle(attempt, replies)
        return replies

    # A store that answers later

    async def submit(
        self, store: PipelinedStore, batch: Sequence[Request[Any]], deadline: float | None, replied: Replied
    ) -> None:
        """Send a batch. `replied` is called once, when everything that is worth repeating was repeated."""

        async def attempt(part: Sequence[Request[Any]]) -> Sequence[Reply]:
            port = open_port()
            await self._send(store, part, port.answer)
            answer: Sequence[Reply] = await port.wait()
            return answer

        def settled(replies: Sequence[Reply]) -> None:
            if not self._worth_repeating(batch, replies):
                replied(replies)
                return

            async def go_on() -> None:
                answer = replies
                try:
                    answer = await self._repeated(attempt, batch, replies, deadline)
                finally:
                    replied(answer)

            self._ctx.start_soon(go_on)

        await self._send(store, batch, settled)

    async def _send(self, store: PipelinedStore, batch: Sequence[Request[Any]], settled: Replied) -> None:
        attempt = await self._begin(batch)

        def replied(replies: Sequence[Reply]) -> None:
            if self._settle(attempt, replies):
                settled(replies)

        try:
            with asyncio_scope() as scope:
                attempt.give_up = scope.cancel
                await store.submit(batch, replied)
                attempt.give_up = lambda: settled(self._too_late(attempt))
        except CacheError as error:
            replies = [Failed.of(error)] * len(batch)
            self._settle(attempt, replies)
            settled(replies)
            return
        except BaseException:
            self._abandon(attempt)
            raise
        if scope.cancel_called:
            # Given up while it was being sent. Should it have been sent after all, `replied` finds it settled.
            settled(self._too_late(attempt))

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
        attempt: Callable[[Sequence[Request[Any]]], Awaitable[Sequence[Reply]]],
        batch: Sequence[Request[Any]],
        replies: Sequence[Reply],
        deadline: float | None,
    ) -> Sequence[Reply]:
        async def counted(part: Sequence[Request[Any]]) -> Sequence[Reply]:
            if not self._budget.allows(self._successes + self._failures):
                raise Overloaded("the budget for repetitions is used up", self._ctx.address)
            self._budget.take()
            self._retries += 1
            return await attempt(part)

        return await repeat(
            counted,
            batch,
            replies,
            policy=self.policy.retry,
            clock=self._clock,
            chance=self._chance,
            deadline=deadline,
        )

    # Coming in

    async def _begin(self, batch: Sequence[Request[Any]]) -> _Attempt:
        if not self._places.take_at_once():
            # Nobody waits for a place behind an open circuit: all that a place would get there is the refusal.
            if (refusal := self._breaker.refusal()) is not None:
                self._rejected += 1
                raise refusal
            try:
                await self._places.take()
            except CacheError:
                self._rejected += 1
                raise
        try:
            ticket = self._breaker.admit()
        except CircuitOpen:
            self._rejected += 1
            self._places.leave()
            raise
        timeout = self._lock_timeout if batch and batch[0].WIRE_NAME.startswith("lock.") else self._timeout
        started = self._now()
        due = started + timeout.current
        attempt = _Attempt(batch, ticket, timeout, started, due)
        self._outstanding[attempt] = None
        if due < self._armed_for:
            self._arm(due, started)
        return attempt

    # Going out

    def _settle(self, attempt: _Attempt, replies: Sequence[Reply]) -> bool:
        """Take in the replies. `False` if the attempt was given up before they came."""
        if not self._take(attempt):
            return False
        duration = self._now() - attempt.started
        if Failed not in map(type, replies):
            self._succeeded(attempt, duration)
        else:
            self._judge(attempt, duration, replies)
        self._places.leave()
        return True

    def _take(self, attempt: _Attempt) -> bool:
        """Whether nobody has settled an attempt before; now somebody has."""
        return self._outstanding.pop(attempt, attempt) is None

    def _abandon(self, attempt: _Attempt) -> None:
        if self._take(attempt):
            self._breaker.abandoned(attempt.ticket)
            self._places.leave()

    def _judge(self, attempt: _Attempt, duration: float, replies: Sequence[Reply]) -> None:
        verdict, lost = judge(replies, self.policy.excluded)
        if lost is not None:
            self.disconnected(lost)
        if verdict is Verdict.ILL:
            self._failed(attempt)
        elif verdict is Verdict.UNKNOWN:
            self._breaker.abandoned(attempt.ticket)
        else:
            self._succeeded(attempt, duration)

    def _succeeded(self, attempt: _Attempt, duration: float) -> None:
        self._successes += 1
        self._breaker.succeeded(attempt.ticket)
        if duration <= self.policy.timeout_min or not allowance(attempt.batch, self.policy.timeout_max):
            attempt.timeout.answered(duration)
        if not self._connected:
            self.connected()

    def _failed(self, attempt: _Attempt) -> None:
        self._failures += 1
        self._last_failure = self._clock.wall()
        self._breaker.failed(attempt.ticket)

    def _circuit_changed(self, state: CircuitState) -> None:
        kinds = self._ctx.audience.kinds
        if state is CircuitState.OPEN:
            # Told now, and not one by one as the places before them become free.
            self._places.turn_away(lambda: self._breaker.refusal() or CircuitOpen(address=self._ctx.address))
        if state is CircuitState.OPEN and CircuitOpened in kinds:
            self._ctx.emit(
                CircuitOpened(
                    address=self._ctx.address,
                    failures=self._breaker.failures,
                    retry_after=self.policy.breaker.recovery,
                )
            )
        elif state is CircuitState.CLOSED and CircuitClosed in kinds:
            self._ctx.emit(CircuitClosed(address=self._ctx.address))

    # Giving up. One timer for all attempts, set anew only for one that is due earlier: mostly it rings when everything
    # that it was set for has long been answered, and what is looked at per batch is one comparison.

    def _arm(self, due: float, now: float) -> None:
        if self._disarm is not None:
            self._disarm()
        self._armed_for = due
        self._disarm = self._ctx.call_after(due - now, self._ring)

    def _ring(self) -> None:
        self._disarm = None
        self._armed_for = _NEVER
        now = self._now()
        for attempt in [each for each in self._outstanding if each.due <= now]:
            # Looked at only now, because nearly every batch is answered long before.
            if not attempt.extended and (more := allowance(attempt.batch, self.policy.timeout_max)):
                attempt.extended = True
                attempt.due += more
            if attempt.due <= now:
                self._give_up(attempt, now)
        next_due = min((each.due for each in self._outstanding), default=_NEVER)
        if next_due < self._armed_for:
            self._arm(next_due, now)

    def _give_up(self, attempt: _Attempt, now: float) -> None:
        self._take(attempt)
        attempt.timeout.struck(attempt.started, now)
        if issubclass(CacheTimeoutError, self.policy.excluded):
            self._breaker.abandoned(attempt.ticket)
        else:
            self._failed(attempt)
        self._places.leave()
        assert attempt.give_up is not None
        attempt.give_up()

    def _too_late(self, attempt: _Attempt) -> Sequence[Reply]:
        waited = self._now() - attempt.started
        detail, address = f"{self._store} gave no answer", self._ctx.address
        return [
            Failed.of(CacheTimeoutError(detail, address, waited, in_doubt=not each.IDEMPOTENT))
            for each in attempt.batch
        ]

    def _new_timeout(self) -> AdaptiveTimeout:
        policy = self.policy
        return AdaptiveTimeout(
            window=policy.timeout_window,
            lowest=policy.timeout_min,
            highest=policy.timeout_max,
            initial=policy.timeout_initial,
        )
