"""Landing: calling a loader under a lease, and storing what it brings, if nothing has overtaken it."""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

from cachebus.messages import (
    CacheClosed,
    CacheError,
    CapabilityError,
    Failed,
    Found,
    GetOrLease,
    Loaded,
    LoaderFailed,
    LoadLeaseLost,
    LoadMetadata,
    NotHeld,
    NotStored,
    ReleaseLease,
    Reply,
    Set,
    Stale,
    Stored,
)

from .flight import (
    ABANDONED,
    LEFT_OUT,
    Flight,
    OnBehalfOf,
    Raised,
    Value,
    Values,
    loads_of_this_context,
)
from .load_options import LoadOptions
from .load_report import LoadReport
from .loaders import (
    Bare,
    LeftOut,
    LoadContext,
    Loader,
    LoadResult,
    as_mapping,
    as_result,
    check_loader,
    is_asynchronous,
    kind_of,
)
from .renewals import Renewals
from .ways import Way

logger = logging.getLogger("cachebus")

_NO_TURN: Any = object()


class Job:
    """A key to be loaded: how, and with which tags. `call` calls the loader, `asynchronous` if it is a coroutine function,
    with what it wants to know if it is `told`; `remote` says that the backend's answers take their time."""

    __slots__ = ("asynchronous", "call", "key", "options", "remote", "tags", "told")

    def __init__(
        self,
        key: str,
        call: Callable[[Any], Any],
        options: LoadOptions,
        tags: tuple[str, ...],
        *,
        asynchronous: bool,
        remote: bool,
        told: bool = False,
    ) -> None:
        self.asynchronous = asynchronous
        self.remote = remote
        self.told = told
        self.key = key
        self.call = call
        self.options = options
        self.tags = tags


def job_of(key: str, loader: Loader, options: LoadOptions, *, remote: bool) -> Job:
    """The job of loading a key with a loader that may want to know more."""
    check_loader(loader)
    told, asynchronous = kind_of(loader)

    def untold(context: object) -> Any:
        return loader()

    call = loader if told else untold
    return Job(key, call, options, options.tags, asynchronous=asynchronous, remote=remote, told=told)


class Group:
    """The keys of a `get_or_load_many` that are loaded together: how, and what may be served instead."""

    __slots__ = ("load", "stale")

    def __init__(self, load: Loader, stale: Mapping[str, Stale]) -> None:
        self.load = load
        self.stale = stale


class Start:
    """What begins a flight that is listed already. `call_off` ends it if that did not happen, so that nobody who has found
    it there waits for ever."""

    __slots__ = ("_begin", "_ended", "begun")

    def __init__(self, begin: Callable[[], None], ended: Callable[[], None]) -> None:
        self._begin = begin
        self._ended = ended
        self.begun = False

    def __call__(self) -> None:
        self.begun = True
        self._begin()

    def call_off(self) -> None:
        """End the flight, if it was not begun."""
        if not self.begun:
            self._ended()


