"""Loading: one load of a key in the whole fleet, shared by everybody who asks for it meanwhile.

Whoever misses asks the backend for the lease of the key. One caller of the fleet is granted it, and loads. To everybody
else the backend names the lease under which the key is being loaded; callers of one process share one `Flight` under that
name, whoever loads. So each caller's own question to the backend decides what it waits for, and none is ever given a value
whose load began before an invalidation that had returned when the caller asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cachebus.messages import (
    CacheError,
    CacheStampedeError,
    CacheTimeoutError,
    CapabilityError,
    Exists,
    Failed,
    Found,
    Get,
    LeaseGranted,
    Loaded,
    Missing,
    NotHeld,
    Overloaded,
    Present,
    Stale,
    StaleServed,
)

from .cached_errors import Remembered, seen
from .failures import MISSED
from .flight import ABANDONED, LATE, LEFT_OUT, Flight, Raised, Value, Values
from .landing import Group, Job, Start
from .load_options import LoadOptions
from .loaders import LeftOut, Loader, calls_for_one, check_loader, is_asynchronous
from .rounds import Rounds
from .watching import FIRST_PAUSE, LONGEST_PAUSE, Watches, name_of
from .ways import Way


class Flights(Watches):
    """The loads of one cache that are under way in this process, and how a caller comes to a value."""

    def forked(self) -> None:
        super().forked()
        self._leasing = True
        self._alone: dict[str, Flight] = {}
        self._rounds = Rounds()

    # A caller

    async def deliver(self, way: Way, job: Job, found: Found | Missing) -> Any:
        """The value, from what reading the key has found: as it is, loaded, or stale."""
        found = seen(found)
        if not isinstance(found, Found):
            if found is MISSED:
                return await self._load_alone(way, job, way.link.bus.clock.monotonic())
            _raise_again(found, job)
            return await self.fetch(way, job)
        options = job.options
        if isinstance(found, Loaded) and options.wants_refresh(found, self._chance):
            self._refresh(way, job, found)
        if options.idle_ttl is not None:
            self._prolong(way, job, found, options.idle_ttl)
        return found.value

    async def fetch(self, way: Way, job: Job, started: float | None = None) -> Any:
        """The value of a key that is missing, for a caller who has waited since `started`."""
        now = way.link.bus.clock.monotonic
        if started is None:
            started = now()
        pause = FIRST_PAUSE
        while True:
            stale: Stale | None = None
            start: Start | None = None
            leads = False
            told = ""
            if not self._leasing:
                flight, start = self._alone_flight(way, job, started)
                leads = start is not None
            else:
                try:
                    reply, leads = await (self._ask(way, job) if job.remote else self._ask_alone(way, job))
                except CapabilityError:
                    self._leasing = False
                    continue
                except Overloaded:
                    return await self._load_alone(way, job, started)
                if leads:
                    stale = reply.stale
                    flight = self.flights[reply.token]
                    start = self._start(way, job, flight, reply.token, stale, started)
                elif isinstance(reply, Found):
                    return reply.value
                elif isinstance(reply, NotHeld):
                    return await self._load_alone(way, job, started)
                elif isinstance(reply, Missing):
                    _raise_again(reply, job)
                    # What stands there cannot be read, and somebody is replacing it: nobody says when that is done.
                    if now() - started >= min(job.options.wait_limit, job.options.hard_timeout or math.inf):
                        return await self._load_alone(way, job, started)
                    await way.pause(pause * (0.5 + self._chance.random() / 2))
                    pause = min(pause * 1.5, LONGEST_PAUSE)
                    continue
                else:
                    stale = (
                        reply.stale if isinstance(reply, LeaseGranted) else reply if isinstance(reply, Stale) else None
                    )
                    told = name_of(reply)
                    flight, start = self._joined(way, job, told, started)
            outcome = await self._outcome(way, job.options, flight, start, leads, stale, started)
            if told and told not in flight.names and not (outcome is LATE or isinstance(outcome, Stale)):
                # It was asked for by the same question, and is not the lease that this caller was told of: one may have
                # been lost to an invalidation that had returned when this caller asked.
                continue
            if isinstance(outcome, Values):
                outcome = outcome.of(job.key)
            if isinstance(outcome, Value) and (leads or outcome.shared):
                return outcome.value
            if isinstance(outcome, Raised) and outcome.concerns(leads=leads):
                if stale is not None and isinstance(outcome.error, Exception):
                    return self._serve(way, stale, job.key)
                raise outcome.error
            if isinstance(outcome, Stale):
                return self._serve(way, outcome, job.key)
            if outcome is LATE:
                return await self._load_alone(way, job, started)
            if outcome is LEFT_OUT and leads:
                raise LeftOut(job.key)

    async def _ask(self, way: Way, job: Job) -> tuple[Any, bool]:
        """What the backend says to somebody who wants the lease of a key, and whether it is this caller who has got it."""
        reply, asked = await self._rounds.ask(way, job.key, lambda: self._ask_alone(way, job))
        return reply[0], reply[1] and asked

    async def _ask_alone(self, way: Way, job: Job) -> tuple[Any, bool]:
        token = self._token()
        # Listed before the lease is asked for: whoever asks in between is told its name, and must find it here.
        flight = self.flights[token] = Flight()
        try:
            reply = way.link.turn_lease(request := self._lease_request(job, token))
            if type(reply) is not LeaseGranted:
                reply = await self._lease(way, request, reply)
                if isinstance(reply, Remembered) and job.options.recalled(reply) is None:
                    # An exception that this caller did not ask for: to be loaded anew, in its place.
                    reply = await self._lease(way, self._lease_request(job, token, refresh=True))
            if isinstance(reply, LeaseGranted):
                self._granted(flight, token, reply.token)
        finally:
            if not flight.names:
                del self.flights[token]
                flight.land(ABANDONED)
        return reply, bool(flight.names)

    async def fetch_many(self, way: Way, keys: Sequence[str], load: Loader, options: LoadOptions) -> dict[str, Any]:
        """The values of keys that are missing: those that nobody loads by one call of `load`, the others as they come."""
        check_loader(load)
        started = way.link.bus.clock.monotonic()
        asynchronous = is_asynchronous(load)
        jobs = {
            key: Job(key, calls_for_one(load, key), options, options.tags, asynchronous=asynchronous, remote=True)
            for key in keys
        }
        flight = Flight()
        asked = {key: self._token() for key in jobs}
        self.flights.update(dict.fromkeys(asked.values(), flight))
        try:
            replies = await self._lease_many(way, jobs, asked)
        except BaseException:
            self._ended_many(way, jobs, flight, asked)
            raise
        tokens: dict[str, str | None] = {
            key: reply.token for key, reply in replies.items() if isinstance(reply, LeaseGranted)
        }
        flight.names = frozenset(token for token in tokens.values() if token)
        self.flights.update(dict.fromkeys(flight.names, flight))
        for token in asked.values():
            if token not in flight.names:
                self.flights.pop(token, None)
        values = {key: reply.value for key, reply in replies.items() if isinstance(reply, Found)}
        stale = {key: reply.stale for key, reply in replies.items() if isinstance(reply, LeaseGranted) and reply.stale}
        group = Group(load, stale)
        # What could not be leased is loaded with the rest; it is stored only where the store has no leases at all.
        unleased = None if self._leasing else ""
        tokens |= {key: unleased for key, reply in replies.items() if reply is None}
        ours = {key: jobs[key] for key in jobs if key in tokens}
        if ours:
            values |= await self._load_many(way, ours, flight, tokens, group, started)
        for key in [each for each in jobs if each not in values and each not in ours]:
            try:
                values[key] = await self.fetch(way, jobs[key], started)
            except LeftOut:
                continue
        return {key: values[key] for key in keys if key in values}

    async def _lease_many(self, way: Way, jobs: dict[str, Job], tokens: dict[str, str]) -> dict[str, Any]:
        """The replies by key; `None` for those that cannot be leased."""
        if not self._leasing:
            return dict.fromkeys(jobs)
        replies: dict[str, Any] = {}
        asked = await way.ask_all([self._lease_request(job, tokens[key]) for key, job in jobs.items()])
        for key, reply in zip(jobs, asked, strict=True):
            error = reply.error() if isinstance(reply, Failed) else None
            if isinstance(error, CapabilityError):
                self._leasing = False
            elif error is not None and not isinstance(error, Overloaded):
                raise error
            if isinstance(reply, NotHeld):
                self._give_back(way, key, tokens[key])
            replies[key] = None if error is not None or isinstance(reply, NotHeld) else reply
        return replies

    async def _load_many(
        self,
        way: Way,
        jobs: dict[str, Job],
        flight: Flight,
        tokens: dict[str, str | None],
        group: Group,
        started: float,
    ) -> dict[str, Any]:
        options = next(iter(jobs.values())).options

        def begin() -> None:
            for key, token in tokens.items():
                if token:
                    self.renewals.hold(way.link, key, token, options.lease_ttl)
            way.beside(
                flight,
                lambda way: self._fly_many(way, jobs, flight, tokens, started, group),
                lambda: self._ended_many(way, jobs, flight, tokens),
                alone=options.soft_timeout is not None or options.hard_timeout is not None,
            )

        start = Start(begin, lambda: self._ended_many(way, jobs, flight, tokens))
        # Served stale all together or not at all: their values come from one call.
        stale = group.stale.get(next(iter(jobs))) if len(group.stale) == len(jobs) else None
        outcome = await self._outcome(way, options, flight, start, True, stale, started)
        if isinstance(outcome, Raised) and not (stale is not None and isinstance(outcome.error, Exception)):
            raise outcome.error
        if isinstance(outcome, Raised | Stale):
            return {key: self._serve(way, each, key) for key, each in group.stale.items()}
        if not isinstance(outcome, Values):
            raise CacheError("the load was broken off")
        return {key: value.value for key, value in outcome.by_key.items()}

    def _ended_many(self, way: Way, jobs: dict[str, Job], flight: Flight, tokens: Mapping[str, str | None]) -> None:
        for token in tokens.values():
            if token:
                self._forget(token)
        if not flight.landed:
            for key, job in jobs.items():
                self._give_back(way, job.key, tokens[key])
            flight.land(ABANDONED)

    async def _outcome(
        self,
        way: Way,
        options: LoadOptions,
        flight: Flight,
        start: Start | None,
        leads: bool,
        stale: Stale | None,
        started: float,
    ) -> Any:
        """What comes of a flight; the stale value, if that is to be served; `LATE`, if the caller is to load by itself."""
        if leads and options.soft_timeout is None and options.hard_timeout is None:
            try:
                return await way.wait(flight, None, begin=start)
            finally:
                if start is not None and not start.begun:
                    start.call_off()
        timeout, why = self._patience(way, options, leads, stale, started)
        try:
            if timeout == 0.0 and why == "soft":
                if start is not None:
                    flight.keep()
                    start()
                return stale
            # Who has waited for as long as it may does not begin to wait for one more.
            if timeout != 0.0 or why != "wait":
                outcome = await way.wait(flight, timeout, keep=why != "wait", begin=start)
                if outcome is not LATE:
                    return outcome
        finally:
            if start is not None:
                start.call_off()
        if why == "soft" or (stale is not None and (why == "hard" or options.wait == "stale")):
            return stale
        if why == "hard":
            raise CacheTimeoutError("the loader has not returned", way.link.address, options.hard_timeout or 0.0)
        if options.wait == "raise":
            raise CacheStampedeError(f"somebody else has been loading the key for {options.wait_limit:g} s")
        return LATE

    def _patience(
        self, way: Way, options: LoadOptions, leads: bool, stale: Stale | None, started: float
    ) -> tuple[float | None, str]:
        """How long the caller waits, and what for: `soft`, `hard` or `wait` is the limit that comes first."""
        spent = way.link.bus.clock.monotonic() - started
        if not leads and options.hard_timeout is None and (stale is None or options.soft_timeout is None):
            return max(0.0, options.wait_limit - spent), "wait"
        limits: list[tuple[float, str]] = []
        if options.soft_timeout is not None and stale is not None:
            limits.append((max(0.0, options.soft_timeout - spent), "soft"))
        if options.hard_timeout is not None:
            limits.append((max(0.0, options.hard_timeout - spent), "hard"))
        if not leads:
            limits.append((max(0.0, options.wait_limit - spent), "wait"))
        return min(limits, default=(None, ""))

    def _serve(self, way: Way, stale: Stale, key: str) -> Any:
        emitter = way.link.emitter
        if StaleServed in emitter.audience.kinds:
            emitter.emit(StaleServed(key=key))
        return stale.value

    # Without a lease

    async def _load_alone(self, way: Way, job: Job, started: float) -> Any:
        """Load for this caller only, and store nothing: somebody else may be doing so."""
        flight = Flight()

        def begin() -> None:
            way.beside(
                flight,
                lambda way: self._fly(way, job, flight, None, None, started),
                ended,
                alone=job.options.hard_timeout is not None,
            )

        def ended() -> None:
            flight.land(ABANDONED)

        outcome = await self._outcome(way, job.options, flight, Start(begin, ended), True, None, started)
        if isinstance(outcome, Raised):
            raise outcome.error
        if not isinstance(outcome, Value):
            raise CacheError("the load was broken off")
        return outcome.value

    def _alone_flight(self, way: Way, job: Job, started: float) -> tuple[Flight, Start | None]:
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
                    if isinstance(again, Remembered) and (error := job.options.recalled(again)) is not None:
                        flight.land(Raised(error))
                        return
            except CacheError as error:
                flight.land(Raised(error))
                return
            await self._fly(way, job, flight, "", None, started)

        options = job.options
        alone = options.soft_timeout is not None or options.hard_timeout is not None
        return flight, Start(lambda: way.beside(flight, work, ended, alone=alone), ended)


def _raise_again(missing: Missing, job: Job) -> None:
    """Raise what the loader raised, if that was kept and this caller asks for it."""
    if isinstance(missing, Remembered) and (error := job.options.recalled(missing)) is not None:
        raise error
