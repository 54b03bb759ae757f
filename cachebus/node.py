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
from cachebus.messages import CacheClosed, CacheConfigurationError, CapabilityError

from .link import Link
from .lock_ways import LOCKS, LockWay

if TYPE_CHECKING:
    from .payload import PayloadPipeline
    from .settings import BackendSettings, Settings

StoreFactory = Callable[["BackendSettings"], "InlineStore | BatchStore"]


class Node:
    """The cache's part of a process: a bus, and one supervised backend actor for each backend in the settings.

    An asynchronous context manager. `stores` makes the store of a backend, anew for each life of its actor; left out,
    stores are made as the settings say. `clock` is the source of time for everything in the node. With `serve`, other
    processes on the bus reach the backends too, as a worker's: a store that is a server of its own is served by any
    number of workers, which share the work, any other by one; a second one is refused with `AddressInUse`. `grace` is
    the seconds that actors have, when the node is left, to answer what they were sent.
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
            raise CacheConfigurationError("bus: a node that serves others needs one, such as nats://localhost:4222")
        self.settings = settings
        self.clock = clock
        self.serve = serve
        self.bus: LocalBus = (
            LocalBus(settings.namespace, clock=clock, policy=settings.events.policy)
            if settings.bus is None
            else nats_bus(settings, clock)
        )
        self._stores = stores or self._build_store
        actors = settings.actors
        self.supervisor = Supervisor(
            self.bus,
            policy=RestartPolicy(
                actors.max_restarts, actors.restart_window, actors.restart_backoff, actors.restart_backoff_max
            ),
            capacity=actors.mailbox_capacity,
            inline_turns=actors.inline_turns,
            grace=grace,
        )
        self._timers = LoopTimers(clock)
        self._resources = AsyncExitStack()
        self._closed = False
        self._pipelines: dict[str, PayloadPipeline | None] = {}
        kept = settings.locks_kept
        why_not = None
        if kept.type in LOCKLESS:
            said = f"a {kept.type} backend keeps no locks: say where they are, as in locks='redis://host'"
            why_not = CapabilityError(said, kept.type, "locks")
        self._lock_way = LockWay(self.bus, self._lock_address(kept), settings.timeout, self._timers, why_not)
        self._lock_tables: dict[str, LockStore] = {}

    def __repr__(self) -> str:
        names = ", ".join(each.name for each in self.settings.backends)
        return f"<Node {self.settings.namespace!r} with {names}>"

    async def __aenter__(self) -> Self:
        if self._closed:
            raise CacheClosed("this node was closed; make a new one")
        await self._resources.enter_async_context(self.bus)
        self._timers.start()
        self._resources.callback(self._timers.close)
        try:
            await self._resources.enter_async_context(self.supervisor)
            for backend in self.settings.backends:
                if backend.type == "bus":
                    continue
                await self.supervisor.start(
                    backend_address(backend.name),
                    partial(self._actor, backend),
                    backend=backend.name,
                    visibility=self.visibility(backend),
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

    def link(self, name: str | None = None) -> Link:
        """The way to a backend, the default one if `name` is left out."""
        settings = self.settings
        backend = settings.default_backend if name is None else settings.backend(name)
        emitter = Emitter(self.bus, backend.name)
        address = backend_address(backend.name)
        pipeline = self._pipeline(backend)
        link: Link
        if pipeline is None:
            link = Link(self.bus, address, settings.timeout, emitter, self._timers, settings.on_error)
            link.locks = self._lock_way
            return link
        from .payload_link import PayloadLink

        link = PayloadLink(
            self.bus,
            address,
            settings.timeout,
            emitter,
            self._timers,
            pipeline,
            on_error=settings.on_error,
            offload_above=settings.payload.offload_above,
            debug=settings.debug,
        )
        link.locks = self._lock_way
        return link

    async def _start_locks(self) -> None:
        """Start a lock manager: of all that serves, one for each backend, because their clients know them by these."""
        settings = self.settings
        kept = settings.backends if self.serve and settings.locks is None else (settings.locks_kept,)
        for each in kept:
            if each.type != "bus" and each.type not in LOCKLESS:
                await self.supervisor.start(
                    self._lock_address(each),
                    partial(self._lock_manager, each),
                    backend="locks",
                    visibility=self.visibility(each),
                )

    def _lock_address(self, kept: BackendSettings) -> Address:
        # By the backend, where nobody says otherwise: so all who share its values share its locks, and nobody else does.
        return LOCKS if self.settings.locks is not None else Address(f"{LOCKS}.{kept.name}")

    def _lock_manager(self, kept: BackendSettings) -> LockManager:
        from .guard_settings import GuardSettings, guard_policy  # As in `_build_store`.
        from .stores import build_lock_store

        if isinstance(kept, GuardSettings):
            store = build_lock_store(kept, namespace=self.settings.namespace, clock=self.clock)
            return LockManager(store, guard_policy(kept), shared=self.visibility(kept) == "shared")
        table = self._lock_tables.get(kept.name)  # One for all lives of the actor.
        if table is None:
            table = build_lock_store(kept, namespace=self.settings.namespace, clock=self.clock)
            self._lock_tables[kept.name] = table
        return LockManager(table)

    def visibility(self, backend: BackendSettings) -> Visibility:
        """Who reaches the actor of a backend."""
        if not self.serve:
            return "private"
        return "shared" if backend.type in SHARABLE else "sole"

    async def stop(self) -> None:
        """Stop every actor: each answers what it was sent. The node is left where it was entered."""
        await self.supervisor.stop()
        self._timers.close()

    def forked(self) -> None:
        """Become unusable in the child of a fork."""
        self._timers.forked()
        self.supervisor.forked()
        self.bus.forked()

    def _actor(self, backend: BackendSettings) -> BackendActor:
        from .guard_settings import guard_policy  # As in `_build_store`.

        # Whoever takes failures for misses is served from the start; whoever wants to know of them is told at once.
        opens_later = self.settings.on_error == "miss"
        return BackendActor(self._stores(backend), guard_policy(backend), opens_later=opens_later)

    def _pipeline(self, backend: BackendSettings) -> PayloadPipeline | None:
        if backend.name not in self._pipelines:
            from .payload_settings import build_pipeline  # As for stores.

            self._pipelines[backend.name] = build_pipeline(
                self.settings.payload, namespace=self.settings.namespace, by_reference=backend.by_reference
            )
        return self._pipelines[backend.name]

    def _build_store(self, backend: BackendSettings) -> InlineStore | BatchStore:
        from .stores import build_store  # Not before a node is opened: it brings pydantic with it.

        return build_store(backend, namespace=self.settings.namespace, clock=self.clock)


SHARABLE = frozenset({"redis", "memcached", "null"})
"""Types of backends whose data are not in the process: several workers may serve the same one."""


LOCKLESS = frozenset({"null", "plugin"})
"""Types of backends that keep no locks."""


def nats_bus(settings: Settings, clock: Clock = SYSTEM_CLOCK) -> LocalBus:
    """The bus over NATS that settings describe, not yet open. Raises `CacheConfigurationError` where nats-py is not
    installed."""
    assert settings.bus is not None
    try:
        nats = import_module("cachebus.bus.nats")
    except ModuleNotFoundError as error:
        raise CacheConfigurationError(f"a bus over NATS needs {error.name}: pip install 'cachebus[nats]'") from error
    options = settings.bus.nats_options(budget=settings.timeout, name=f"cachebus {settings.namespace}")
    bus: LocalBus = nats.NatsBus(settings.namespace, options, clock=clock, policy=settings.events.policy)
    return bus


def backend_address(name: str) -> Address:
    """The address of a backend's actor."""
    return Address(f"backend.{name}")


_open_nodes: weakref.WeakSet[Node] = weakref.WeakSet()


def _after_fork() -> None:
    for node in list(_open_nodes):
        node.forked()
    _open_nodes.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
