"""Load of many keys with one loader call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from cachebus.messages import CacheClosed, Failed, Set, Stale, Stored

from .leased_load import LeasedLoad
from .loaders import Loader, as_mapping, is_asynchronous
from .options import LoadOptions
from .runners import Runner, call_loader
from .singleflight import CANCELLED, InFlightLoad, Raised, Value, Values


class GroupLoad(Struct, eq=False):
    """Load of several leased keys, which share one loader call and one `in_flight`."""

    runner: Runner
    loader: Loader
    options: LoadOptions
    loads: Mapping[str, LeasedLoad]
    in_flight: InFlightLoad
    outcome: Any = CANCELLED
    is_started: bool = False

    def stale(self) -> dict[str, Stale]:
        """Return the stale values if every key has one, otherwise nothing: all keys are served stale, or none."""
        found = {key: load.stale for key, load in self.loads.items() if isinstance(load.stale, Stale)}
        return found if len(found) == len(self.loads) else {}

    def start(self) -> None:
        """Start the load in a new task, or run it in the caller's thread."""
        options = self.options
        for load in self.loads.values():
            load.keep_lease()
        self.runner.start(self, background=options.soft_timeout is not None or options.hard_timeout is not None)
        self.is_started = True

    def end(self) -> None:
        """End all leases and resolve the load. Idempotent."""
        for load in self.loads.values():
            load.end_lease()
        self.in_flight.resolve(self.outcome)

    async def run(self) -> None:
        """Call the loader, store its results and resolve the load."""
        keys = tuple(self.loads)
        try:
            loaded, seconds = await call_loader(
                self.runner, self.in_flight, keys, self.loader, ([*keys],), asynchronous=is_asynchronous(self.loader)
            )
            self.outcome = Values(await self._store(as_mapping(loaded), seconds))
        except Exception as error:
            for load in self.loads.values():
                load.error = type(error).__name__
            self.outcome = Raised(error)
        except BaseException as error:
            if self.runner.cancels(error):
                raise
            self.outcome = Raised(error)
        finally:
            self.end()

    async def _store(self, loaded: Mapping[str, Any], seconds: float) -> dict[str, Value]:
        outcomes: dict[str, Value] = {}
        requests: dict[str, Set] = {}
        for key, load in self.loads.items():
            if key in loaded:
                load.load_time = seconds
                request, outcomes[key] = load.set_request(loaded[key])
                if request is not None:
                    requests[key] = request
        replies = await self.runner.ask_all(list(requests.values()))
        for (key, request), reply in zip(requests.items(), replies, strict=True):
            error = reply.error() if isinstance(reply, Failed) else None
            if isinstance(error, CacheClosed):
                raise error
            if isinstance(reply, Stored):
                self.loads[key].is_held = False
                outcomes[key] = Value(request.value)
            else:
                self.loads[key].not_stored(request, error or reply)
        return outcomes
