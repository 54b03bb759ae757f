"""A node: the bus, the supervisor and the actors of one process."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cachebus.actors import Alarm, BackendActor, BatchStore, InlineStore, RestartPolicy, Supervisor
from cachebus.bus import SYSTEM_CLOCK, Address, Clock, Emitter, LocalBus
from cachebus.messages import CacheClosed

from .link import Link

if TYPE_CHECKING:
    from .settings import BackendSettings, Settings

StoreFactory = Callable[["BackendSettings"], "InlineStore | BatchStore"]


class Node:
    """The cache's part of a process: a bus, and one supervised backend actor for each backend in the settings.

    An asynchronous context manager. `stores` makes the store of a backend, anew for each life of its actor; left out,
    stores are made as the settings say. `clock` is the source of time for everything in the node.
    """

    def __init__(self, settings: Settings, *, stores: StoreFactory | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self.settings = settings
        self.clock = clock
        self.bus = LocalBus(settings.namespace, clock=clock)
        self._stores = stores or self._build_store
        actors = settings.actors
        self.supervisor = Supervisor(
            self.bus,
            policy=RestartPolicy(
                actors.max_restarts, actors.restart_window, actors.restart_backoff, actors.restart_backoff_max
            ),
            capacity=actors.mailbox_capacity,
            inline_turns=actors.inline_turns,
        )
        self._alarm = Alarm(clock)
        self._resources = AsyncExitStack()
        self._closed = False

    def __repr__(self) -> str:
        names = ", ".join(each.name for each in self.settings.backends)
        return f"<Node {self.settings.namespace!r} with {names}>"

    async def __aenter__(self) -> Self:
        if self._closed:
            raise CacheClosed("this node was closed; make a new one")
        await self._resources.enter_async_context(self.supervisor)
        self.supervisor.start_soon(self._alarm.run)
        try:
            for backend in self.settings.backends:
                await self.supervisor.start(
                    backend_address(backend.name),
                    lambda backend=backend: BackendActor(self._stores(backend)),  # type: ignore[misc]
                    backend=backend.name,
                )
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
        return Link(self.bus, backend_address(backend.name), settings.timeout, emitter, self._alarm.set)

    async def stop(self) -> None:
        """Stop every actor: each answers what it was sent. The node is left where it was entered."""
        await self.supervisor.stop()

    def forked(self) -> None:
        """Become unusable in the child of a fork."""
        self.supervisor.forked()
        self.bus.forked()

    def _build_store(self, backend: BackendSettings) -> InlineStore | BatchStore:
        from .stores import build_store  # Not before a node is opened: it brings pydantic with it.

        return build_store(backend, namespace=self.settings.namespace, clock=self.clock)


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
