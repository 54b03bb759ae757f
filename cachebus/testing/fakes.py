"""Fakes: stores that fail, keep nothing or encode messages, and a context to test an actor without a bus."""

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
    """A `BatchStore` that encodes and decodes each request and reply of another store.

    So values change in the same way as for a store in another process.
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
    """A callback that a test calls, unless it was cancelled."""

    def __init__(self, callback: Callable[[], Any], cancel: Callable[[ManualTimer], None]) -> None:
        self.callback = callback
        self._cancel = cancel

    def cancel(self) -> None:
        """Cancel the callback."""
        self._cancel(self)


class ManualTimers:
    """`Timers` for tests. `fire` calls the callbacks that are due according to the clock."""

    def __init__(self, clock: Clock) -> None:
        self._now = clock.monotonic
        self._queue: TimerQueue[ManualTimer] = TimerQueue()

    def __len__(self) -> int:
        return len(self._queue)

    def due(self) -> float:
        """Return the time of the next callback, or infinity if there is none."""
        return self._queue.due()

    def call_at(self, when: float, callback: Callable[[], Any]) -> ManualTimer:
        """Schedule a callback, as `Timers.call_at` does."""
        timer = ManualTimer(callback, self._queue.discard)
        self._queue.set(timer, when)
        return timer

    def call_after(self, delay: float, callback: Callable[[], Any]) -> ManualTimer:
        """Schedule a callback, as `Timers.call_after` does."""
        return self.call_at(self._now() + delay, callback)

    def fire(self) -> None:
        """Call the callbacks that are due, in order, including those that become due meanwhile."""
        while (timer := self._queue.pop(self._now())) is not None:
            timer.callback()


class RecordingContext:
    """A context to call an actor's handlers without a bus. It records the actions of the actor.

    `emitted` has the events. `sent` has the delays and messages to itself that were not cancelled. `deferred` has the
    deferred replies, `timers` the scheduled callbacks, and `background` the background work. The context subscribes to
    `kinds` of events, or to all events if none are given.
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
        self.background: list[Callable[[], Awaitable[None]]] = []
        self.deferred: list[DeferredReply] = []
        self.crashes: list[BaseException] = []
        # A reference, because the registry removes a subscription that is garbage collected.
        self._listening = self.subscriptions.subscribe(kinds, 1)

    def publish(self, event: Event) -> None:
        """Record an event if it has a subscriber."""
        if type(event) in self.subscriptions.kinds:
            self.emitted.append(event)

    def emit(self, kind: type[Event], /, *fields: Any, **named: Any) -> None:
        """Build and record an event if it has a subscriber."""
        if kind in self.subscriptions.kinds:
            build: Callable[..., Event] = kind
            self.emitted.append(build(*fields, **named))

    def defer(self) -> DeferredReply:
        """Return a deferred reply, to which the test can attach a port."""
        deferred = DeferredReply()
        self.deferred.append(deferred)
        return deferred

    def crash(self, error: BaseException) -> None:
        """Record the error that ended the actor's incarnation."""
        self.crashes.append(error)

    def send_after(self, delay: float, message: Message) -> ManualTimer:
        """Record a delayed message to the actor. The test delivers it."""
        entry = (delay, message)
        self.sent.append(entry)
        return ManualTimer(lambda: None, lambda timer: self.sent.remove(entry) if entry in self.sent else None)

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Record background work of the actor. The test awaits it."""
        self.background.append(function)
