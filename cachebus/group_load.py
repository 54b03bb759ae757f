"""The load of many keys by one call of a loader, as in `get_or_load_many`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachebus.messages import CacheClosed, Failed, Set, Stale, Stored

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
