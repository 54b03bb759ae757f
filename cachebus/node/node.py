"""A node: the bus, the supervisor and the actors of one process."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cachebus.actors import (
    BackendActor,
    BatchStore,
    InlineStore,
    LockManager,
    LockStore,
    RestartPolicy,
    Supervisor,
)
from cachebus.bus import SYSTEM_CLOCK, Address, Clock, Emitter, LocalBus, LoopTimers, Visibility
from cachebus.client.backend_client import BackendClient
from cachebus.client.lock_client import LOCKS, LockClient
from cachebus.messages import CacheClosed, CacheConfigurationError, CapabilityError

if TYPE_CHECKING:
    from cachebus.payload.pipeline import PayloadPipeline
    from cachebus.settings import BackendSettings, Settings

StoreFactory = Callable[["BackendSettings"], "InlineStore | BatchStore"]


class Node:
    """Bus, supervisor and backend actors of one process. An asynchronous context manager.

    * `stores`: creates the store of a backend, a new one for each incarnation of its actor. By default, stores are
      created from the settings.
    * `clock`: the clock of everything in the node.
    * `serve`: make the backends reachable for other processes on the bus, as a worker does. Any number of workers may
      serve the same external store, such as a Redis server. Any other store has a single worker; a second one raises
      `AddressInUse`.
    * `grace`: how long actors may take, when the node closes, to answer their pending requests, in seconds.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        stores: StoreFactory | None = None,
        clock: Clock = SYSTEM_CLOCK,
        serve: bool = False,
        grace: float = 5.0,
    ) -> None:
        if serve and settings.bus is None:
            raise CacheConfigurationError(
                "bus: a node that serves other processes needs a bus, such as nats://localhost:4222"
            )
        self.settings = settings
        self.clock = clock
        self.serve = serve
        self.bus = _make_bus(settings, clock)
        self._stores = stores or self._build_store
        actors = settings.actors
        backoff = (actors.restart_backoff, actors.restart_backoff_max)
        self.supervisor = Supervisor(
            self.bus,
            policy=RestartPolicy(actors.max_restarts, actors.restart_window, *backoff),
            capacity=actors.mailbox_capacity,
            inline_turns=actors.inline_turns,
            grace=grace,
        )
        self._timers = LoopTimers(clock)
        self._resources = AsyncExitStack()
        self._closed = False
        self._pipelines: dict[str, PayloadPipeline | None] = {}
        kept = settings.locks_kept
        unavailable = None
        if kept.type in LOCKLESS:
            problem = f"a {kept.type} backend does not support locks; set a lock store, such as locks='redis://host'"
            unavailable = CapabilityError(problem, kept.type, "locks")
        self._lock_client = LockClient(self.bus, self._lock_address(kept), settings.timeout, self._timers, unavailable)
        self._lock_tables: dict[str, LockStore] = {}

    def __repr__(self) -> str:
        names = ", ".join(each.name for each in self.settings.backends)
        return f"<Node {self.settings.namespace!r} with {names}>"

    async def __aenter__(self) -> Self:
        if self._closed:
            raise CacheClosed("this node was closed; create a new one")
        await self._resources.enter_async_context(self.bus)
        self._timers.start()
        self._resources.callback(self._timers.close)
        try:
            await self._resources.enter_async_context(self.supervisor)
            for backend in self.settings.backends:
                if backend.type != "bus":
                    address, actor = backend_address(backend.name), partial(self._actor, backend)
                    await self.supervisor.start(
                        address, actor, backend=backend.name, visibility=self.visibility(backend)
                    )
            await self._start_locks()
        except BaseException:
            await self._resources.aclose()
            raise
        _open_nodes.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._closed = True
        _open_nodes.discard(self)
        try:
            await self._resources.__aexit__(kind, error, tb)
        finally:
            self.bus.close()

    def client(self, name: str | None = None) -> BackendClient:
        """Return the client of the backend `name`, or of the default backend."""
        settings = self.settings
        backend = settings.default_backend if name is None else settings.backend(name)
        to = (self.bus, backend_address(backend.name), settings.timeout, Emitter(self.bus, backend.name), self._timers)
        pipeline = self._pipeline(backend)
        client: BackendClient
        if pipeline is None:
            client = BackendClient(*to, settings.on_error)
        else:
            from cachebus.client.encoding_client import EncodingClient  # Not needed by caches that store objects.

            offload_above = settings.payload.offload_above
            client = EncodingClient(
                *to, pipeline, on_error=settings.on_error, offload_above=offload_above, debug=settings.debug
            )
        client.locks = self._lock_client
        return client

    async def _start_locks(self) -> None:
        """Start the lock manager. A serving node starts one per backend, because clients address it by backend name."""
        settings = self.settings
        kept = settings.backends if self.serve and settings.locks is None else (settings.locks_kept,)
        for each in kept:
            if each.type != "bus" and each.type not in LOCKLESS:
                address, manager = self._lock_address(each), partial(self._lock_manager, each)
                await self.supervisor.start(address, manager, backend="locks", visibility=self.visibility(each))

    def _lock_address(self, kept: BackendSettings) -> Address:
        # Per backend by default, so that processes share locks exactly if they share values.
        return LOCKS if self.settings.locks is not None else Address(f"{LOCKS}.{kept.name}")

    def _lock_manager(self, kept: BackendSettings) -> LockManager:
        from cachebus.settings.backends import GuardSettings, guard_policy  # As in `_build_store`.

        from .stores import build_lock_store

        store = self._lock_tables.get(kept.name)
        if store is None:
            store = build_lock_store(kept, namespace=self.settings.namespace, clock=self.clock)
            if not isinstance(kept, GuardSettings):
                self._lock_tables[kept.name] = store  # In memory, so all incarnations of the actor share it.
        return LockManager(store, guard_policy(kept), shared=self.visibility(kept) == "shared")

    def visibility(self, backend: BackendSettings) -> Visibility:
        """Return the visibility of a backend's actor on the bus."""
        if not self.serve:
            return "private"
        return "shared" if backend.type in SHARABLE else "sole"

    async def stop(self) -> None:
        """Stop every actor once it has answered its pending requests. The node itself stays entered."""
        await self.supervisor.stop()
        self._timers.close()

    def forked(self) -> None:
        """Make the node unusable in a forked child."""
        self._timers.forked()
        self.supervisor.forked()
        self.bus.forked()

    def _actor(self, backend: BackendSettings) -> BackendActor:
        from cachebus.settings.backends import guard_policy  # As in `_build_store`.

        # With on_error="miss", a cache opens even if its store is down. Otherwise opening fails immediately.
        opens_later = self.settings.on_error == "miss"
        return BackendActor(self._stores(backend), guard_policy(backend), opens_later=opens_later)

    def _pipeline(self, backend: BackendSettings) -> PayloadPipeline | None:
        if backend.name not in self._pipelines:
            from cachebus.settings.payload import build_pipeline  # As in `_build_store`.

            self._pipelines[backend.name] = build_pipeline(
                self.settings.payload, namespace=self.settings.namespace, by_reference=backend.by_reference
            )
        return self._pipelines[backend.name]

    def _build_store(self, backend: BackendSettings) -> InlineStore | BatchStore:
        from .stores import build_store  # Imported only when a node opens, because it imports pydantic.

        return build_store(backend, namespace=self.settings.namespace, clock=self.clock)


