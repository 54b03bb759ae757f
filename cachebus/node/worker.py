"""A worker, which serves backends on the bus until it is stopped, and its structured log."""

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
"""Attribute of a log record that holds its named values."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_WARNING_EVENTS = frozenset({"actor_restarted", "actor_gave_up", "backend_disconnected", "circuit_opened"})

_PAUSE, _PAUSE_MAX = 0.1, 2.0
"""Startup backoff, in seconds. Each pause is random, below a limit that doubles from the first value to the second."""

_GRACE_FRACTION = 0.4
"""Fraction of the grace period for each of the supervisor's two stop rounds. The rest is left to the bus."""

GAVE_UP, OUT_OF_TIME = 1, 1
"""Exit codes: all actors failed permanently; the worker could not stop cleanly within its grace period."""


class Worker:
    """Server of all backends of the settings, until `stop` is called or a signal arrives. Single use, on asyncio.

    When stopping, the worker drains: it accepts no new requests, answers pending ones and closes its connections,
    within `grace` seconds. A second signal ends the process immediately.

    At startup, the worker waits up to `wait` seconds for the bus, so that processes can start in any order. With
    `on_error="raise"`, it also waits for the backends. `stores` replaces the store factory.
    """

    def __init__(
        self, settings: Settings, *, grace: float = 10.0, wait: float = 30.0, stores: StoreFactory | None = None
    ) -> None:
        if settings.bus is None:
            raise CacheConfigurationError("a worker needs a bus, such as --bus nats://localhost:4222")
        self.addresses = [backend_address(each.name) for each in settings.backends if each.type != "bus"]
        if not self.addresses:
            raise CacheConfigurationError("a worker needs a backend to serve, such as --backend primary=redis://host")
        self.settings = settings
        self.grace = grace
        self.wait = wait
        self._new_node = partial(Node, settings, serve=True, grace=grace * _GRACE_FRACTION, stores=stores)
        self._node = self._new_node()
        self._stopping = asyncio.Event()
        self._code = 0

    def __repr__(self) -> str:
        return f"<Worker of {', '.join(self.addresses)}>"

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> int:
        """Serve until stopped, and return the exit code: 0 if every request was answered.

        `on_ready` is called once other processes can reach the backends. Raises `CacheConnectionError` if the bus is
        not available within `wait` seconds, and any error of starting the actors, such as `AddressInUse`.
        """
        loop = asyncio.get_running_loop()
        backstop: asyncio.TimerHandle | None = None
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            async with AsyncExitStack() as stack:
                if not await self._started(stack):
                    return self._code
                with self._node.bus.subscribe("actor_*", "backend_*", "circuit_*", capacity=10_000) as events:
                    visibility = self._node.visibility
                    own = [each for each in self.settings.backends if each.type != "bus"]
                    addresses = ",".join(f"{backend_address(each.name)}:{visibility(each)}" for each in own)
                    self._log("serving", namespace=self.settings.namespace, addresses=addresses)
                    listening = asyncio.create_task(self._log_events(events))
                    on_ready()
                    await self._stopping.wait()
                    reason = "the grace period has expired: exiting with unanswered requests"
                    backstop = loop.call_later(self.grace, self._exit, reason, logging.ERROR)
                    self._log("draining", grace=self.grace)
                    await self._node.stop()
                await listening
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)
            if backstop is not None:
                backstop.cancel()
        self._log("stopped", code=self._code)
        return self._code

    def stop(self) -> None:
        """Start to drain. A second call ends the process immediately. Call it on the loop of `run`."""
        if self._stopping.is_set():
            self._exit("second request to stop: exiting immediately", logging.WARNING)
        self._stopping.set()

    async def _started(self, stack: AsyncExitStack) -> bool:
        """Enter the node, retrying until the bus is available. Returns False if `stop` was called before that."""
        loop = asyncio.get_running_loop()
        until, longest = loop.time() + self.wait, _PAUSE
        while True:
            try:
                await stack.enter_async_context(self._node)
            except CacheConnectionError as error:
                pause = random.uniform(0.0, longest)
                if loop.time() + pause >= until:
                    raise
                self._log("waiting", logging.WARNING, reason=str(error))
            else:
                return True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            if self._stopping.is_set():
                self._log("stopped", code=self._code)
                return False
            longest = min(_PAUSE_MAX, longest * 2)
            self._node = self._new_node()

    async def _log_events(self, events: Subscription) -> None:
        down: set[str] = set()
        async for event in events:
            if event.origin != origin():
                continue  # Each worker logs only its own events.
            kind = event.WIRE_NAME.removeprefix("event.")
            level = logging.WARNING if kind in _WARNING_EVENTS else logging.INFO
            values = {"backend": event.backend, **own_fields(event)}
            logger.log(level, kind.replace("_", " "), extra={_FIELDS: values})
            if isinstance(event, ActorGaveUp):
                down.add(event.address)
                if down >= set(self.addresses) and not self._stopping.is_set():
                    self._code = GAVE_UP
                    self._log("all actors have failed permanently: exiting", logging.ERROR)
                    self._stopping.set()

    def _log(self, message: str, level: int = logging.INFO, **values: Any) -> None:
        logger.log(level, message, extra={_FIELDS: {"worker": origin(), **values}})

    def _exit(self, reason: str, level: int) -> None:
        """End the process immediately, even with unanswered requests."""
        self._log(reason, level)
        logging.shutdown()
        os._exit(OUT_OF_TIME)


class StructuredFormatter(logging.Formatter):
    """Formatter that writes each record as one line and escapes line breaks and control characters."""

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
        return " ".join(f"{name}={_quoted(value)}" for name, value in values.items())


def log_to_stderr(form: LogForm, level: str) -> None:
    """Log to standard error, one line per record."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(StructuredFormatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def own_fields(event: Event) -> dict[str, Any]:
    """Return the fields that are specific to the kind of an event."""
    return {name: getattr(event, name) for name in event.__struct_fields__ if name not in Event.__struct_fields__}


def _quoted(value: Any) -> str:
    text = str(value)
    if text and text.isascii() and text.isprintable() and not set(text) & set(' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
