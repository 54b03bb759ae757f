"""Loading: one load of a key in the whole fleet, shared by everybody who asks for it meanwhile.

Whoever misses asks the backend for the lease of the key. One caller of the fleet is granted it, and loads. To everybody
else the backend names the lease under which the key is being loaded; callers of one process share one `Flight` under that
name, whoever loads. So each caller's own question to the backend decides what it waits for, and none is ever given a value
whose load began before an invalidation that had returned when the caller asked.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Callable
from typing import Any

from cachebus.messages import (
    CacheClosed,
    CacheError,
    CacheStampedeError,
    CacheTimeoutError,
    CapabilityError,
    Exists,
    Found,
    Get,
    GetOrLease,
    LeaseGranted,
    LeaseLost,
    Loaded,
    LoaderFailed,
    Loading,
    Missing,
    NotStored,
    Overloaded,
    Present,
    Release,
    Set,
    Stale,
    StaleServed,
    Touch,
)

from .checks import check_tags
from .flight import ABANDONED, LATE, Flight, Raised, Value, carry_loads, loads_of_this_context
from .load_options import LoadOptions
from .load_report import LoadReport
from .loaders import LoadContext, Loader, LoadResult, with_arguments
from .renewals import Renewals
from .ways import Way

logger = logging.getLogger("cachebus")

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.25
"""Seconds between two questions to a store that cannot let a caller wait: the first pause, and the longest."""


class Job:
    """A key to be loaded: how, and with which tags. `call` calls `loader` with what it wants to know."""

    __slots__ = ("call", "key", "loader", "options", "tags")

    def __init__(
        self,
        key: str,
        loader: object,
        call: Callable[[LoadContext], Any],
        options: LoadOptions,
        tags: tuple[str, ...],
    ) -> None:
        self.key = key
        self.loader = loader
        self.call = call
        self.options = options
        self.tags = tags


class Flights:
    """The loads of one cache that are under way in this process, and how a caller comes to a value."""

    def __init__(self) -> None:
        self._chance = random.Random()
        self.renewals = Renewals()
        self.forked()

    def forked(self) -> None:
        """Forget what stayed behind in the parent, with whoever was to land it."""
        self._owner = f"{os.getpid()}-{os.urandom(6).hex()}"
        self._numbers = itertools.count(1)
        self._leasing = True
        self.flights: dict[str, Flight] = {}
        self._alone: dict[str, Flight] = {}
        self._refreshing: set[str] = set()
        self.renewals = Renewals()

    # A caller

    async def deliver(self, way: Way, job: Job, found: Found | Missing) -> Any:
        """The value, from what reading the key has found: as it is, loaded, or stale."""
        if not isinstance(found, Found):
            return await self.fetch(way, job)
        options = job.options
        if isinstance(found, Loaded) and options.wants_refresh(found, self._chance):
            self._refresh(way, job, found)
        if options.idle_ttl is not None:
            self._prolong(way, job, found, options.idle_ttl)
        return found.value

    async def fetch(self, way: Way, job: Job) -> Any:
        """The value of a key that is missing."""
        now = way.link.bus.clock.monotonic
        started = now()
        while True:
            stale: Stale | None = None
            begin: Callable[[], None] | None = None
            leads = False
            if not self._leasing:
                flight, begin = self._alone_flight(way, job, started)
                leads = begin is not None
            else:
                token = self._token()
                # Listed before the lease is asked for: whoever asks in between is told its name, and must find it here.
                flight = self.flights[token] = Flight()
                try:
                    reply = await self._lease(way, job, token)
                    leads = isinstance(reply, LeaseGranted)
                except CapabilityError:
                    self._leasing = False
                    continue
                except Overloaded:
                    return await self._load_alone(way, job, started)
                finally:
                    if not leads:
                        del self.flights[token]
                        flight.land(ABANDONED)
                match reply:
                    case Found():
                        return reply.value
                    case LeaseGranted():
                        stale = reply.stale
                        begin = self._beginning(way, job, flight, token, stale, started)
                    case Loading() | Stale():
                        stale = reply if isinstance(reply, Stale) else None
                        flight, begin = self._joined(way, job, name_of(reply), started)
            outcome = await self._outcome(way, job, flight, begin, leads, stale, started)
            if isinstance(outcome, Value) and (leads or outcome.shared):
                return outcome.value
            if isinstance(outcome, Raised):
                if stale is not None:
                    return self._serve(way, stale, job)
                raise outcome.error
            if isinstance(outcome, Stale):
                return self._serve(way, outcome, job)
            if outcome is LATE:
                return await self._load_alone(way, job, started)

    async def _outcome(
        self,
        way: Way,
        job: Job,
        flight: Flight,
        begin: Callable[[], None] | None,
        leads: bool,
        stale: Stale | None,
        started: float,
    ) -> Any:
        """What comes of a flight; the stale value, if that is to be served; `LATE`, if the caller is to load by itself."""
        options = job.options
        spent = way.link.bus.clock.monotonic() - started
        limits: list[tuple[float, str]] = []
        if options.soft_timeout is not None and stale is not None:
            limits.append((max(0.0, options.soft_timeout - spent), "soft"))
        if options.hard_timeout is not None:
            limits.append((max(0.0, options.hard_timeout - spent), "hard"))
        if not leads:
            limits.append((max(0.0, options.wait_limit - spent), "wait"))
        timeout, why = min(limits, default=(None, ""))
        if timeout == 0.0 and stale is not None and why == "soft":
            if begin is not None:
                flight.keep()
                begin()
            return stale
        outcome = await way.wait(flight, timeout, keep=why != "wait", begin=begin)
        if outcome is not LATE:
            return outcome
        if why == "soft" or (stale is not None and (why == "hard" or options.wait == "stale")):
            return stale
        if why == "hard":
            raise CacheTimeoutError("the loader has not returned", way.link.address, options.hard_timeout or 0.0)
        if options.wait == "raise":
            raise CacheStampedeError(f"somebody else has been loading the key for {options.wait_limit:g} s")
        return LATE

    def _serve(self, way: Way, stale: Stale, job: Job) -> Any:
        emitter = way.link.emitter
        if StaleServed in emitter.audience.kinds:
            emitter.emit(StaleServed(key=job.key))
        return stale.value

    # Leases

    def _token(self) -> str:
        return f"{self._owner}-{next(self._numbers)}"

    async def _lease(self, way: Way, job: Job, token: str, wait: float = 0.0, *, refresh: bool = False) -> Any:
        request = GetOrLease(job.key, self._owner, token, job.options.lease_ttl, wait, job.tags, refresh)
        try:
            return await way.ask(request, wait)
        except (CapabilityError, CacheClosed):
            raise
        except BaseException:
            # It may be granted all the same, to nobody.
            self._give_back(way, job, token)
            raise

    def _give_back(self, way: Way, job: Job, token: str, error: str = "", late: Found | None = None) -> None:
        way.link.bus.send(way.link.address, Release(job.key, token, error, late))

    # Loading

    def _beginning(
        self, way: Way, job: Job, flight: Flight, token: str, stale: Stale | None, started: float
    ) -> Callable[[], None]:
        """What starts the load under a lease that was granted."""
        options = job.options
        alone = options.soft_timeout is not None or options.hard_timeout is not None

        def begin() -> None:
            self.renewals.hold(way.link, job.key, token, options.lease_ttl)
            context = self._context(job, stale, started)
            way.beside(
                flight,
                lambda way: self._fly(way, job, flight, token, context),
                lambda: self._ended(way, job, flight, token),
                alone=alone,
            )

        return begin

    def _ended(self, way: Way, job: Job, flight: Flight, token: str) -> None:
        self._forget(token)
        if not flight.landed:
            self._give_back(way, job, token)
            flight.land(ABANDONED)

    def _forget(self, token: str) -> None:
        self.renewals.let_go(token)
        self.flights.pop(token, None)

    async def _fly(self, way: Way, job: Job, flight: Flight, token: str | None, context: LoadContext) -> None:
        """Call the loader and land its flight. With a `token`, store what it brings."""
        outcome: Any
        try:
            with carry_loads((*loads_of_this_context(), flight.load)):
                report = LoadReport(way.link, job.key)
                with report:
                    loaded = await way.call(lambda: job.call(context), job.loader)
            result = (loaded if isinstance(loaded, LoadResult) else LoadResult(loaded)).resolved(context)
            outcome = Value(result.value)
            if token is not None:
                outcome = await self._keep(way, job, token, result, report.duration)
        except Exception as error:
            outcome = Raised(error)
            if token:
                self._give_back(way, job, token, type(error).__name__)
        if token:
            self._forget(token)
        flight.land(outcome)

    async def _keep(self, way: Way, job: Job, token: str, result: LoadResult, load_time: float) -> Value:
        """Store a loaded value under its lease; `""` is that of a store without leases."""
        more = check_tags(result.tags)
        tags = tuple(dict.fromkeys((*job.tags, *more)))
        declared = len(tags) == len(job.tags)
        late = Found(result.value, tags=tags)
        if not result.store:
            if token:
                self._give_back(way, job, token, "", late if declared else None)
            return Value(result.value, shared=declared)
        ttl = job.options.time_to_live(result, self._chance)
        request = Set(job.key, result.value, ttl, tags, None, token or None, job.options.origin(load_time, result))
        try:
            reply = await way.ask(request)
        except CacheClosed:
            raise
        except CacheError as error:
            logger.warning("a loaded value was not stored: %s", error.code)
            if token:
                self._give_back(way, job, token, "", late if declared else None)
            return Value(result.value, shared=declared)
        if isinstance(reply, NotStored):
            if LeaseLost in way.link.emitter.audience.kinds:
                way.link.emitter.emit(LeaseLost(key=job.key))
            return Value(result.value, shared=declared)
        return Value(result.value)

    def _context(self, job: Job, stale: Stale | Loaded | None, started: float) -> LoadContext:
        hard = job.options.hard_timeout
        deadline = None if hard is None else started + hard
        if stale is None:
            return LoadContext(job.key, job.tags, deadline=deadline)
        return LoadContext(job.key, job.tags, True, stale.value, stale.etag, deadline)

    # Waiting for somebody else

    def _joined(self, way: Way, job: Job, theirs: str, started: float) -> tuple[Flight, Callable[[], None] | None]:
        """The flight of a load that is under way; where it is another process's, with what starts to wait for it on
        behalf of everybody in this one."""
        mine = Flight()
        flight = self.flights.setdefault(theirs, mine)
        if flight is not mine:
            return flight, None

        def ended() -> None:
            if self.flights.get(theirs) is flight:
                del self.flights[theirs]
            flight.land(ABANDONED)

        return flight, lambda: way.beside(
            flight, lambda way: self._watch(way, job, flight, theirs, started), ended, alone=True
        )

    async def _watch(self, way: Way, job: Job, flight: Flight, theirs: str, started: float) -> None:
        pause = FIRST_PAUSE
        now = way.link.bus.clock.monotonic
        while (patience := started + job.options.wait_limit - now()) > 0:
            token = self._token()
            self.flights[token] = flight
            granted = False
            try:
                reply = await self._lease(way, job, token, patience)
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
                self.renewals.hold(way.link, job.key, token, job.options.lease_ttl)
                try:
                    await self._fly(way, job, flight, token, self._context(job, reply.stale, now()))
                finally:
                    self._ended(way, job, flight, token)
                return
            if (name := name_of(reply)) != theirs and name in self.flights:
                return  # A caller of this process loads by now: who waits here asks again, and joins it.
            await way.pause(pause * (0.5 + self._chance.random() / 2))
            pause = min(pause * 1.5, LONGEST_PAUSE)

    # Without a lease

    async def _load_alone(self, way: Way, job: Job, started: float) -> Any:
        """Load for this caller only, and store nothing: somebody else may be doing so."""
        flight = Flight()
        context = self._context(job, None, started)

        def begin() -> None:
            way.beside(
                flight,
                lambda way: self._fly(way, job, flight, None, context),
                lambda: flight.land(ABANDONED),
                alone=job.options.hard_timeout is not None,
            )

        outcome = await self._outcome(way, job, flight, begin, True, None, started)
        if isinstance(outcome, Raised):
            raise outcome.error
        if not isinstance(outcome, Value):
            raise CacheError("the load was broken off")
        return outcome.value

    def _alone_flight(self, way: Way, job: Job, started: float) -> tuple[Flight, Callable[[], None] | None]:
        """The flight of a key in a store that knows no leases: one for each process."""
        mine = Flight()
        flight = self._alone.setdefault(job.key, mine)
        if flight is not mine:
            return flight, None

        def ended() -> None:
            self._alone.pop(job.key, None)
            flight.land(ABANDONED)

        async def work(way: Way) -> None:
            # Looked up again: another flight may have landed between the miss and this one's start. Asked whether it
            # exists first, which counts neither as hit nor as miss.
            try:
                if isinstance(await way.ask(Exists(job.key)), Present):
                    again = await way.ask(Get(job.key))
                    if isinstance(again, Found):
                        flight.land(Value(again.value))
                        return
            except CacheError as error:
                flight.land(Raised(error))
                return
            await self._fly(way, job, flight, "", self._context(job, None, started))

        options = job.options
        alone = options.soft_timeout is not None or options.hard_timeout is not None
        return flight, lambda: way.beside(flight, work, ended, alone=alone)

    # Hits that are not only read

    def _refresh(self, way: Way, job: Job, found: Loaded) -> None:
        """Load a live value anew, beside whoever has read it, unless somebody does so already."""
        key = job.key
        if key in self._refreshing or not self._leasing:
            return
        self._refreshing.add(key)
        flight = Flight()
        flight.keep()
        token = self._token()
        self.flights[token] = flight

        async def work(way: Way) -> None:
            try:
                reply = await self._lease(way, job, token, refresh=True)
            except CacheError:
                return
            if isinstance(reply, LeaseGranted):
                self.renewals.hold(way.link, key, token, job.options.lease_ttl)
                started = way.link.bus.clock.monotonic()
                await self._fly(way, job, flight, token, self._context(job, found, started))
            else:
                flight.land(ABANDONED)

        def ended() -> None:
            self._refreshing.discard(key)
            self._ended(way, job, flight, token)

        way.beside(flight, work, ended, alone=True)

    def _prolong(self, way: Way, job: Job, found: Found, idle_ttl: float) -> None:
        """Let a value that was read live on, up to its cap. Not on each read: when half of its idle time is over."""
        if found.ttl is None or found.ttl > idle_ttl / 2 or not isinstance(job.options.ttl, float):
            return
        cap = found.stored_at + job.options.ttl - way.link.bus.clock.wall()
        if (ttl := min(idle_ttl, cap)) > found.ttl:
            way.link.bus.send(way.link.address, Touch(job.key, ttl))


def job_of(key: str, loader: Loader, options: LoadOptions) -> Job:
    """The job of loading a key with a loader that may want to know more."""
    if not callable(loader):
        raise TypeError(f"a loader must be callable, not {loader!r}")
    return Job(key, loader, lambda context: with_arguments(loader, context)(), options, options.tags)


def name_of(reply: Loading | Stale) -> str:
    """The name of the lease under which somebody else loads."""
    return reply.token if isinstance(reply, Loading) else reply.lease
