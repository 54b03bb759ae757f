"""Loads that begin in another way: in a store without leases, and of a value that is still live."""

from __future__ import annotations

from typing import Any

from cachebus.messages import CacheError, Exists, Found, Get, Loaded, Present

from .cached_errors import CachedFailure
from .leased_load import LeasedLoad
from .singleflight import InFlightLoad, Raised, Value


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
