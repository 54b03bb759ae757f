"""Loads that differ from the load of one key under a lease: of many keys, in a store without leases, and of a live value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachebus.messages import CacheClosed, CacheError, Exists, Failed, Found, Get, Loaded, Present, Set, Stale, Stored

from .cached_errors import CachedFailure
from .leased_load import LeasedLoad, call_loader
from .load_options import LoadOptions
from .loaders import Loader, as_mapping, is_asynchronous
from .runners import Runner
from .singleflight import CANCELLED, InFlightLoad, Raised, Value, Values


class GroupLoad:
    """Loads the keys of several leased loads, which share one loader call and one `in_flight`."""

    __slots__ = ("_loader", "_loads", "_options", "_outcome", "_runner", "in_flight", "is_started", "stale")

    def __init__(
        self,
        runner: Runner,
        loader: Loader,
        options: LoadOptions,
        loads: Mapping[str, LeasedLoad],
        in_flight: InFlightLoad,
    ) -> None:
        self._runner = runner
        self._loader = loader
        self._options = options
        self._loads = loads
        self._outcome: Any = CANCELLED
        self.in_flight = in_flight
        self.is_started = False
        self.stale: dict[str, Stale] = {key: load.stale for key, load in loads.items() if isinstance(load.stale, Stale)}

    @property
    def common_stale(self) -> Stale | None:
        """A stale value, if all keys have one: they are served stale all together or not at all."""
        return next(iter(self.stale.values())) if len(self.stale) == len(self._loads) else None

    def start(self) -> None:
        """Run the load beside its caller, or in the caller's thread."""
        options = self._options
        for load in self._loads.values():
            load.keep_lease()
        background = options.soft_timeout is not None or options.hard_timeout is not None
        self._runner.start(self, background=background)
        self.is_started = True

    def end(self) -> None:
        """End all leases and resolve the load. May be called again."""
        for load in self._loads.values():
            load.end_lease()
        self.in_flight.resolve(self._outcome)

    async def run(self) -> None:
        """Call the loader, store what it returns and resolve the load."""
        try:
            self._outcome = await self._load()
        finally:
            self.end()

    async def _load(self) -> Any:
        loads, loader = self._loads, self._loader
        try:
            loaded, seconds = await call_loader(
                self._runner,
                self.in_flight,
                tuple(loads),
                loader,
                (list(loads),),
                asynchronous=is_asynchronous(loader),
            )
            return Values(await self._store(as_mapping(loaded), seconds))
        except Exception as error:
            for load in loads.values():
                load.error = type(error).__name__
            return Raised(error)
        except BaseException as error:
            if self._runner.cancels(error):
                raise
            return Raised(error)

    async def _store(self, loaded: Mapping[str, Any], seconds: float) -> dict[str, Value]:
        outcomes: dict[str, Value] = {}
        requests: dict[str, Set] = {}
        for key, load in self._loads.items():
            if key in loaded:
                load.load_time = seconds
                request, outcomes[key] = load.set_request(loaded[key])
                if request is not None:
                    requests[key] = request
        replies = await self._runner.ask_all(list(requests.values()))
        for (key, request), reply in zip(requests.items(), replies, strict=True):
            error = reply.error() if isinstance(reply, Failed) else None
            if isinstance(error, CacheClosed):
                raise error
            if isinstance(reply, Stored):
                self._loads[key].is_held = False
                outcomes[key] = Value(request.value)
            else:
                self._loads[key].not_stored(request, error or reply)
        return outcomes


class UnleasedLoad:
    """The load of a key in a store that knows no leases: one at a time for each process, listed in `by_key`."""

    __slots__ = ("_by_key", "_load", "in_flight", "is_started")

    def __init__(self, by_key: dict[str, InFlightLoad], load: LeasedLoad) -> None:
        self._by_key = by_key
        self._load = load
        self.in_flight = load.in_flight
        self.is_started = False
        load.lease = ""

    def start(self) -> None:
        """Run the load beside its caller, or in the caller's thread."""
        options = self._load.job.options
        background = options.soft_timeout is not None or options.hard_timeout is not None
        self._load.runner.start(self, background=background)
        self.is_started = True

    def end(self) -> None:
        """Resolve the load. May be called again."""
        key = self._load.job.key
        if self._by_key.get(key) is self.in_flight:
            del self._by_key[key]
        self._load.end()

    async def run(self) -> None:
        """Look for a value once more, and else load it."""
        load = self._load
        try:
            # Another load may have ended between the miss and the start of this one.
            if (found := await self._look_again()) is None:
                await load.run()
            else:
                load.outcome = found
        except CacheError as error:
            load.outcome = Raised(error)
        finally:
            self.end()

    async def _look_again(self) -> Any:
        runner, job = self._load.runner, self._load.job
        # Asked whether it exists first, which counts neither as hit nor as miss.
        if isinstance(await runner.ask(Exists(job.key)), Present):
            found: Any = await runner.ask(Get(job.key))
            if isinstance(found, Found):
                return Value(found.value)
            if isinstance(found, CachedFailure) and (error := job.options.recalled(found)) is not None:
                return Raised(error)
        return None


class RefreshLoad:
    """The load of a value that is still live, beside the caller who has read it. One at a time for a key of `refreshing`."""

    __slots__ = ("_found", "_load", "_refreshing", "in_flight")

    def __init__(self, refreshing: set[str], load: LeasedLoad, found: Loaded) -> None:
        refreshing.add(load.job.key)
        self._refreshing = refreshing
        self._load = load
        self._found = found
        self.in_flight = load.in_flight
        self.in_flight.keep()

    def start(self) -> None:
        """Run the load beside its caller."""
        try:
            self._load.runner.start(self, background=True)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End the lease and resolve the load. May be called again."""
        self._refreshing.discard(self._load.job.key)
        self._load.end()

    async def run(self) -> None:
        """Load the value, unless it is being loaded already."""
        load = self._load
        try:
            await load.ask(refresh=True)
            if load.is_held:
                load.keep_lease()
                load.stale = self._found
                load.started = load.runner.link.bus.clock.monotonic()
                await load.run()
        except CacheError:
            pass  # The value stays, and the next reader may try.
        finally:
            self.end()
