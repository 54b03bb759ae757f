"""A worker: a process that has backends and serves them on the bus, until it is asked to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from cachebus.bus import Subscription, origin
from cachebus.messages import ActorGaveUp, CacheConfigurationError, CacheConnectionError, Event

from .logs import say
from .node import Node, StoreFactory, backend_address

if TYPE_CHECKING:
    from .settings import Settings

logger = logging.getLogger("cachebus.worker")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TOLD = ("actor_*", "backend_*", "circuit_*")
_LOUD = frozenset({"actor_restarted", "actor_gave_up", "backend_disconnected", "circuit_opened"})
_COMMON = frozenset(Event.__struct_fields__)

_PAUSE, _PAUSE_MAX = 0.1, 2.0
"""Seconds: a pause at the start is drawn below the first, which doubles up to the second."""

# Of the grace, so that the supervisor's two rounds and the bus have theirs before it is spent.
_SHARE = 0.4

GAVE_UP, OUT_OF_TIME = 1, 1
"""Exit codes of a worker whose every actor stays down, and of one that could not end cleanly within its grace."""


class Worker:
    """Serves every backend of the settings until `stop` is called or a signal comes. Used once, on asyncio.

    Stopping drains: nothing new comes in, what has come in is answered, and the connections are closed, all within `grace`
    seconds; a second signal ends the process at once. At the start the bus may be away for `wait` seconds, and with
    `on_error="raise"` the backends too: whoever starts everything together need not start it in order. `stores` replaces
    the way that stores are made.
    """

    def __init__(
        self, settings: Settings, *, grace: float = 10.0, wait: float = 30.0, stores: StoreFactory | None = None
    ) -> None:
        if settings.bus is None:
            raise CacheConfigurationError("a worker needs a bus, such as --bus nats://localhost:4222")
        self.addresses = [backend_address(each.name) for each in settings.backends if each.type != "bus"]
        if not self.addresses:
            raise CacheConfigurationError("a worker needs a backend of its own, such as --backend primary=redis://host")
        self.settings = settings
        self.grace = grace
        self.wait = wait
        self._stores = stores
        self._node = self._new_node()
        self._stopping = asyncio.Event()
        self._code = 0

    def __repr__(self) -> str:
        return f"<Worker of {', '.join(self.addresses)}>"

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> int:
        """Serve, and return the exit code: 0 when everything was answered. `on_ready` is called when others reach us.

        Raises what starting the actors raises, such as `AddressInUse`, and `CacheConnectionError` when the wait is over.
        """
        loop = asyncio.get_running_loop()
        backstop: asyncio.TimerHandle | None = None
        try:
            with self._signals(loop):
                async with AsyncExitStack() as stack:
                    if not await self._started(stack):
                        return self._code
                    node = self._node
                    with node.bus.subscribe(*_TOLD, capacity=10_000) as heard:
                        say(
                            logger, logging.INFO, "serving", worker=origin(), namespace=self.settings.namespace,
                            addresses=",".join(f"{each}:{self._visibility(each)}" for each in self.addresses),
                        )  # fmt: skip
                        listening = asyncio.create_task(self._tell(heard))
                        on_ready()
                        await self._stopping.wait()
                        backstop = loop.call_later(self.grace, self._out_of_time)
                        say(logger, logging.INFO, "draining", worker=origin(), grace=self.grace)
                        await node.stop()
                    await listening
        finally:
            if backstop is not None:
                backstop.cancel()
        say(logger, logging.INFO, "stopped", worker=origin(), code=self._code)
        return self._code

    def stop(self) -> None:
        """Begin to drain; asked again, end at once. For the loop of `run`."""
        if self._stopping.is_set():
            say(logger, logging.WARNING, "asked twice to stop: ending at once", worker=origin())
            _end(OUT_OF_TIME)
        self._stopping.set()

    async def _started(self, stack: AsyncExitStack) -> bool:
        """Enter the node. `False` if we were asked to stop before what it needs was there."""
        loop = asyncio.get_running_loop()
        until, longest = loop.time() + self.wait, _PAUSE
        while True:
            try:
                await stack.enter_async_context(self._node)
            except CacheConnectionError as error:
                pause = random.uniform(0.0, longest)
                if loop.time() + pause >= until:
                    raise
                say(logger, logging.WARNING, "waiting", worker=origin(), reason=str(error))
            else:
                return True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            if self._stopping.is_set():
                say(logger, logging.INFO, "stopped", worker=origin(), code=self._code)
                return False
            longest = min(_PAUSE_MAX, longest * 2)
            self._node = self._new_node()

    def _new_node(self) -> Node:
        return Node(self.settings, serve=True, grace=self.grace * _SHARE, stores=self._stores)

    @contextmanager
    def _signals(self, loop: asyncio.AbstractEventLoop) -> Generator[None]:
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    def _visibility(self, address: str) -> str:
        return self._node.visibility(self.settings.backend(address.removeprefix("backend.")))

    async def _tell(self, heard: Subscription) -> None:
        down: set[str] = set()
        async for event in heard:
            if event.origin != origin():
                continue  # Another worker's, who logs it itself.
            kind = event.WIRE_NAME.removeprefix("event.")
            values = {name: getattr(event, name) for name in _own_fields(event)}
            level = logging.WARNING if kind in _LOUD else logging.INFO
            say(logger, level, kind.replace("_", " "), backend=event.backend, **values)
            if isinstance(event, ActorGaveUp):
                down.add(event.address)
                if down >= set(self.addresses) and not self._stopping.is_set():
                    self._code = GAVE_UP
                    say(logger, logging.ERROR, "every actor stays down: ending", worker=origin())
                    self._stopping.set()

    def _out_of_time(self) -> None:
        say(logger, logging.ERROR, "the grace is spent: ending with something left", worker=origin())
        _end(OUT_OF_TIME)


def _own_fields(event: Event) -> list[str]:
    return [name for name in event.__struct_fields__ if name not in _COMMON]


def _end(code: int) -> None:
    """End the process without any more ado: what should have been done with it was not done in time."""
    logging.shutdown()
    os._exit(code)