SHARABLE = frozenset({"redis", "memcached", "null"})
"""Types of backends whose data is outside the process, so several workers may serve the same one."""

LOCKLESS = frozenset({"null", "plugin"})
"""Types of backends that do not support locks."""


def _make_bus(settings: Settings, clock: Clock) -> LocalBus:
    """Create the unopened bus of settings. Raises `CacheConfigurationError` if it needs nats-py and that is missing."""
    if settings.bus is None:
        return LocalBus(settings.namespace, clock=clock, policy=settings.events.policy)
    try:
        nats = import_module("cachebus.bus.nats.bus")
    except ModuleNotFoundError as error:
        raise CacheConfigurationError(f"a bus over NATS needs {error.name}: pip install 'cachebus[nats]'") from error
    options = settings.bus.nats_options(budget=settings.timeout, name=f"cachebus {settings.namespace}")
    bus: LocalBus = nats.NatsBus(settings.namespace, options, clock=clock, policy=settings.events.policy)
    return bus


def backend_address(name: str) -> Address:
    """Return the address of a backend's actor."""
    return Address(f"backend.{name}")


_open_nodes: weakref.WeakSet[Node] = weakref.WeakSet()


def _after_fork() -> None:
    for node in list(_open_nodes):
        node.forked()
    _open_nodes.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
