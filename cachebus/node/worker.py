"""A worker: a process that serves its backends on the bus until it is asked to stop, and its log of one line for each fact."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cachebus.bus import Subscription, origin
from cachebus.messages import ActorGaveUp, CacheConfigurationError, CacheConnectionError, Event

from .node import Node, StoreFactory, backend_address

if TYPE_CHECKING:
    from cachebus.settings import Settings

logger = logging.getLogger("cachebus.node.worker")

LogForm: TypeAlias = Literal["text", "json"]

_FIELDS = "cachebus_fields"
"""The attribute of a log record that holds its named values."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOUD = frozenset({"actor_restarted", "actor_gave_up", "backend_disconnected", "circuit_opened"})

_PAUSE, _PAUSE_MAX = 0.1, 2.0
"""Seconds: a pause at the start is drawn below the first, which doubles up to the second."""

_SHARE = 0.4
"""Of the grace, so that the supervisor's two rounds and the bus have theirs before it is spent."""

GAVE_UP, OUT_OF_TIME = 1, 1
"""Exit codes of a worker whose every actor stays down, and of one that could not end cleanly within its grace."""


class Worker:
    """Serves every backend of the settings until `stop` is called or a signal comes. Used once, on asyncio.

    Stopping drains: nothing new comes in, what has come in is answered, and the connections are closed, all within `grace`
    seconds; a second signal ends the process at once. At the start the bus may be away for `wait` seconds, and with
    `on_error="raise"` the backends too, so that processes can be started in any order. `stores` replaces the way that
    stores are made.
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
        self._new_node = partial(Node, settings, serve=True, grace=grace * _SHARE, stores=stores)
        self._node = self._new_node()
        self._stopping = asyncio.Event()
        self._code = 0

    def __repr__(self) -> str:
        return f"<Worker of {', '.join(self.addresses)}>"

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> int:
        """Serve, and return the exit code: 0 if everything was answered. `on_ready` is called when others can reach us.

        Raises what starting the actors raises, such as `AddressInUse`, and `CacheConnectionError` when the wait is over.
        """
        loop = asyncio.get_running_loop()
        backstop: asyncio.TimerHandle | None = None
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            async with AsyncExitStack() as stack:
                if not await self._started(stack):
                    return self._code
                with self._node.bus.subscribe("actor_*", "backend_*", "circuit_*", capacity=10_000) as heard:
                    visibility = self._node.visibility
                    own = [each for each in self.settings.backends if each.type != "bus"]
                    addresses = ",".join(f"{backend_address(each.name)}:{visibility(each)}" for each in own)
                    self._say("serving", namespace=self.settings.namespace, addresses=addresses)
                    listening = asyncio.create_task(self._log_events(heard))
                    on_ready()
                    await self._stopping.wait()
                    why = "the grace is spent: ending with something left"
                    backstop = loop.call_later(self.grace, self._end, why, logging.ERROR)
                    self._say("draining", grace=self.grace)
                    await self._node.stop()
                await listening
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)
            if backstop is not None:
                backstop.cancel()
        self._say("stopped", code=self._code)
        return self._code

    def stop(self) -> None:
        """Begin to drain; asked again, end at once. For the loop of `run`."""
        if self._stopping.is_set():
            self._end("asked twice to stop: ending at once", logging.WARNING)
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
                self._say("waiting", logging.WARNING, reason=str(error))
            else:
                return True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            if self._stopping.is_set():
                self._say("stopped", code=self._code)
                return False
            longest = min(_PAUSE_MAX, longest * 2)
            self._node = self._new_node()

    async def _log_events(self, heard: Subscription) -> None:
        down: set[str] = set()
        async for event in heard:
            if event.origin != origin():
                continue  # Another worker logs its own.
            kind = event.WIRE_NAME.removeprefix("event.")
            level = logging.WARNING if kind in _LOUD else logging.INFO
            values = {"backend": event.backend, **own_fields(event)}
            logger.log(level, kind.replace("_", " "), extra={_FIELDS: values})
            if isinstance(event, ActorGaveUp):
                down.add(event.address)
                if down >= set(self.addresses) and not self._stopping.is_set():
                    self._code = GAVE_UP
                    self._say("every actor stays down: ending", logging.ERROR)
                    self._stopping.set()

    def _say(self, message: str, level: int = logging.INFO, **values: Any) -> None:
        logger.log(level, message, extra={_FIELDS: {"worker": origin(), **values}})

    def _end(self, why: str, level: int) -> None:
        """End the process at once, with requests unanswered."""
        self._say(why, level)
        logging.shutdown()
        os._exit(OUT_OF_TIME)


class StructuredFormatter(logging.Formatter):
    """Formats a record as one line: line breaks and control characters are escaped."""

    def __init__(self, form: LogForm = "text") -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        if self._form == "json":
            return json.dumps(values, default=str)
        return " ".join(f"{name}={_word(value)}" for name, value in values.items())


def log_to_stderr(form: LogForm, level: str) -> None:
    """Send the logs of this process to standard error, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(StructuredFormatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def own_fields(event: Event) -> dict[str, Any]:
    """Return the fields of an event that not every event has."""
    return {name: getattr(event, name) for name in event.__struct_fields__ if name not in Event.__struct_fields__}


def _word(value: Any) -> str:
    text = str(value)
    if text and text.isascii() and text.isprintable() and not set(text) & set(' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
