"""Lease follower: waits for a load of another process, on behalf of all callers of this process."""

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
"""First and longest pause between polls of a store that cannot hold a waiting request, in seconds.

A store that notifies of the end of a lease is asked after the notification, or after the longest pause.
"""

NOTIFICATION_DELAY = 0.02
"""Longest delay, in seconds, of the notification of a lease's end after the grant of the next lease."""


class LeaseFollower(Struct, eq=False):
    """Follower of another process' load under the lease `theirs`. If that load never finishes, it loads itself."""

    table: LoadTable
    runner: Runner
    job: LoadJob
    theirs: str
    started: float
    in_flight: InFlightLoad
    is_started: bool = False
    _outcome: Any = CANCELLED

    def start(self) -> None:
        """Start following the load in the background."""
        self.runner.start(self, background=True)
        self.is_started = True

    def end(self) -> None:
        """Stop following. Without an outcome, the callers ask the backend again."""
        if self.table.in_flight.get(self.theirs) is self.in_flight:
            del self.table.in_flight[self.theirs]
        self.in_flight.resolve(self._outcome)

    async def run(self) -> None:
        """Follow the lease and resolve the load with its outcome. Without an outcome, the callers ask again."""
        try:
            self._outcome = await self._follow()
        finally:
            self.end()

    async def _follow(self) -> Any:
        runner, job = self.runner, self.job
        pause = FIRST_PAUSE
        name = self.theirs
        now = runner.client.bus.clock.monotonic
        # Before the first lease request, because until the lease ends, the reply would only name the same lease.
        if (failed := await self._lease_end(name, 0.0, job.options.wait_limit)) is not None:
            return Raised(failed)
        while (patience := self.started + job.options.wait_limit - now()) > 0:
            load = LeasedLoad(self.table, runner, job, now(), self.in_flight, next(self.table.tokens))
            try:
                reply = await load.ask(wait=patience, after=name)
            except LoaderFailed as error:
                return Raised(error)
            except CacheError:
                break  # The callers ask again and get the error themselves.
            if isinstance(reply, Found):
                return Value(reply.value)
            if isinstance(reply, LeaseGranted):
                return await self._take_over(load, name)
            if isinstance(reply, NotHeld | CachedFailure):
                break  # Handled like a failed request.
            seconds = pause * (0.5 + self.table.random.random() / 2)
            if isinstance(reply, Missing):
                await runner.pause(seconds)
            elif (name := lease_of(reply)) != self.theirs and self.table.find(name) is not None:
                break  # A caller of this process is loading now. The others ask again and join it.
            else:
                left = min(patience, max(reply.remaining, FIRST_PAUSE))
                if (failed := await self._lease_end(name, seconds, left)) is not None:
                    return Raised(failed)
            pause = min(pause * 1.5, LONGEST_PAUSE)
        return CANCELLED

    async def _take_over(self, load: LeasedLoad, before: str) -> Any:
        """Load under the granted lease, unless the loader of the previous lease, `before`, has failed."""
        load.keep_lease()
        try:
            failed = await self._failure_of(before)
            if failed is None:
                await load.run()
            else:
                # The failure does not concern callers that got the name of the new lease.
                load.in_flight.lease_names.discard(load.lease or "")
                load.outcome = Raised(failed)
            return load.outcome
        finally:
            load.end()  # Even if all callers have gone.

    async def _lease_end(self, name: str, pause: float, longest: float) -> LoaderFailed | None:
        """Wait for the end of another process' lease: for a notification of the store, or else for `pause` seconds.

        Returns the error of the loader, if it failed and the store reports that.
        """
        if self.table.has_notifications:
            # Some ends have no notification, such as a revocation by a delete; the limit on the wait covers them.
            wait = min(longest, LONGEST_PAUSE * (0.5 + self.table.random.random() / 2))
            try:
                await self.runner.request_unguarded(WatchLease(self.job.key, name, wait), wait)
                return None
            except LoaderFailed as error:
                return error
            except (CapabilityError, BadMessage):
                self.table.has_notifications = False
            except CacheError:
                pass  # The next lease request raises the error.
        if pause:
            await self.runner.pause(pause)
        return None

    async def _failure_of(self, name: str) -> LoaderFailed | None:
        """Return the error of another process' loader if its lease ended between two lease requests.

        The second request is then granted the next lease, although its callers waited for the load that failed. The
        notification of the end arrives on another connection, slightly later.
        """
        return await self._lease_end(name, 0.0, NOTIFICATION_DELAY) if self.table.has_notifications else None


def lease_of(reply: Loading | Stale | LeaseGranted) -> str:
    """Return the name of the lease under which the key is being loaded."""
    return reply.lease if isinstance(reply, Stale) else reply.token