class Landings:
    """The loads of one cache that are under way in this process, by the names of their leases; while a question for a lease
    has no answer, by what is asked for."""

    def __init__(self) -> None:
        self._chance = random.Random()
        self.forked()

    def forked(self) -> None:
        """Forget what stayed behind in the parent, with whoever was to land it."""
        self._owner = f"{os.getpid()}-{os.urandom(6).hex()}"
        self._numbers = itertools.count(1)
        self.flights: dict[str, Flight] = {}
        self.renewals = Renewals()

    # Leases

    def _token(self) -> str:
        return f"{self._owner}-{next(self._numbers)}"

    async def _lease(self, way: Way, request: GetOrLease, turned: Any = _NO_TURN) -> Any:
        """The reply to somebody who wants a lease, from what its turn has returned if it was taken."""
        try:
            reply: Any = await (way.ask(request, request.wait) if turned is _NO_TURN else way.finish(request, turned))
        except (CapabilityError, CacheClosed, LoaderFailed):
            raise
        except BaseException:
            # It may be granted all the same, to nobody.
            self._give_back(way, request.key, request.token)
            raise
        if isinstance(reply, NotHeld):
            self._give_back(way, request.key, request.token)  # As above, with a reply that stands for the error.
        return reply

    def _lease_request(
        self, job: Job, token: str, wait: float = 0.0, *, refresh: bool = False, after: str = ""
    ) -> GetOrLease:
        return GetOrLease(job.key, self._owner, token, job.options.lease_ttl, wait, job.tags, refresh, after)

    def _give_back(self, way: Way, key: str, token: str | None, error: str = "", late: Found | None = None) -> None:
        if token:
            way.link.send(ReleaseLease(key, token, error, late))

    # Loading

    def _start(self, way: Way, job: Job, flight: Flight, token: str, stale: Stale | None, started: float) -> Start:
        """What starts the load under a lease that was granted."""
        options = job.options
        alone = options.soft_timeout is not None or options.hard_timeout is not None

        def begin() -> None:
            if way.blocks:
                self.renewals.hold(way.link, job.key, token, options.lease_ttl)
            way.beside(flight, lambda way: self._fly(way, job, flight, token, stale, started), ended, alone=alone)
            if not (way.blocks or flight.landed):
                # A load that has ended at once needs none.
                self.renewals.hold(way.link, job.key, token, options.lease_ttl)

        def ended() -> None:
            self._ended(way, job, flight, token)

        return Start(begin, ended)

    def _ended(self, way: Way, job: Job, flight: Flight, token: str) -> None:
        if token in self.flights:
            self._forget(token)
        if not flight.landed:
            self._give_back(way, job.key, token)
            flight.land(ABANDONED)

    def _granted(self, flight: Flight, asked: str, name: str) -> None:
        """List a flight under the lease that it was granted."""
        flight.names = (*flight.names, name)
        self.flights[name] = flight
        if name != asked:
            # Last, so that another thread finds it at any time: it looks for the name first.
            self.flights.pop(asked, None)

    def _forget(self, token: str) -> None:
        self.renewals.let_go(token)
        self.flights.pop(token, None)

    async def _fly(
        self, way: Way, job: Job, flight: Flight, token: str | None, stale: Stale | Loaded | None, started: float
    ) -> None:
        """Call the loader and land its flight. With a `token`, store what it brings."""
        outcome: Any
        try:
            context = self._context(job, stale, started) if job.told else None
            with OnBehalfOf((*loads_of_this_context(), flight)):
                report = LoadReport(way.link, job.key)
                with report:
                    loaded = await way.call(job.call, context, asynchronous=job.asynchronous)
            result: Any = as_result(loaded)
            if result.unchanged:
                result = result.resolved(self._context(job, stale, started))
            outcome = Value(result.value)
            if token is not None:
                outcome = await self._keep(way, job, token, result, report.duration)
        except LeftOut:
            outcome = LEFT_OUT
            self._give_back(way, job.key, token)
        except Exception as error:
            outcome = Raised(error)
            if not await self._remember(way, job, token, error, stale):
                self._give_back(way, job.key, token, type(error).__name__)
        except BaseException as error:
            if way.cancels(error):
                raise
            # It would end the task of the load, and everybody who waits would begin another one.
            outcome = Raised(error)
            self._give_back(way, job.key, token)
        if token:
            self._forget(token)
        flight.land(outcome)

    async def _remember(
        self, way: Way, job: Job, token: str | None, error: Exception, stale: Stale | Loaded | None
    ) -> bool:
        """Store what a loader raised, where that is asked for; says whether it did. A value that may be served stale stays."""
        if token is None or stale is not None or (not token and way.link.pipeline is None):
            return False  # Of the last, a read that takes a shortcut would not know that it is no value.
        if (record := job.options.record_of(error)) is None:
            return False
        ttl = job.options.time_of_error(self._chance)
        # With metadata, however empty, a read of it takes no shortcut.
        request = Set(job.key, record, ttl, job.tags, None, token or None, LoadMetadata())
        try:
            return isinstance(await way.ask(request), Stored)
        except Exception as why:  # The loader's own is what its callers are to get.
            logger.warning("an exception of a loader was not cached: %s", type(why).__name__)
            return False

    async def _fly_many(
        self,
        way: Way,
        jobs: Mapping[str, Job],
        flight: Flight,
        tokens: Mapping[str, str | None],
        started: float,
        group: Group,
    ) -> None:
        """Call a loader of many keys and land the one flight of all of them, storing what it brings."""
        outcome: Any
        try:
            with OnBehalfOf((*loads_of_this_context(), flight)):
                report = LoadReport(way.link, *jobs)
                with report:
                    loaded = await way.call(group.load, list(jobs), asynchronous=is_asynchronous(group.load))
            brought = as_mapping(loaded)
            outcome = Values(await self._keep_many(way, jobs, tokens, brought, report.duration, group.stale))
        except Exception as error:
            outcome = Raised(error)
            for key, job in jobs.items():
                self._give_back(way, job.key, tokens[key], type(error).__name__)
        except BaseException as error:
            if way.cancels(error):
                raise
            outcome = Raised(error)
            for key, job in jobs.items():
                self._give_back(way, job.key, tokens[key])
        for token in tokens.values():
            if token:
                self._forget(token)
        flight.land(outcome)

    async def _keep_many(
        self,
        way: Way,
        jobs: Mapping[str, Job],
        tokens: Mapping[str, str | None],
        loaded: Mapping[str, Any],
        load_time: float,
        stale: Mapping[str, Stale],
    ) -> dict[str, Value]:
        outcomes: dict[str, Value] = {}
        requests: dict[str, Set] = {}
        for key, job in jobs.items():
            if key not in loaded:
                self._give_back(way, job.key, tokens[key])
                continue
            result: Any = as_result(loaded[key])
            if result.unchanged:
                result = result.resolved(self._context(job, stale.get(key), 0.0))
            outcomes[key] = Value(result.value, shared=self._declares_all(job, result))
            token = tokens[key]
            if token is None:
                continue
            if (request := self._request(way, job, token, result, load_time)) is not None:
                requests[key] = request
        replies = await way.ask_all(list(requests.values()))
        for (key, request), reply in zip(requests.items(), replies, strict=True):
            error = reply.error() if isinstance(reply, Failed) else None
            if isinstance(error, CacheClosed):
                raise error
            stored = self._stored(way, jobs[key], request, error or reply)
            if stored:
                outcomes[key] = Value(request.value)
        return outcomes

    async def _keep(self, way: Way, job: Job, token: str, result: LoadResult | Bare, load_time: float) -> Value:
        """Store a loaded value under its lease; `""` is that of a store without leases."""
        request = self._request(way, job, token, result, load_time)
        if request is not None:
            outcome: Any
            try:
                outcome = way.link.turn_set(request)
                if type(outcome) is not Stored:
                    outcome = await way.finish(request, outcome)
            except CacheClosed:
                raise
            except CacheError as error:
                outcome = error
            if self._stored(way, job, request, outcome):
                return Value(result.value)
        return Value(result.value, shared=self._declares_all(job, result))

    def _request(self, way: Way, job: Job, token: str, result: LoadResult | Bare, load_time: float) -> Set | None:
        """What to store; `None`, if the loader said not to, and those who wait elsewhere were told."""
        tags = tuple(dict.fromkeys((*job.tags, *result.tags))) if result.tags else job.tags
        if not result.store:
            late = Found(result.value, tags=tags) if self._declares_all(job, result) else None
            self._give_back(way, job.key, token, "", late)
            return None
        ttl = job.options.time_to_live(result, self._chance)
        return Set(job.key, result.value, ttl, tags, None, token or None, job.options.metadata(load_time, result))

    def _declares_all(self, job: Job, result: LoadResult | Bare) -> bool:
        """Whether the backend knew of all tags from the beginning, so that no invalidation was missed."""
        return not result.tags or set(result.tags) <= set(job.tags)

    def _stored(self, way: Way, job: Job, request: Set, outcome: Reply | CacheError) -> bool:
        """Whether a value was stored. It belongs to its callers in any case."""
        if isinstance(outcome, CacheError):
            logger.warning("a loaded value was not stored: %s", outcome.code)
        elif not isinstance(outcome, NotStored):
            return True
        if not (isinstance(outcome, NotStored) and outcome.reason == "lease_lost"):
            # It failed, or that reply stands for a failure: who waits elsewhere is told.
            late = Found(request.value, tags=request.tags) if len(request.tags) == len(job.tags) else None
            self._give_back(way, job.key, request.lease or "", "", late)
            return False
        if LoadLeaseLost in way.link.emitter.audience.kinds:
            way.link.emitter.emit(LoadLeaseLost(key=job.key))
        return False

    def _context(self, job: Job, stale: Stale | Loaded | None, started: float) -> LoadContext:
        hard = job.options.hard_timeout
        deadline = None if hard is None else started + hard
        if stale is None:
            return LoadContext(job.key, job.tags, deadline=deadline)
        return LoadContext(job.key, job.tags, True, stale.value, stale.etag, deadline, stale.tags)
