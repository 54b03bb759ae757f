"""Listening: bounded queues of events, and the record of what anybody wants to hear."""

from __future__ import annotations

import fnmatch
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from cachebus.messages import WIRE_NAMES, CacheClosed, Event, Heartbeat

from .ports import Port, ThreadPort, open_port

EventKind = type[Event]
Shown = Callable[[Event], Event]
"""Makes of an event what a listener may see."""

_LATE = object()


class Subscription:
    """Events for one listener, in the order they were published: iterate with `async for`, or with `for` in a thread.

    At most `capacity` wait; what comes on top is lost to this listener and counted in `dropped`. Iteration ends when
    the subscription or its bus is closed. One task or thread iterates.

    `local` leaves out what other processes tell. `shown` redacts what this process tells, when it is handed over and so at
    the listener's cost; what others tell they have redacted themselves.
    """

    def __init__(
        self,
        kinds: frozenset[EventKind],
        capacity: int,
        on_close: Callable[[Subscription], None],
        *,
        local: bool = False,
        shown: Shown | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity of a subscription must be at least 1, not {capacity!r}")
        self.kinds = kinds
        self.capacity = capacity
        self.local = local
        self.dropped = 0
        self.shown = shown
        self._events: deque[tuple[Event, Shown | None]] = deque()
        self._waiter: Port | None = None
        self._on_close = on_close
        self._closed = False

    def offer(self, event: Event, shown: Shown | None = None) -> None:
        """Take an event in, or count it as dropped. `shown` redacts it when it is handed over. From any thread."""
        if self._closed:
            return
        if len(self._events) >= self.capacity:
            self.dropped += 1
            return
        self._events.append((event, shown))
        if (waiter := self._waiter) is not None:
            waiter.answer(None)

    def close(self) -> None:
        """Take no more events. What waits can still be read. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            if (waiter := self._waiter) is not None:
                waiter.answer(None)

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        return f"<Subscription {len(self._events)}/{self.capacity} waiting, {self.dropped} dropped>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            port = open_port()
            # Announced before looking again: an event offered in between finds the waiter or is found by the look.
            self._waiter = port
            try:
                if self._nothing_yet():
                    await port.wait()
            finally:
                self._waiter = None
        event, shown = self._events.popleft()
        return event if shown is None else shown(event)

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event

    def next(self, timeout: float | None = None) -> Event | None:
        """Block this thread for the next event, up to `timeout` seconds; `None` when there is none, or no more."""
        while not self._events:
            if self._closed:
                return None
            port = ThreadPort()
            self._waiter = port
            late = self._wait_in_thread(port, timeout)
            self._waiter = None
            if late:
                return self._pop() if self._events else None
        return self._pop()

    def _pop(self) -> Event:
        event, shown = self._events.popleft()
        return event if shown is None else shown(event)

    def _nothing_yet(self) -> bool:
        return not self._events and not self._closed

    def _wait_in_thread(self, port: ThreadPort, timeout: float | None) -> bool:
        if not self._nothing_yet():
            return False
        return port.wait(timeout, late=lambda: _LATE) is _LATE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class Audience:
    """Who listens to what.

    `kinds` holds the kinds of events that anybody wants: empty, there is nothing to build. Speakers look here first.
    """

    __slots__ = (
        "_by_kind",
        "_closed",
        "_guard",
        "_subscriptions",
        "_wanted_elsewhere",
        "_wanted_of_others",
        "_watchers",
        "kinds",
    )

    def __init__(self) -> None:
        self.kinds: frozenset[EventKind] = frozenset()
        self._wanted_elsewhere: frozenset[EventKind] = frozenset()
        self._wanted_of_others: frozenset[EventKind] = frozenset()
        self._subscriptions: tuple[Subscription, ...] = ()
        self._by_kind: dict[EventKind, tuple[Subscription, ...]] = {}
        self._closed = False
        self._guard = threading.Lock()
        self._watchers: tuple[Callable[[], None], ...] = ()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` now and whenever `kinds` changes."""
        with self._guard:
            self._watchers = (*self._watchers, watcher)
            watcher()  # With the lock, or what it saw may be older than what a subscriber tells it meanwhile.

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` no more. Harmless if it is not called."""
        with self._guard:
            self._watchers = tuple(each for each in self._watchers if each != watcher)

    @property
    def listened_to(self) -> frozenset[EventKind]:
        """The kinds that listeners of this process want to hear from others too."""
        return self._wanted_of_others

    def want_elsewhere(self, kinds: frozenset[EventKind]) -> None:
        """Have events of these kinds built whoever listens here, because others may, where nobody can see them."""
        with self._guard:
            self._wanted_elsewhere = kinds
            self._arrange(self._subscriptions)

    def subscribe(
        self, what: tuple[EventKind | str, ...], capacity: int, *, local: bool = False, shown: Shown | None = None
    ) -> Subscription:
        """Add a listener."""
        subscription = Subscription(event_kinds(what), capacity, self._drop, local=local, shown=shown)
        with self._guard:
            if self._closed:
                raise CacheClosed("the bus is closed")
            self._arrange((*self._subscriptions, subscription))
        return subscription

    def hear(self, event: Event) -> None:
        """Offer an event of this process to whoever wants it."""
        for subscription in self._by_kind.get(type(event), ()):
            subscription.offer(event, subscription.shown)

    def hear_foreign(self, event: Event) -> None:
        """Offer an event of another process to whoever wants it."""
        for subscription in self._by_kind.get(type(event), ()):
            if not subscription.local:
                subscription.offer(event)

    @property
    def dropped(self) -> int:
        """Events that listeners of now have lost."""
        return sum(each.dropped for each in self._subscriptions)

    def close(self) -> None:
        """End every subscription."""
        with self._guard:
            self._closed = True
        for subscription in self._subscriptions:
            subscription.close()

    def forked(self) -> None:
        """Forget the listeners, and a lock that nobody in this process will release."""
        self._guard = threading.Lock()
        self._wanted_elsewhere = frozenset()
        self._arrange(())

    def _drop(self, subscription: Subscription) -> None:
        with self._guard:
            self._arrange(tuple(each for each in self._subscriptions if each is not subscription))

    def _arrange(self, subscriptions: tuple[Subscription, ...]) -> None:
        by_kind: dict[EventKind, tuple[Subscription, ...]] = {}
        for subscription in subscriptions:
            for kind in subscription.kinds:
                by_kind[kind] = (*by_kind.get(kind, ()), subscription)
        self._subscriptions = subscriptions
        self._by_kind = by_kind
        self._wanted_of_others = frozenset(
            kind for kind, listeners in by_kind.items() if not all(each.local for each in listeners)
        )
        self.kinds = frozenset(by_kind) | self._wanted_elsewhere
        for watcher in self._watchers:
            watcher()


def event_kinds(what: tuple[EventKind | str, ...]) -> frozenset[EventKind]:
    """The kinds of events that `what` names: classes, which stand for those that inherit from them too, or globs over
    the part of the wire name after `event.`; all if `what` is empty. Heartbeats are meant by their own name only. Raises
    `ValueError` for what names none."""
    known = {name.removeprefix("event."): kind for name, kind in WIRE_NAMES.items() if issubclass(kind, Event)}
    chosen: set[EventKind] = set()
    for each in what or ("*",):
        if each is Heartbeat or each in {"heartbeat", "event.heartbeat"}:
            found: list[EventKind] = [Heartbeat]
        elif not isinstance(each, str):
            found = [kind for kind in known.values() if issubclass(kind, each) and kind is not Heartbeat]
        else:
            glob = each.removeprefix("event.")
            found = [kind for name, kind in known.items() if fnmatch.fnmatchcase(name, glob) and kind is not Heartbeat]
        if found:
            chosen.update(found)
        else:
            raise ValueError(f"no kind of event is called {each!r}; there are {', '.join(sorted(known))}")
    return frozenset(chosen)
