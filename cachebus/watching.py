"""Waiting for another process's load, and loading a live value anew."""

from __future__ import annotations

from cachebus.messages import (
    BadMessage,
    CacheError,
    CapabilityError,
    Found,
    LeaseGranted,
    Loaded,
    LoaderFailed,
    Loading,
    Missing,
    NotHeld,
    Stale,
    Touch,
    WatchLease,
)
from cachebus.messages.lease_names import asked_as

from .cached_errors import Remembered
from .flight import ABANDONED, Flight, Raised, Value
from .landing import Job, Landings, Start
from .ways import Way

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.25
"""Seconds between two questions to a store that does not let a caller wait: the first pause, and the longest. Where the
store tells the end of a lease it is asked after that, or after the longest."""

HEARD_LATE = 0.02
"""Seconds by which the end of a lease may be heard after the next lease was granted."""


class Watches(Landings):
    """The loads of one cache, and what it waits for that others load."""

    def forked(self) -> None:
        super().forked()
        self._refreshing: set[str] = set()
        self._told = True

    # Waiting for somebody else

    def _joined(self, way: Way, job: Job, theirs: str, started: float) -> tuple[Flight, Start | None]:
        """The flight of a load that is under way; where it is another process's, with what starts to wait for it on
        behalf of everybody in this one."""
        if (known := self._flight_of(theirs)) is not None:
            return known, None
        mine = Flight()
        mine.names = (theirs,)
        flight = self.flights.setdefault(theirs, mine)
        if flight is not mine:
            return flight, None

        def ended() -> None:
            if self.flights.get(theirs) is flight:
                del self.flights[theirs]
            flight.land(ABANDONED)

        def begin() -> None:
            way.beside(flight, lambda way: self._watch(way, job, flight, theirs, started), ended, alone=True)

        return flight, Start(begin, ended)

    def _flight_of(self, name: str) -> Flight | None:
        """The flight under a lease, or the one that may come to be: somebody of this process has asked for it, and has no
        answer yet."""
        return self.flights.get(name) or self.flights.get(asked_as(name))

    async def _watch(self, way: Way, job: Job, flight: Flight, theirs: str, started: float) -> None:
        pause = FIRST_PAUSE
        name = theirs
        now = way.link.bus.clock.monotonic
        # Asked first, because a store that tells the end of a lease would answer every question before that in vain.
        if (failed := await self._ended_elsewhere(way, job, theirs, 0.0, job.options.wait_limit)) is not None:
            flight.land(Raised(failed))
            return
        while (patience := started + job.options.wait_limit - now()) > 0:
            token = self._token()
            self.flights[token] = flight
            granted = False
            try:
                reply = await self._lease(way, self._lease_request(job, token, patience, after=name))
                granted = isinstance(reply, LeaseGranted)
            except LoaderFailed as error:
                flight.land(Raised(error))
                return
            except CacheError:
                return  # Who waits asks again, and is told what is wrong.
            finally:
                if not granted:
                    self.flights.pop(token, None)
            if isinstance(reply, Found):
                flight.land(Value(reply.value))
                return
            if isinstance(reply, LeaseGranted):
                loads = False
                try:
                    failed = await self._failed(way, job, name)
                    loads = failed is None
                finally:
                    if not loads:  # Also where everybody has stopped waiting meanwhile.
                        self.flights.pop(token, None)
                        self._give_back(way, job.key, reply.token)
                if failed is not None:
                    flight.land(Raised(failed))
                    return
                self._granted(flight, token, reply.token)
                self.renewals.hold(way.link, job.key, reply.token, job.options.lease_ttl)
                try:
                    await self._fly(way, job, flight, reply.token, reply.stale, now())
                finally:
                    self._ended(way, job, flight, reply.token)
                return
            if isinstance(reply, NotHeld | Remembered):
                return  # As where the question failed.
            seconds = pause * (0.5 + self._chance.random() / 2)
            if isinstance(reply, Missing):
                await way.pause(seconds)
            elif (name := name_of(reply)) != theirs and self._flight_of(name) is not None:
                return  # A caller of this process loads by now: who waits here asks again, and joins it.
            else:
                left = min(patience, max(reply.remaining, FIRST_PAUSE))
                if (failed := await self._ended_elsewhere(way, job, name, seconds, left)) is not None:
                    flight.land(Raised(failed))
                    return
            pause = min(pause * 1.5, LONGEST_PAUSE)

    async def _ended_elsewhere(self, way: Way, job: Job, name: str, pause: float, left: float) -> LoaderFailed | None:
        """Wait for the end of a lease that another process holds: until the store tells, where it can, or for `pause`
        seconds. It may say that the loader has failed."""
        if self._told:
            # An end that is not told, as that of a lease that a delete has taken away, is found a little later.
            wait = min(left, LONGEST_PAUSE * (0.5 + self._chance.random() / 2))
            try:
                await way.probe(WatchLease(job.key, name, wait), wait)
                return None
            except LoaderFailed as error:
                return error
            except (CapabilityError, BadMessage):
                self._told = False
            except CacheError:
                pass  # Whatever is wrong: the next question says it.
        if pause:
            await way.pause(pause)
        return None

    async def _failed(self, way: Way, job: Job, name: str) -> LoaderFailed | None:
        """What a loader of another process has failed with, if its lease ended between two questions: then the second one is
        granted to us, who waited for that load. A store that tells the end does so by another way, and a little later."""
        return await self._ended_elsewhere(way, job, name, 0.0, HEARD_LATE) if self._told else None

    # Hits that are not only read

    def _refresh(self, way: Way, job: Job, found: Loaded) -> None:
        """Load a live value anew, beside whoever has read it, unless somebody does so already."""
        key = job.key
        if key in self._refreshing:
            return
        self._refreshing.add(key)
        flight = Flight()
        flight.keep()
        token = self._token()
        self.flights[token] = flight

        async def work(way: Way) -> None:
            try:
                reply = await self._lease(way, self._lease_request(job, token, refresh=True))
            except CacheError:
                return
            if isinstance(reply, LeaseGranted):
                self._granted(flight, token, reply.token)
                self.renewals.hold(way.link, key, reply.token, job.options.lease_ttl)
                started = way.link.bus.clock.monotonic()
                await self._fly(way, job, flight, reply.token, found, started)
            else:
                flight.land(ABANDONED)

        def ended() -> None:
            self._refreshing.discard(key)
            for name in flight.names or (token,):
                self._ended(way, job, flight, name)

        way.beside(flight, work, ended, alone=True)

    def _prolong(self, way: Way, job: Job, found: Found, idle_ttl: float) -> None:
        """Let a value that was read live on, up to its cap. Not on each read: when half of its idle time is over."""
        if found.ttl is None or found.ttl > idle_ttl / 2 or (cap := job.options.cap(found.value)) is None:
            return
        now = way.link.epoch + way.link.bus.clock.monotonic()
        if (ttl := min(idle_ttl, found.stored_at + cap - now)) > found.ttl:
            way.link.send(Touch(job.key, ttl))


def name_of(reply: Loading | Stale | LeaseGranted) -> str:
    """The name of the lease under which somebody else loads."""
    return reply.lease if isinstance(reply, Stale) else reply.token
