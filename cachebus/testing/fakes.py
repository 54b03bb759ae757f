"""Fakes: stores that fail, forget or translate on purpose, and a context for an actor without a bus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from operator import itemgetter
from typing import Any

from cachebus.actors.ports import SYSTEM_CLOCK, BatchStore, Clock, Gauges, InlineStore
from cachebus.adapters.chaos import ChaosStore
from cachebus.adapters.null import NullStore
from cachebus.bus import Address, Audience, Deferred
from cachebus.bus.codec import MSGPACK, decode, encode
from cachebus.messages import CacheError, Event, Failed, Message, Reply, Request

from .suite.base import carry_out

__all__ = ["ChaosStore", "CodecStore", "NullStore", "RecordingContext"]


class CodecStore:
    """A `BatchStore` in front of another store, that makes bytes of each request and each reply, and reads them again.

    What it changes is what a store in another process would change.
    """

    def __init__(self, inner: InlineStore | BatchStore, *, content_type: str = MSGPACK) -> None:
        self.inner = inner
        self.name = inner.name
        self.capabilities = inner.capabilities
        self._content_type = content_type

    def __repr__(self) -> str:
        return f"<CodecStore around {self.inner!r}, {self._content_type}>"

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    def gauges(self) -> Gauges:
        return self.inner.gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        replies: list[Reply | None] = [None] * len(batch)
        arrived: list[tuple[int, Request[Any]]] = []
        for place, request in enumerate(batch):
            try:
                arrived.append((place, self._across(request)))
            except CacheError as error:
                replies[place] = Failed.of(error)
        for (place, _), reply in zip(arrived, await carry_out(self.inner, [each for _, each in arrived]), strict=True):
            try:
                replies[place] = self._across(reply)
            except CacheError as error:
                replies[place] = Failed.of(error)
        return [reply for reply in replies if reply is not None]

    def _across(self, message: Any) -> Any:
        return decode(encode(message, self._content_type), self._content_type)


class RecordingContext:
    """A context for calling an actor's handlers without a bus. It remembers what the actor did with it.

    `emitted` are the events, `sent` the messages to itself with their delays that it has not called
    off, `called_off` how many it has, `deferred` the replies that it promised, `calls` the functions that it wants called and when, `beside` its work
    beside the turns. It listens to `kinds` of events; to all if none is named.
    """

    def __init__(self, *kinds: type[Event], address: str = "test", clock: Clock = SYSTEM_CLOCK) -> None:
        self.address = Address(address)
        self.clock = clock
        self.audience = Audience()
        self.deadline: float | None = None
        self.restarts = 0
        self.overloaded = 0
        self.traces: list[str | None] = []
        self.emitted: list[Event] = []
        self.sent: list[tuple[float, Message]] = []
        self.called_off = 0
        self.calls: list[tuple[float, Callable[[], None]]] = []
        self.beside: list[Callable[[], Awaitable[None]]] = []
        self.deferred: list[Deferred] = []
        self.crashes: list[BaseException] = []
        # Kept, because an audience forgets a listener that is gone.
        self._listening = self.audience.subscribe(kinds, 1)

    def emit(self, event: Event) -> None:
        """Remember an event, if it would have been published."""
        if type(event) in self.audience.kinds:
            self.emitted.append(event)

    def tell(self, kind: type[Event], /, *fields: Any, **named: Any) -> None:
        """As `emit`, for an event that is not built yet."""
        if kind in self.audience.kinds:
            build: Callable[..., Event] = kind
            self.emitted.append(build(*fields, **named))

    def defer(self) -> Deferred:
        """A promise that the test may attach a port to."""
        deferred = Deferred()
        self.deferred.append(deferred)
        return deferred

    def crash(self, error: BaseException) -> None:
        """Remember what has ended the actor's incarnation."""
        self.crashes.append(error)

    def send_after(self, delay: float, message: Message) -> Callable[[], None]:
        """Remember a message that the actor wants back later; the test hands it over."""
        entry = (delay, message)
        self.sent.append(entry)

        def call_off() -> None:
            self.called_off += 1
            if entry in self.sent:
                self.sent.remove(entry)

        return call_off

    def call_after(self, delay: float, function: Callable[[], None]) -> Callable[[], None]:
        """Remember a function that the actor wants called later; `ring` calls what is due."""
        entry = (self.clock.monotonic() + delay, function)
        self.calls.append(entry)

        def call_off() -> None:
            if entry in self.calls:
                self.calls.remove(entry)

        return call_off

    def ring(self) -> None:
        """Call what is due by the clock, in order, and what becomes due by that."""
        while due := sorted((each for each in self.calls if each[0] <= self.clock.monotonic()), key=itemgetter(0)):
            self.calls.remove(due[0])
            due[0][1]()

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Remember work that the actor wants done beside its turns; the test awaits it."""
        self.beside.append(function)
