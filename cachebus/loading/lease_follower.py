"""Following a load of another process until its value is there, on behalf of all callers of this process."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from cachebus.messages import (
    BadMessage,
    CacheError,
    CapabilityError,
    Found,
    LeaseGranted,
    LoaderFailed,
    Loading,
    Missing,
    NotHeld,
    Stale,
    WatchLease,
)
from cachebus.payload.cached_errors import CachedFailure

from .leased_load import LeasedLoad, LoadJob, LoadTable
from .runners import Runner
from .singleflight import CANCELLED, InFlightLoad, Raised, Value

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.25
"""Seconds between two questions to a store that does not let a caller wait: the first pause, and the longest. A store that
notifies of the end of a lease is asked after the notification, or after the longest pause."""

NOTIFICATION_DELAY = 0.02
"""Seconds by which the notification of the end of a lease may come after the grant of the next."""


class LeaseFollower(Struct, eq=False):
    """Waits for the load of another process under the lease `theirs`. If that load gives up, it loads itself."""

    table: LoadTable
    runner: Runner
    job: LoadJob
    theirs: str
    started: float
    in_flight: InFlightLoad
    is_started: bool = False
    _outcome: Any = CANCELLED

    def start(self) -> None:
        """Follow the load beside the caller."""
        self.runner.start(self, background=True)
        self.is_started = True

    def end(self) -> None:
        """Stop following. The callers ask again, unless they have got an outcome."""
        if self.table.in_flight.get(self.theirs) is self.in_flight:
            del self.table.in_flight[self.theirs]
        self.in_flight.resolve(self._outcome)

    async def run(self) -> None:
        """Resolve the load with what comes of the lease. Without an outcome the callers are to ask again."""
        try:
            self._outcome = await self._follow()
        finally:
            self.end()

    async def _follow(self) -> Any:
        runner, job = self.runner, self.job
        pause = FIRST_PAUSE
        name = self.theirs
        now = runner.client.bus.clock.monotonic
        # Asked first: until the lease ends, a store with notifications would answer every other question in vain.
        if (failed := await self._lease_end(name, 0.0, job.options.wait_limit)) is not None:
            return Raised(failed)
        while (patience := self.started + job.options.wait_limit - now()) > 0:
            load = LeasedLoad(self.table, runner, job, now(), self.in_flight, next(self.table.tokens))
            try:
                reply = await load.ask(wait=patience, after=name)
            except LoaderFailed as error:
                return Raised(error)
            except CacheError:
                break  # The callers ask again, and get the error.
            if isinstance(reply, Found):
                return Value(reply.value)
            if isinstance(reply, LeaseGranted):
                return await self._take_over(load, name)
            if isinstance(reply, NotHeld | CachedFailure):
                break  # As if the question had failed.
            seconds = pause * (0.5 + self.table.random.random() / 2)
            if isinstance(reply, Missing):
                await runner.pause(seconds)
            elif (name := lease_of(reply)) != self.theirs and self.table.find(name) is not None:
                break  # A caller of this process loads by now: the others ask again, and join it.
            else:
                left = min(patience, max(reply.remaining, FIRST_PAUSE))
                if (failed := await self._lease_end(name, seconds, left)) is not None:
                    return Raised(failed)
            pause = min(pause * 1.5, LONGEST_PAUSE)
        return CANCELLED

    async def _take_over(self, load: LeasedLoad, before: str) -> Any:
        """Load under the lease that was granted, unless the loader of the lease before it has failed."""
        load.keep_lease()
        try:
            failed = await self._failure_of(before)
            if failed is None:
                await load.run()
            else:
                # To a caller that got the name of the new lease, the failure before it means nothing.
                load.in_flight.lease_names.discard(load.lease or "")
                load.outcome = Raised(failed)
            return load.outcome
        finally:
            load.end()  # Also when all callers have left meanwhile.

    async def _lease_end(self, name: str, pause: float, longest: float) -> LoaderFailed | None:
        """Wait for the end of a lease of another process: for the notification of the store, if it has any, or for `pause` seconds.

        Returns the error if the loader has failed, as far as the store notifies of that.
        """
        if self.table.has_notifications:
            # An end without notification, as of a lease that a delete has taken away, is found a little later.
            wait = min(longest, LONGEST_PAUSE * (0.5 + self.table.random.random() / 2))
            try:
                await self.runner.request_unguarded(WatchLease(self.job.key, name, wait), wait)
                return None
            except LoaderFailed as error:
                return error
            except (CapabilityError, BadMessage):
                self.table.has_notifications = False
            except CacheError:
                pass  # The next question raises the error.
        if pause:
            await self.runner.pause(pause)
        return None

    async def _failure_of(self, name: str) -> LoaderFailed | None:
        """Return the error of another process' loader if its lease ended between two questions.

        The second question is granted the next lease then, though its callers waited for that load. The notification of the end
        comes on another connection, and a little later.
        """
        return await self._lease_end(name, 0.0, NOTIFICATION_DELAY) if self.table.has_notifications else None


def lease_of(reply: Loading | Stale | LeaseGranted) -> str:
    """Return the name of the lease under which another caller loads."""
    return reply.lease if isinstance(reply, Stale) else reply.token
