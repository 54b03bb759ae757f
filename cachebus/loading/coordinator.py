"""Load coordination: concurrent callers of a key share one load, across all processes.

A caller that misses asks the backend for the lease of the key. The backend grants the lease to one caller, which loads.
All others get the name of the lease under which the key is being loaded. The callers of one process share one
`InFlightLoad` under that name, whichever process loads.

The reply to its own request decides which load a caller waits for. So no caller gets a value whose load began before an
invalidation that had returned when the caller asked.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

from cachebus.client.failure_policy import FAILED_READ
from cachebus.messages import (
    CacheError,
    CacheStampedeError,
    CacheTimeoutError,
    CapabilityError,
    Failed,
    Found,
    Get,
    LeaseGranted,
    Loaded,
    Missing,
    NotHeld,
    Overloaded,
    ReleaseLease,
    Reply,
    Stale,
    StaleServed,
    Touch,
)
from cachebus.payload.cached_errors import CachedFailure, unwrap

from .group_load import GroupLoad
from .lease_coalescer import LeaseCoalescer
from .lease_follower import FIRST_PAUSE, LONGEST_PAUSE, LeaseFollower, lease_of
from .leased_load import LeasedLoad, LoadJob, LoadTable
from .loaders import LeftOut, Loader, calls_for_one, kind_of
from .options import LoadOptions
from .runners import Runner
from .singleflight import CANCELLED, LEFT_OUT, TIMED_OUT, InFlightLoad, Raised, Value, Values

_MISSING = Missing()


class LoadCoordinator:
    """Coordinator for the callers of one cache: they load, wait for another load, or get the stored value."""

    def __init__(self) -> None:
        self.forked()

    def forked(self) -> None:
        """Discard the loads of the parent process, because its threads do not exist in a forked child."""
        self.table = LoadTable()
        self._leasing = True
        self._coalescer = LeaseCoalescer()

    # Callers

    def deliver(self, runner: Runner, job: LoadJob, request: Get, reply: Any) -> Coroutine[Any, Any, Any]:
        """Return the value of a key: stored, loaded or stale. `reply` is the result of the inline turn of `request`."""
        job.remote = not isinstance(reply, Reply)
        job.caller = caller = self._deliver(runner, job, request, reply)
        return caller

    async def _deliver(
        self, runner: Runner, job: LoadJob, request: Get, reply: Any, started: float | None = None
    ) -> Any:
        options, table = job.options, self.table
        found: Any = reply if isinstance(reply, Found | Missing) else await runner.wait_reply(request, reply)
        now = runner.client.bus.clock.monotonic
        if started is None:
            started = now()
        if type(found) is not Missing or found is FAILED_READ:
            found = unwrap(found)
            if isinstance(found, Found):
                self._note_hit(runner, job, found)
                return found.value
            if found is FAILED_READ:
                return await self._load_alone(runner, job, started)
            _raise_again(found, job)
        pause = FIRST_PAUSE
        released = lease_name = ""
        while True:
            work: LeasedLoad | LeaseFollower | None = None
            stale: Stale | Loaded | None = None
            load: LeasedLoad | None = None
            is_leader = False
            if not self._leasing:
                in_flight, work = self._join_unleased(runner, job, started)
                is_leader = work is not None
            else:
                try:
                    if job.remote:
                        make = partial(self._new_load, runner, job, started)
                        reply, load = await self._coalescer.ask(runner, job, make)
                    else:
                        load = self._new_load(runner, job, started)
                        reply = await load.ask()
                except CapabilityError:
                    self._leasing = False
                    continue
                except Overloaded:
                    return await self._load_alone(runner, job, started)
                if load is not None and load.is_held:
                    is_leader, work, in_flight, stale, lease_name = True, load, load.in_flight, load.stale, ""
                elif isinstance(reply, Found):
                    return reply.value
                elif isinstance(reply, NotHeld):
                    return await self._load_alone(runner, job, started)
                elif isinstance(reply, Missing):
                    _raise_again(reply, job)
                    # The stored value cannot be decoded, and another caller is replacing it. There is no notification
                    # of the end of that load, so this caller polls.
                    if now() - started >= min(options.wait_limit, options.hard_timeout or options.wait_limit):
                        return await self._load_alone(runner, job, started)
                    await runner.pause(pause * (0.5 + table.random.random() / 2))
                    pause = min(pause * 1.5, LONGEST_PAUSE)
                    continue
                else:
                    stale = (
                        reply.stale if isinstance(reply, LeaseGranted) else reply if isinstance(reply, Stale) else None
                    )
                    lease_name = lease_of(reply)
                    joined = self._join(runner, job, lease_name, started, released)
                    if joined is None:
                        released = lease_name
                        continue
                    in_flight, work = joined
            if load is not None and is_leader and options.soft_timeout is None and options.hard_timeout is None:
                try:
                    outcome = await runner.wait(load.in_flight, start=load.start)
                finally:
                    if not load.is_started:
                        load.end()
            else:
                outcome = await self._wait(runner, options, in_flight, work, stale, started, is_leader=is_leader)
            joined_other = lease_name and lease_name not in in_flight.lease_names
            if joined_other and not (outcome is TIMED_OUT or isinstance(outcome, Stale)):
                # The load was granted another lease than the one that this caller waits for. An invalidation that had
                # returned before this caller asked may have revoked that other lease.
                continue
            if isinstance(outcome, Values):
                outcome = outcome.by_key.get(job.key, LEFT_OUT)
            if isinstance(outcome, Value) and (is_leader or outcome.shared):
                return outcome.value
            if isinstance(outcome, Raised) and outcome.concerns(is_leader=is_leader):
                if stale is not None and isinstance(outcome.error, Exception):
                    return _serve(runner, stale, job.key)
                raise outcome.error
            if isinstance(outcome, Stale):
                return _serve(runner, outcome, job.key)
            if outcome is TIMED_OUT:
                return await self._load_alone(runner, job, started)
            if outcome is LEFT_OUT and is_leader:
                raise LeftOut(job.key)

    def _new_load(
        self, runner: Runner, job: LoadJob, started: float, in_flight: InFlightLoad | None = None
    ) -> LeasedLoad:
        in_flight = in_flight or InFlightLoad(owner=job.caller)
        return LeasedLoad(self.table, runner, job, started, in_flight, next(self.table.tokens))

    def _join(
        self, runner: Runner, job: LoadJob, lease_name: str, started: float, released: str
    ) -> tuple[InFlightLoad, LeaseFollower | None] | None:
        """Return the load under a lease, with a follower if the caller has to start one.

        `None` means that the caller must ask the backend again.
        """
        table = self.table
        in_flight = table.find(lease_name)
        if in_flight is not None:
            return in_flight, None
        if lease_name.startswith(f"{table.owner}-") and lease_name != released:
            # No load of this process has that lease any more: it ended just now, or its caller was interrupted.
            runner.client.send(ReleaseLease(job.key, lease_name))
            return None
        mine = InFlightLoad(owner=job.caller, lease_names={lease_name})
        in_flight = table.in_flight.setdefault(lease_name, mine)
        if in_flight is not mine:
            return in_flight, None
        return mine, LeaseFollower(table, runner, job, lease_name, started, mine)

    async def _wait(
        self,
        runner: Runner,
        options: LoadOptions,
        in_flight: InFlightLoad,
        work: LeasedLoad | GroupLoad | LeaseFollower | None,
        stale: Stale | Loaded | None,
        started: float,
        *,
        is_leader: bool,
    ) -> Any:
        """Start `work`, if given, and wait for the outcome for as long as the options allow.

        Returns the outcome, a stale value to serve, or `TIMED_OUT` if the caller must load by itself.
        """
        spent = runner.client.bus.clock.monotonic() - started
        timeout, limit = options.patience(spent, has_stale=stale is not None, is_leader=is_leader)
        start = None if work is None else work.start
        try:
            if timeout == 0.0 and limit == "soft":
                if start is not None:
                    in_flight.kept = True
                    start()
                return stale
            # A caller that has used up its `wait_limit` does not start waiting for another load.
            if timeout != 0.0 or limit != "wait":
                outcome = await runner.wait(in_flight, timeout, keep=limit != "wait", start=start)
                if outcome is not TIMED_OUT:
                    return outcome
        finally:
            if work is not None and not work.is_started:
                work.end()
        if limit == "soft" or (stale is not None and (limit == "hard" or options.wait == "stale")):
            return stale
        if limit == "hard":
            raise CacheTimeoutError("the loader has not returned", runner.client.address, options.hard_timeout or 0.0)
        if options.wait == "raise":
            raise CacheStampedeError(f"another caller has been loading the key for {options.wait_limit:g} s")
        return TIMED_OUT

    # Hits

    def _note_hit(self, runner: Runner, job: LoadJob, found: Found) -> None:
        """Start a refresh of a value that was read, or extend its TTL, if the options require it."""
        options, client, table = job.options, runner.client, self.table
        if isinstance(found, Loaded) and options.wants_refresh(found, table.random) and job.key not in table.refreshing:
            load = self._new_load(runner, job, client.bus.clock.monotonic())
            load.refreshed = found
            load.in_flight.kept = True
            table.refreshing.add(job.key)
            try:
                load.start()
            finally:
                if not load.is_started:
                    load.end()
        idle_ttl = options.idle_ttl
        # Not on every read, but once half of `idle_ttl` has passed.
        if idle_ttl is None or found.ttl is None or found.ttl > idle_ttl / 2:
            return
        if (cap := options.cap(found.value)) is not None:
            now = client.epoch + client.bus.clock.monotonic()
            if (ttl := min(idle_ttl, found.stored_at + cap - now)) > found.ttl:
                client.send(Touch(job.key, ttl))

    # Without a lease

    async def _load_alone(self, runner: Runner, job: LoadJob, started: float) -> Any:
        """Load for this caller only, without storing the value, because another caller may be loading too."""
        load = self._new_load(runner, job, started)
        outcome = await self._wait(runner, job.options, load.in_flight, load, None, started, is_leader=True)
        if isinstance(outcome, Raised):
            raise outcome.error
        if not isinstance(outcome, Value):
            raise CacheError("the load was cancelled")
        return outcome.value

    def _join_unleased(self, runner: Runner, job: LoadJob, started: float) -> tuple[InFlightLoad, LeasedLoad | None]:
        """Return the load of a key in a store without leases, with the work if the caller has to start it."""
        unleased = self.table.unleased
        listed = unleased.get(job.key)
        if listed is not None and listed.is_orphan():
            listed.resolve(CANCELLED)
            unleased.pop(job.key, None)
        load = self._new_load(runner, job, started)
        load.lease = ""
        in_flight = unleased.setdefault(job.key, load.in_flight)
        return in_flight, load if in_flight is load.in_flight else None

    # Many keys

    def fetch_many(
        self, runner: Runner, keys: Sequence[str], loader: Loader, options: LoadOptions
    ) -> Coroutine[Any, Any, dict[str, Any]]:
        """Return the values of missing keys. One call of `loader` loads those that no other caller is loading."""
        in_flight = InFlightLoad()
        in_flight.owner = caller = self._fetch_many(runner, keys, loader, options, in_flight)
        return caller

    async def _fetch_many(
        self, runner: Runner, keys: Sequence[str], loader: Loader, options: LoadOptions, in_flight: InFlightLoad
    ) -> dict[str, Any]:
        _, asynchronous = kind_of(loader)
        started = runner.client.bus.clock.monotonic()
        loads: dict[str, LeasedLoad] = {}
        for key in keys:
            job = LoadJob(key, calls_for_one(loader, key), options, options.tags, asynchronous)
            loads[key] = self._new_load(runner, job, started, in_flight)
        try:
            replies = await self._lease_many(runner, loads)
        except BaseException:
            GroupLoad(runner, loader, options, loads, in_flight).end()
            raise
        values = {key: reply.value for key, reply in replies.items() if isinstance(reply, Found)}
        # Keys without a lease are loaded with the rest. Their values are stored only if the store has no leases at all.
        ours = {key: load for key, load in loads.items() if load.is_held or replies[key] is None}
        if ours:
            values |= await self._load_group(GroupLoad(runner, loader, options, ours, in_flight), started)
        for key in [each for each in keys if each not in values and each not in ours]:
            job = loads[key].job
            job.caller = in_flight.owner
            try:
                values[key] = await self._deliver(runner, job, Get(key), _MISSING, started)
            except LeftOut:
                continue
        return {key: values[key] for key in keys if key in values}

    async def _lease_many(self, runner: Runner, loads: dict[str, LeasedLoad]) -> dict[str, Any]:
        """Request the lease of each load, and return the replies by key, with `None` for a key without a lease."""
        replies: dict[str, Any] = dict.fromkeys(loads)
        in_flight = self.table.in_flight
        if self._leasing:
            in_flight.update({load.token: load.in_flight for load in loads.values()})
            try:
                answers = await runner.ask_all([load.question() for load in loads.values()])
                for (key, load), reply in zip(loads.items(), answers, strict=True):
                    if isinstance(reply, Failed):
                        error = reply.error()
                        if isinstance(error, CapabilityError):
                            self._leasing = False
                        elif not isinstance(error, Overloaded):
                            raise error
                    elif isinstance(reply, NotHeld):
                        load.release(load.token)
                    else:
                        replies[key] = reply
                        if isinstance(reply, LeaseGranted):
                            load.granted(reply)
            except BaseException:
                for load in loads.values():
                    if not load.is_held:
                        load.release(load.token)
                raise
            finally:
                for load in loads.values():
                    if not load.is_held:
                        in_flight.pop(load.token, None)
        if not self._leasing:
            for key, reply in replies.items():
                if reply is None:
                    loads[key].lease = ""
        return replies

    async def _load_group(self, group: GroupLoad, started: float) -> dict[str, Any]:
        runner, stale = group.runner, group.stale()
        first = next(iter(stale.values()), None)
        outcome = await self._wait(runner, group.options, group.in_flight, group, first, started, is_leader=True)
        if isinstance(outcome, Raised) and not (stale and isinstance(outcome.error, Exception)):
            raise outcome.error
        if isinstance(outcome, Raised | Stale):
            return {key: _serve(runner, each, key) for key, each in stale.items()}
        if not isinstance(outcome, Values):
            raise CacheError("the load was cancelled")
        return {key: value.value for key, value in outcome.by_key.items()}


def _serve(runner: Runner, stale: Stale | Loaded, key: str) -> Any:
    runner.client.emitter.emit(StaleServed, key=key)
    return stale.value


def _raise_again(missing: Missing, job: LoadJob) -> None:
    """Raise the cached exception, if there is one and its class is in this caller's `cache_errors`."""
    if isinstance(missing, CachedFailure) and (error := job.options.recalled(missing)) is not None:
        raise error
