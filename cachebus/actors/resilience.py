"""The guard between a backend's actor and its store: what keeps one backend's trouble from becoming everybody's.

It repeats what may be repeated, leaves a failing backend alone, gives up on what takes far longer than usual, and lets
only so many batches ask at a time. Nothing else in cachebus does any of this.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio

from cachebus.bus import TaskPort, open_port
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
from .attempts import Attempt, Attempts
from .breaker import CircuitBreaker, CircuitState
from .context import Context
from .guard_policy import GuardPolicy, GuardStatistics
from .latency import AdaptiveTimeout
from .places import Places
from .ports import BatchStore, PipelinedStore, Replied
from .retrying import RetryBudget, repeatable
from .scopes import asyncio_scope
from .verdict import Verdict, judge

GOOD_BATCH = 16
"""Requests that are sent though others are under way: fewer wait for those, because a system call costs as much as ten
requests do."""


class Guard:
    """Stands before one batch store. Belongs to one event loop, that of its actor.

    `execute` and `submit` are those of the store, with the deadline of the batch on the clock's monotonic time. A batch
    that the guard refuses raises `CircuitOpen` or `Overloaded`; what the store raises becomes everybody's `Failed`.
    """

    def __init__(self, policy: GuardPolicy, ctx: Context, store: str, *, seed: int | None = None) -> None:
        from .repeating import repeat  # Here, and not with the first failure: a guard is made where imports may block.

        self.policy = policy
        self._repeat = repeat
        self._ctx = ctx
        self._store = store
        self._clock = ctx.clock
        self._now = ctx.clock.monotonic
        self._breaker = CircuitBreaker(policy.breaker, ctx.clock, ctx.address, self._circuit_changed)
        self._timeout = self._new_timeout()
        self._lock_timeout = self._new_timeout()
        self._budget = RetryBudget(policy.retry.budget)
        self._chance = random.Random(seed)
        self._attempts = Attempts(ctx, policy.timeout_max, self._give_up)
        self._places = Places(policy.max_concurrent, policy.max_waiting, ctx.address)
        self._closed = False
        self._connected: bool | None = None
        self._pause: TaskPort | None = None
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
        await self._send(store, batch, self._settled(store, batch, deadline, replied))

    def _settled(
        self, store: PipelinedStore, batch: Sequence[Request[Any]], deadline: float | None, replied: Replied
    ) -> Replied:
        """What takes in the replies of the first attempt, and repeats what is worth it before `replied` is called."""

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

        return settled

    def pause(self, waiting: int) -> TaskPort | None:
        """A port answered when the next attempt ends, if one is under way and `waiting` requests make no good batch."""
        if waiting >= GOOD_BATCH or not self._attempts.brisk:
            return None
        if self._pause is None or not self._pause.waiting:
            self._pause = open_port()
        return self._pause

    def submit_at_once(self, store: PipelinedStore, batch: Sequence[Request[Any]], replied: Replied) -> bool:
        """As `submit`, where nothing is under way and nothing has to be waited for; else `False`. Raises `CircuitOpen`."""
        if self._attempts.brisk or not self._places.take_at_once():
            return False
        attempt = self._admitted(batch)
        settled = self._settled(store, batch, None, replied)
        attempt.give_up = lambda: settled(self._too_late(attempt))
        try:
            if store.submit_at_once(batch, self._told(attempt, settled)):
                return True
        except BaseException:
            self._abandon(attempt)
            raise
        self._abandon(attempt)
        return False

    def _told(self, attempt: Attempt, settled: Replied) -> Replied:
        def replied(replies: Sequence[Reply]) -> None:
            if self._settle(attempt, replies):
                settled(replies)  # First: who asks again at once comes into the batch that waited for this one.
                self._resume()

        return replied

    async def _send(self, store: PipelinedStore, batch: Sequence[Request[Any]], settled: Replied) -> None:
        attempt = await self._begin(batch)
        replied = self._told(attempt, settled)
        try:
            with asyncio_scope() as scope:
                attempt.give_up = scope.cancel
                await store.submit(batch, replied)
                attempt.give_up = lambda: settled(self._too_late(attempt))
        except CacheError as error:
            self._told(attempt, settled)([Failed.of(error)] * len(batch))
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

        return await self._repeat(
            counted,
            batch,
            replies,
            policy=self.policy.retry,
            clock=self._clock,
            chance=self._chance,
            deadline=deadline,
        )

    # Coming in

    async def _begin(self, batch: Sequence[Request[Any]]) -> Attempt:
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
        return self._admitted(batch)

    def _admitted(self, batch: Sequence[Request[Any]]) -> Attempt:
        """An attempt that the circuit lets through, with the place that was taken for it. Raises `CircuitOpen`."""
        try:
            ticket = self._breaker.admit()
        except CircuitOpen:
            self._rejected += 1
            self._places.leave()
            raise
        timeout = self._lock_timeout if batch and batch[0].WIRE_NAME.startswith("lock.") else self._timeout
        attempt = Attempt(batch, ticket, timeout, self._now())
        self._attempts.add(attempt)
        return attempt

    # Going out

    def _settle(self, attempt: Attempt, replies: Sequence[Reply]) -> bool:
        """Take in the replies. `False` if the attempt was given up before they came."""
        if not self._attempts.take(attempt):
            return False
        duration = self._now() - attempt.started
        if Failed not in map(type, replies):
            self._succeeded(attempt, duration)
        else:
            self._judge(attempt, duration, replies)
        self._places.leave()
        return True

    def _resume(self) -> None:
        if self._pause is not None:
            self._pause.answer(None)
            self._pause = None

    def _abandon(self, attempt: Attempt) -> None:
        if self._attempts.take(attempt):
            self._breaker.abandoned(attempt.ticket)
            self._places.leave()
            self._resume()

    def _judge(self, attempt: Attempt, duration: float, replies: Sequence[Reply]) -> None:
        verdict, lost = judge(replies, self.policy.excluded)
        if lost is not None:
            self.disconnected(lost)
        if verdict is Verdict.ILL:
            self._failed(attempt)
        elif verdict is Verdict.UNKNOWN:
            self._breaker.abandoned(attempt.ticket)
        else:
            self._succeeded(attempt, duration)

    def _succeeded(self, attempt: Attempt, duration: float) -> None:
        self._successes += 1
        self._breaker.succeeded(attempt.ticket)
        if duration <= self.policy.timeout_min or not allowance(attempt.batch, self.policy.timeout_max):
            attempt.timeout.answered(duration)
        if not self._connected:
            self.connected()

    def _failed(self, attempt: Attempt) -> None:
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

    def _give_up(self, attempt: Attempt, now: float) -> None:
        self._attempts.take(attempt)
        # Many batches under way strike together. Counted one by one they would open the circuit of a server that has
        # only become slower, before the timeout could follow it.
        news = attempt.timeout.struck(attempt.started, now)
        if not news or issubclass(CacheTimeoutError, self.policy.excluded):
            self._breaker.abandoned(attempt.ticket)
        else:
            self._failed(attempt)
        self._places.leave()
        assert attempt.give_up is not None
        attempt.give_up()
        self._resume()

    def _too_late(self, attempt: Attempt) -> Sequence[Reply]:
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
