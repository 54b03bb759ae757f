"""Coordination of loads: one load of a key among all processes, shared by all callers who ask for it meanwhile.

A caller that misses asks the backend for the lease of the key. One caller is granted it, and loads. To all others the backend
names the lease under which the key is being loaded; the callers of one process share one `InFlightLoad` under that name,
whichever process loads. So each caller's own question to the backend decides what it waits for, and no caller gets a value
whose load began before an invalidation that had returned when the caller asked.
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
    """Decides for the callers of one cache whether they load, wait for another load, or get what is there."""

    def __init__(self) -> None:
        self.forked()

    def forked(self) -> None:
        """Forget the loads of the parent process, whose threads do not exist in a child."""
        self.table = LoadTable()
        self._leasing = True
        self._coalescer = LeaseCoalescer()

    # Callers

    def deliver(self, runner: Runner, job: LoadJob, request: Get, reply: Any) -> Coroutine[Any, Any, Any]:
        """Return the value of a key, given what the turn of a `Get` has returned: the stored value, or one that is loaded or
        stale."""
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
        released = told = ""
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
                    is_leader, work, in_flight, stale, told = True, load, load.in_flight, load.stale, ""
                elif isinstance(reply, Found):
                    return reply.value
                elif isinstance(reply, NotHeld):
                    return await self._load_alone(runner, job, started)
                elif isinstance(reply, Missing):
                    _raise_again(reply, job)
                    # The stored value cannot be read, and another caller is replacing it, with no notification of the end.
                    if now() - started >= min(options.wait_limit, options.hard_timeout or options.wait_limit):
                        return await self._load_alone(runner, job, started)
                    await runner.pause(pause * (0.5 + table.random.random() / 2))
                    pause = min(pause * 1.5, LONGEST_PAUSE)
                    continue
                else:
                    stale = (
                        reply.stale if isinstance(reply, LeaseGranted) else reply if isinstance(reply, Stale) else None
                    )
                    told = lease_of(reply)
                    joined = self._join(runner, job, told, started, released)
                    if joined is None:
                        released = told
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
            if told and told not in in_flight.lease_names and not (outcome is TIMED_OUT or isinstance(outcome, Stale)):
                # The load's question was granted another lease than the one that this caller waits for, which an invalidation
                # that had returned when this caller asked may have taken away.
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
        self, runner: Runner, job: LoadJob, told: str, started: float, released: str
    ) -> tuple[InFlightLoad, LeaseFollower | None] | None:
        """Return the load under the lease `told`, with its follower if that is still to be started.

        `None` means that the caller is to ask again.
        """
        table = self.table
        in_flight = table.find(told)
        if in_flight is not None:
            return in_flight, None
        if told.startswith(f"{table.owner}-") and told != released:
            # No load of this process has that lease any more: it ended just now, or its caller was interrupted.
            runner.client.send(ReleaseLease(job.key, told))
            return None
        mine = InFlightLoad(owner=job.caller, lease_names={told})
        in_flight = table.in_flight.setdefault(told, mine)
        if in_flight is not mine:
            return in_flight, None
        return mine, LeaseFollower(table, runner, job, told, started, mine)

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
        """Start `work`, if it is given, and wait for as long as the options allow.

        Returns the outcome, the stale value if that is to be served, or `TIMED_OUT` if the caller is to load by itself.
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
            # A caller whose time to wait is over does not begin to wait for one more load.
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

    # Hits that are not only read

    def _note_hit(self, runner: Runner, job: LoadJob, found: Found) -> None:
        """Refresh a value that was read, or prolong its life, if the options ask for that."""
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
        # Not on each read: when half of its idle time is over.
        if idle_ttl is None or found.ttl is None or found.ttl > idle_ttl / 2:
            return
        if (cap := options.cap(found.value)) is not None:
            now = client.epoch + client.bus.clock.monotonic()
            if (ttl := min(idle_ttl, found.stored_at + cap - now)) > found.ttl:
                client.send(Touch(job.key, ttl))

    # Without a lease

    async def _load_alone(self, runner: Runner, job: LoadJob, started: float) -> Any:
        """Load for this caller only, and store nothing: another caller may be loading too."""
        load = self._new_load(runner, job, started)
        outcome = await self._wait(runner, job.options, load.in_flight, load, None, started, is_leader=True)
        if isinstance(outcome, Raised):
            raise outcome.error
        if not isinstance(outcome, Value):
            raise CacheError("the load was broken off")
        return outcome.value

    def _join_unleased(self, runner: Runner, job: LoadJob, started: float) -> tuple[InFlightLoad, LeasedLoad | None]:
        """Return the load of a key in a store without leases, and the work that is still to be started."""
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
        """Return the values of keys that are missing: those that no other caller loads by one call of `loader`."""
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
        # What could not be leased is loaded with the rest; it is stored only if the store has no leases at all.
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
        """Ask for the lease of each load, and return the replies by key; `None` for a key that cannot be leased."""
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
        shown = next(iter(stale.values()), None)
        outcome = await self._wait(runner, group.options, group.in_flight, group, shown, started, is_leader=True)
        if isinstance(outcome, Raised) and not (stale and isinstance(outcome.error, Exception)):
            raise outcome.error
        if isinstance(outcome, Raised | Stale):
            return {key: _serve(runner, each, key) for key, each in stale.items()}
        if not isinstance(outcome, Values):
            raise CacheError("the load was broken off")
        return {key: value.value for key, value in outcome.by_key.items()}


def _serve(runner: Runner, stale: Stale | Loaded, key: str) -> Any:
    runner.client.emitter.emit(StaleServed, key=key)
    return stale.value


def _raise_again(missing: Missing, job: LoadJob) -> None:
    """Raise what the loader raised, if that was kept and this caller asks for it."""
    if isinstance(missing, CachedFailure) and (error := job.options.recalled(missing)) is not None:
        raise error
