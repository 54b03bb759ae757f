"""Load under a lease: request the lease, call the loader, store the value and end the lease."""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Callable, Coroutine
from types import AsyncGeneratorType, GeneratorType
from typing import Any

from msgspec import Struct

from cachebus.client.renewals import PER_LEASE, Renewals
from cachebus.messages import (
    CacheCapacityError,
    CacheClosed,
    CacheError,
    CapabilityError,
    Exists,
    Found,
    Get,
    GetOrLease,
    LeaseGranted,
    Loaded,
    LoaderFailed,
    LoadLeaseLost,
    LoadMetadata,
    NotHeld,
    NotStored,
    Present,
    ReleaseLease,
    RenewLease,
    Reply,
    Set,
    Stale,
    Stored,
)
from cachebus.messages.leases import asked_as
from cachebus.payload.cached_errors import CachedError, CachedFailure

from .loaders import LeftOut, LoadContext, LoadResult, as_result
from .options import LoadOptions
from .runners import Runner, call_loader
from .singleflight import CANCELLED, LEFT_OUT, InFlightLoad, Raised, Value

logger = logging.getLogger("cachebus")

_SPECIAL = (LoadResult, GeneratorType, AsyncGeneratorType)


class LoadJob(Struct, eq=False):
    """Key to load, with its loader, its options and the tags of the value.

    `call` is the loader. It gets a `LoadContext` if `wants_context`, and is a coroutine function if `asynchronous`.
    `remote` is true if the backend does not reply inline. `caller` is the coroutine of the calling `get_or_load`.
    """

    key: str
    call: Callable[..., Any]
    options: LoadOptions
    tags: tuple[str, ...]
    asynchronous: bool
    wants_context: bool = False
    remote: bool = True
    caller: Coroutine[Any, Any, Any] | None = None


class LoadTable:
    """Loads of one cache that are in flight in this process.

    `in_flight` maps lease names to loads; until the backend replies, the key is the token of the lease request.
    `unleased` maps keys to the loads of a store without leases. `refreshing` holds the keys of live values that are
    being reloaded. `has_notifications` is false once the store is known not to notify of the end of a lease.
    """

    def __init__(self) -> None:
        self.owner = f"{os.getpid()}-{os.urandom(6).hex()}"
        self.tokens = map(f"{self.owner}-{{}}".format, itertools.count(1))
        self.in_flight: dict[str, InFlightLoad] = {}
        self.unleased: dict[str, InFlightLoad] = {}
        self.refreshing: set[str] = set()
        self.has_notifications = True
        self.renewals = Renewals()
        self.random = random.Random()

    def find(self, name: str) -> InFlightLoad | None:
        """Return the load under a lease, or the load whose request for that lease has no reply yet."""
        for listed in (name, asked_as(name)):
            in_flight = self.in_flight.get(listed)
            if in_flight is not None:
                if not in_flight.is_orphan():
                    return in_flight
                # Its owner was interrupted. The waiters ask again, and the caller releases the lease.
                self.in_flight.pop(listed, None)
                in_flight.resolve(CANCELLED)
        return None


