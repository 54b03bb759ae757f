"""The lock manager against a model, with a manual clock.

For any requests in any order: a lock has one holder, waiters are served in order, tokens grow, and every caller is
answered in time.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cachebus.actors.locks.manager import PARKED, SLACK
from cachebus.messages import (
    AcquireLock,
    DescribeLock,
    Failed,
    LockDenied,
    LockFree,
    LockGranted,
    LockInfo,
    LockQueued,
    NotHeld,
    Released,
    ReleaseLock,
    Renewed,
    RenewLock,
)

from .harness import Caller, Managed

NAMES = st.sampled_from(["a", "b"])
TTLS = st.sampled_from([0.5, 2.0, 7.0, 40.0])
WAITS = st.sampled_from([0.0, 1.0, 6.0, 35.0])
EPSILON = 1e-6


class Attempt:
    """Attempt to acquire a lock, as seen by its caller and by the model."""

    def __init__(self, name: str, ticket: str, ttl: float, ends: float) -> None:
        self.name = name
        self.ticket = ticket
        self.ttl = ttl
        self.ends = ends
        self.asked_at = 0.0
        self.caller = Caller()
        self.state = "waits"  # has, over
        self.token = 0
        self.until = 0.0  # End of the lease, as the caller may rely on it.
        self.dead = False

    def __repr__(self) -> str:
        return f"<{self.ticket} of {self.name}: {self.state}{' dead' if self.dead else ''}>"


class Locks(RuleBasedStateMachine):
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.locks = Managed()
        asyncio.run(self.locks.start())
        self.numbers = itertools.count()
        self.all: list[Attempt] = []
        self.last: dict[str, int] = {}
        self.order: dict[str, list[Attempt]] = {"a": [], "b": []}  # Waiters in the order of arrival.

    @property
    def now(self) -> float:
        return self.locks.clock.monotonic()

    def take_in(self) -> None:
        """Read the replies and check them against the model."""
        for attempt in self.all:
            reply = attempt.caller.reply
            if attempt.state != "waits" or reply is None:
                continue
            if isinstance(reply, LockGranted):
                self.granted(attempt, reply)
            elif attempt.dead:
                self.leave(attempt, "over")  # Any reply is allowed.
            elif isinstance(reply, LockDenied):
                assert self.now >= attempt.ends - EPSILON, "denied before its wait limit"
                self.leave(attempt, "over")
            else:
                assert isinstance(reply, LockQueued)
                assert self.now >= min(attempt.ends, attempt.asked_at + PARKED) - EPSILON
                self.ask(attempt)

    def granted(self, attempt: Attempt, reply: LockGranted) -> None:
        assert not attempt.dead, "a caller that is gone got the lock"
        for other in self.all:
            if other.name == attempt.name and other.state == "has":
                assert other.until <= self.now + EPSILON, f"{other} still holds the lock granted to {attempt}"
        ahead = self.order[attempt.name][: self.order[attempt.name].index(attempt)]
        assert all(each.dead for each in ahead), f"{attempt} was granted before {ahead}"
        assert reply.token > self.last.get(attempt.name, 0)
        self.last[attempt.name] = attempt.token = reply.token
        attempt.until = attempt.asked_at + attempt.ttl
        self.leave(attempt, "has")

    def leave(self, attempt: Attempt, state: str) -> None:
        attempt.state = state
        if attempt in self.order[attempt.name]:
            self.order[attempt.name].remove(attempt)

    def ask(self, attempt: Attempt) -> None:
        attempt.asked_at = self.now
        wait = max(0.0, attempt.ends - self.now)
        attempt.caller = self.locks.ask(AcquireLock(attempt.name, "me", attempt.ticket, attempt.ttl, wait))
        self.take_in()

    @rule(target=attempts, name=NAMES, ttl=TTLS, wait=WAITS)
    def acquire(self, name: str, ttl: float, wait: float) -> Attempt:
        attempt = Attempt(name, f"t{next(self.numbers)}", ttl, self.now + wait)
        self.all.append(attempt)
        self.order[name].append(attempt)
        self.ask(attempt)
        return attempt

    @rule(attempt=attempts)
    def renew(self, attempt: Attempt) -> None:
        reply: Any = self.locks.ask(RenewLock(attempt.name, attempt.ticket, attempt.ttl)).reply
        self.take_in()
        if isinstance(reply, Renewed):
            assert attempt.state == "has"
            attempt.until = self.now + attempt.ttl
        elif attempt.state == "has":
            assert attempt.until <= self.now + EPSILON, "a held lock could not be renewed"
            attempt.state = "over"
        else:
            assert isinstance(reply, NotHeld | Failed)

    @rule(attempt=attempts)
    def release(self, attempt: Attempt) -> None:
        if attempt.state != "has":
            return
        held = attempt.until > self.now
        attempt.state = "over"
        reply: Any = self.locks.ask(ReleaseLock(attempt.name, attempt.ticket)).reply
        if held:
            assert isinstance(reply, Released)
        self.take_in()

    @rule(attempt=attempts, says_so=st.booleans())
    def go_away(self, attempt: Attempt, says_so: bool) -> None:
        """Cancel the caller. Its `ReleaseLock` may arrive or not."""
        if attempt.state != "waits":
            return
        attempt.caller.gone = attempt.dead = True
        if says_so:
            self.leave(attempt, "over")
            self.locks.ask(ReleaseLock(attempt.name, attempt.ticket, abandon=True))
        self.take_in()

    @rule(attempt=attempts)
    def a_stranger_gives_it_back(self, attempt: Attempt) -> None:
        self.locks.ask(ReleaseLock(attempt.name, f"not {attempt.ticket}"))
        self.take_in()

    @rule(attempt=consumes(attempts))
    def forget(self, attempt: Attempt) -> None:
        """Drop an attempt whose holder died: it sends no more requests."""

    @rule(seconds=st.sampled_from([0.01, 0.5, 1.9, 6.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        left = seconds
        while left > 0:
            step = min(left, 0.25)
            self.locks.advance(step)
            left -= step
            self.take_in()

    @rule(hours=st.integers(-1000, 1000))
    def set_the_wall_clock(self, hours: int) -> None:
        wall = self.locks.clock.wall() + hours * 3600.0
        self.locks.clock.wall = lambda: wall

    @rule(name=NAMES)
    def describe(self, name: str) -> None:
        reply: Any = self.locks.ask(DescribeLock(name)).reply
        self.take_in()
        holders = [each for each in self.all if each.name == name and each.state == "has" and each.until > self.now]
        if holders:
            assert isinstance(reply, LockInfo)
            assert reply.token == holders[0].token
        else:
            assert isinstance(reply, LockFree | LockInfo)

    @invariant()
    def nobody_is_forgotten(self) -> None:
        for attempt in self.all:
            if attempt.state == "waits" and not attempt.dead:
                assert self.now < attempt.ends + 0.25 + SLACK, f"{attempt} waits beyond its limit"
        for name, waiting in self.order.items():
            there = [each for each in waiting if not each.dead]
            if there and not any(each.name == name and each.state == "has" for each in self.all):
                # A caller that is gone may hold the lock for a moment, but no longer.
                assert self.now < there[0].asked_at + 60


Locks.TestCase.settings = settings(max_examples=300, stateful_step_count=40)
TestLocks = Locks.TestCase
