"""Fakes: stores that fail, forget or translate on purpose, and a context for an actor without a bus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cachebus.actors.ports import SYSTEM_CLOCK, BatchStore, Clock, Gauges, InlineStore
from cachebus.adapters.chaos import ChaosStore
from cachebus.adapters.null import NullStore
from cachebus.bus import Address, DeferredReply, SubscriptionRegistry, TimerQueue
from cachebus.bus.codec.messages import MSGPACK, decode, encode
from cachebus.messages import CacheError, Event, Failed, Message, Reply, Request

from .suite.base import carry_out

__all__ = ["ChaosStore", "CodecStore", "ManualTimers", "NullStore", "RecordingContext"]


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


class ManualTimer:
    """A callback that a test fires, unless it was cancelled."""

    def __init__(self, callback: Callable[[], Any], cancel: Callable[[ManualTimer], None]) -> None:
        self.callback = callback
        self._cancel = cancel

    def cancel(self) -> None:
        """Do not call back."""
        self._cancel(self)


class ManualTimers:
    """The `Timers` of a test: `fire` calls back what is due by the clock."""

    def __init__(self, clock: Clock) -> None:
        self._now = clock.monotonic
        self._queue: TimerQueue[ManualTimer] = TimerQueue()

    def __len__(self) -> int:
        return len(self._queue)

    def due(self) -> float:
        """The instant at which the first is due; infinity if there is none."""
        return self._queue.due()

    def call_at(self, when: float, callback: Callable[[], Any]) -> ManualTimer:
        """As `Timers.call_at`."""
        timer = ManualTimer(callback, self._queue.discard)
        self._queue.set(timer, when)
        return timer

    def call_after(self, delay: float, callback: Callable[[], Any]) -> ManualTimer:
        """As `Timers.call_after`."""
        return self.call_at(self._now() + delay, callback)

    def fire(self) -> None:
        """Call back what is due, in order, and what becomes due by that."""
        while (timer := self._queue.pop(self._now())) is not None:
            timer.callback()


class RecordingContext:
    """A context for calling an actor's handlers without a bus. It remembers what the actor did with it.

    `emitted` are the events, `sent` the messages to itself with their delays that it has not called
    off, `deferred` the replies that it promised, `timers` the callbacks that it has armed, `beside` its work beside the
    turns. It listens to `kinds` of events; to all if none is named.
    """

    def __init__(self, *kinds: type[Event], address: str = "test", clock: Clock = SYSTEM_CLOCK) -> None:
        self.address = Address(address)
        self.clock = clock
        self.subscriptions = SubscriptionRegistry()
        self.deadline: float | None = None
        self.restarts = 0
        self.overloaded = 0
        self.traces: list[str | None] = []
        self.emitted: list[Event] = []
        self.sent: list[tuple[float, Message]] = []
        self.timers = ManualTimers(clock)
        self.beside: list[Callable[[], Awaitable[None]]] = []
        self.deferred: list[DeferredReply] = []
        self.crashes: list[BaseException] = []
        # Kept, because an subscriptions forgets a listener that is gone.
        self._listening = self.subscriptions.subscribe(kinds, 1)

    def publish(self, event: Event) -> None:
        """Remember an event, if it would have been published."""
        if type(event) in self.subscriptions.kinds:
            self.emitted.append(event)

    def emit(self, kind: type[Event], /, *fields: Any, **named: Any) -> None:
        """As `emit`, for an event that is not built yet."""
        if kind in self.subscriptions.kinds:
            build: Callable[..., Event] = kind
            self.emitted.append(build(*fields, **named))

    def defer(self) -> DeferredReply:
        """A promise that the test may attach a port to."""
        deferred = DeferredReply()
        self.deferred.append(deferred)
        return deferred

    def crash(self, error: BaseException) -> None:
        """Remember what has ended the actor's incarnation."""
        self.crashes.append(error)

    def send_after(self, delay: float, message: Message) -> ManualTimer:
        """Remember a message that the actor wants back later; the test hands it over."""
        entry = (delay, message)
        self.sent.append(entry)
        return ManualTimer(lambda: None, lambda timer: self.sent.remove(entry) if entry in self.sent else None)

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Remember work that the actor wants done beside its turns; the test awaits it."""
        self.beside.append(function)