class LeasedLoad(Struct, eq=False):
    """Load of one key by this process, with one method per step.

    `token` identifies the lease request. `lease` is the name of the lease under which the value is stored: `""` in a
    store without leases, `None` if the value must not be stored. `is_held` is true while the lease has to be released,
    with `error` or `late` for its waiters in other processes. `stale` is the previous value. `refreshed` is a live
    value that is reloaded in the background.
    """

    table: LoadTable
    runner: Runner
    job: LoadJob
    started: float
    in_flight: InFlightLoad
    token: str
    lease: str | None = None
    is_held: bool = False
    is_started: bool = False
    stale: Stale | Loaded | None = None
    refreshed: Loaded | None = None
    load_time: float = 0.0
    outcome: Any = CANCELLED
    late: Found | None = None
    error: str = ""

    # The lease

    def question(self, *, wait: float = 0.0, refresh: bool = False, after: str = "") -> GetOrLease:
        """Return the request for the lease."""
        job = self.job
        return GetOrLease(job.key, self.table.owner, self.token, job.options.lease_ttl, wait, job.tags, refresh, after)

    async def ask(self, *, wait: float = 0.0, refresh: bool = False, after: str = "") -> Any:
        """Request the lease from the backend and return its reply. `is_held` is true if the lease was granted."""
        table, runner = self.table, self.runner
        # Registered before the request: callers that ask in between get the lease name, and must find the load here.
        table.in_flight[self.token] = self.in_flight
        try:
            question = self.question(wait=wait, refresh=refresh, after=after)
            if wait:
                reply: Any = await runner.ask(question, wait)
            else:
                reply = runner.client.try_inline_lease(question)
                if type(reply) is not LeaseGranted:
                    reply = await runner.wait_reply(question, reply)
                if type(reply) is CachedFailure and self.job.options.recalled(reply) is None:
                    # A cached exception that is not in this caller's `cache_errors`: load a value to replace it.
                    reply = await runner.ask(self.question(refresh=True))
            if type(reply) is LeaseGranted:
                self.granted(reply)
            elif type(reply) is NotHeld:
                self.release(self.token)  # As below: this reply is the fallback for an error.
            return reply
        except (CapabilityError, CacheClosed, LoaderFailed):
            raise
        except BaseException:
            # The lease may have been granted nevertheless, or the backend may still hold this caller as a waiter.
            self.release(self.lease or self.token)
            self.is_held = False
            raise
        finally:
            if not self.is_held:
                table.in_flight.pop(self.token, None)

    def granted(self, reply: LeaseGranted) -> None:
        """Register the load under the lease that was granted."""
        name = reply.token
        self.lease = name
        self.stale = reply.stale
        self.in_flight.lease_names.add(name)
        self.table.in_flight[name] = self.in_flight
        self.is_held = True
        if name != self.token:
            # Last, so that another thread always finds the load, because `find` looks for the name first.
            self.table.in_flight.pop(self.token, None)

    def release(self, name: str, error: str = "", late: Found | None = None) -> None:
        """Release a lease, with the error or the value for its waiters in other processes."""
        client, key = self.runner.client, self.job.key
        client.send(ReleaseLease(key, name, error, late))
        if late is not None and client.pipeline is not None:
            # The late value may be too large for the bus. This message is not; after the first one it has no effect.
            client.send(ReleaseLease(key, name, error))

    def keep_lease(self) -> None:
        """Start renewing the lease, if there is one."""
        if self.lease:
            client = self.runner.client
            due = client.bus.clock.monotonic() + self.job.options.lease_ttl / PER_LEASE
            self.table.renewals.track(self.lease, client.timers, due, self._renew)

    def _renew(self) -> float | None:
        if self.in_flight.resolved or self.in_flight.is_orphan():
            self.end()  # The load was interrupted before it could end the lease.
            return None
        client, lease_ttl = self.runner.client, self.job.options.lease_ttl
        client.send(RenewLease(self.job.key, self.lease or "", lease_ttl))
        return client.bus.clock.monotonic() + lease_ttl / PER_LEASE

    def end_lease(self) -> None:
        """Stop renewing the lease, and release it unless the store has ended it. Idempotent."""
        if lease := self.lease:
            if self.is_held:
                self.release(lease, self.error, self.late)
                self.is_held = False
            self.table.renewals.untrack(lease)
            self.table.in_flight.pop(lease, None)

    # The load

    def start(self) -> None:
        """Start the load in a new task, or run it in the caller's thread."""
        options, runner = self.job.options, self.runner
        if runner.blocks:
            self.keep_lease()
        runner.start(
            self,
            background=options.hard_timeout is not None
            or self.refreshed is not None
            or (self.stale is not None and options.soft_timeout is not None),
        )
        self.is_started = True
        if self.is_held and not runner.blocks:
            # Skipped if the load has already ended.
            self.keep_lease()

    async def run(self) -> None:
        """Call the loader, store the value and resolve the load."""
        job = self.job
        try:
            if (self.refreshed is not None or self.lease == "") and not await self._is_needed():
                return
            arguments = (self.context(),) if job.wants_context else ()
            loaded, self.load_time = await call_loader(
                self.runner, self.in_flight, (job.key,), job.call, arguments, asynchronous=job.asynchronous
            )
            self.outcome = await self._store(loaded)
        except LeftOut:
            self.outcome = LEFT_OUT
        except Exception as error:
            if not await self._keep_failure(error):
                self.error = type(error).__name__
            self.outcome = Raised(error)
        except BaseException as error:
            if self.runner.cancels(error):
                raise
            # Otherwise the error would end the task of the load, and every waiter would start another one.
            self.outcome = Raised(error)
        finally:
            self.end()

    async def _is_needed(self) -> bool:
        """Return True if a refresh is still due, or if a store without leases still has no value."""
        runner, job = self.runner, self.job
        try:
            if self.refreshed is not None:
                await self.ask(refresh=True)
                if self.is_held:
                    self.keep_lease()
                    self.stale = self.refreshed
                    self.started = runner.client.bus.clock.monotonic()
                return self.is_held
            # Another load may have ended between the miss and the start of this one. `Exists` counts neither as a hit
            # nor as a miss.
            if isinstance(await runner.ask(Exists(job.key)), Present):
                found: Any = await runner.ask(Get(job.key))
                if isinstance(found, Found):
                    self.outcome = Value(found.value)
                    return False
                if isinstance(found, CachedFailure) and (error := job.options.recalled(found)) is not None:
                    self.outcome = Raised(error)
                    return False
        except CacheError as error:
            if self.refreshed is None:
                self.outcome = Raised(error)
            return False  # A live value stays, and the next reader may refresh it.
        return True

    def end(self) -> None:
        """End the lease and resolve the load, after success, failure or interruption. Idempotent."""
        table, key = self.table, self.job.key
        if self.refreshed is not None:
            table.refreshing.discard(key)
        if self.lease == "" and table.unleased.get(key) is self.in_flight:
            del table.unleased[key]
        if self.is_held or not self.in_flight.resolved:
            self.end_lease()
        self.in_flight.resolve(self.outcome)

    def context(self) -> LoadContext:
        """Return the context for the loader."""
        job, stale = self.job, self.stale
        hard = job.options.hard_timeout
        deadline = None if hard is None else self.started + hard
        if stale is None:
            return LoadContext(job.key, job.tags, deadline=deadline)
        return LoadContext(job.key, job.tags, True, stale.value, stale.etag, deadline, stale.tags)

    # The value

    async def _store(self, loaded: Any) -> Value:
        """Store a loaded value under the lease, and return it for the callers even if it was not stored."""
        if self.lease is not None and self.job.options.is_plain and not isinstance(loaded, _SPECIAL):
            # Fast path: the same result as `set_request`, for most values.
            request = Set(self.job.key, loaded, self.job.options.ttl, self.job.tags, None, self.lease or None)
            value = Value(loaded)
        else:
            made, value = self.set_request(loaded)
            if made is None:
                return value
            request = made
        reply: Any
        try:
            reply = self.runner.client.try_inline_set(request)
            if type(reply) is not Stored:
                reply = await self.runner.wait_reply(request, reply)
        except CacheClosed:
            raise
        except CacheError as error:
            reply = error
        if type(reply) is Stored:
            self.is_held = False
            return value if value.shared else Value(value.value)
        self.not_stored(request, reply)
        return value

    def set_request(self, loaded: Any) -> tuple[Set | None, Value]:
        """Return the request that stores a loaded value, or `None` if it must not be stored, and the outcome.

        Raises `TypeError` or `ValueError` for an invalid loader result.
        """
        job = self.job
        result = as_result(loaded)
        if result.unchanged:
            result = result.resolved(self.context())
        # The backend may have missed an invalidation of a tag that it did not know when the load began.
        shared = set(result.tags) <= set(job.tags)
        value = Value(result.value, shared)
        if self.lease is None:
            return None, value
        tags = tuple(dict.fromkeys((*job.tags, *result.tags))) if result.tags else job.tags
        if not result.store:
            self.late = Found(result.value, tags=tags) if shared else None
            return None, value
        ttl = job.options.time_to_live(result, self.table.random)
        metadata = job.options.metadata(self.load_time, result)
        return Set(job.key, result.value, ttl, tags, None, self.lease or None, metadata), value

    def not_stored(self, request: Set, reply: Reply | CacheError) -> None:
        """Handle a value that was not stored: emit `LoadLeaseLost`, or pass the value to waiters in other processes."""
        if isinstance(reply, NotStored) and reply.reason == "lease_lost":
            self.is_held = False
            self.runner.client.emitter.emit(LoadLeaseLost, key=self.job.key)
            return
        if isinstance(reply, CacheError):
            logger.warning("a loaded value was not stored: %s", reply.code)
        # The write failed or was dropped. Waiters in other processes get the value if it is small enough for the bus.
        if not isinstance(reply, CacheCapacityError) and len(request.tags) == len(self.job.tags):
            self.late = Found(request.value, tags=request.tags)

    async def _keep_failure(self, error: Exception) -> bool:
        """Cache the exception of the loader if its class is in `cache_errors`. A stale value is not replaced."""
        job, client = self.job, self.runner.client
        if self.lease is None or self.stale is not None or (not self.lease and client.pipeline is None):
            # The last condition, because an inline read would return the stored exception as a value.
            return False
        options = job.options
        if not isinstance(error, options.cache_errors) or (record := CachedError.of(error)) is None:
            return False
        ttl = (options.error_ttl or 0.0) * (1 - options.ttl_jitter * self.table.random.random())
        # The metadata, even if empty, keeps reads from taking the inline path.
        request = Set(job.key, record, ttl, job.tags, None, self.lease or None, LoadMetadata())
        try:
            stored = isinstance(await self.runner.ask(request), Stored)
        except Exception as failure:  # The callers must get the exception of the loader.
            logger.warning("the exception of a loader was not cached: %s", type(failure).__name__)
            return False
        self.is_held = self.is_held and not stored
        return stored
