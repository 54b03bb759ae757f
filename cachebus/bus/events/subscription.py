"""Listening to events: subscriptions, their registry, and the policy of keys and samples."""

from __future__ import annotations

import fnmatch
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, Self, TypeAlias

from msgspec.structs import replace

from cachebus.messages import (
    WIRE_NAMES,
    CacheCleared,
    CacheClosed,
    CacheDeleted,
    CacheSet,
    Event,
    EventsMissed,
    Heartbeat,
    TagsInvalidated,
)

from ..reply_ports import ReplyPort, ThreadPort, open_port

EventKind = type[Event]
Shown = Callable[[Event], Event]  # Returns an event as a listener may see it.

KeyForm: TypeAlias = Literal["plain", "hash", "none"]

UNSAMPLED: frozenset[EventKind] = frozenset({CacheSet, CacheDeleted, CacheCleared, TagsInvalidated, EventsMissed})
"""Kinds that are never sampled: a listener that keeps copies of values goes stale if it misses one."""

_HASH_BYTES = 16
_LONGEST_HASH_KEY = 64  # BLAKE2b takes no longer one.
_LATE = object()


class Subscription:
    """Events for one listener, in the order in which they were published. Iterate with `async for`, or in a thread with `for`.

    At most `capacity` events wait; more are lost to this listener and counted in `dropped`. Iteration ends when the
    subscription or its bus is closed. One task or thread iterates.

    `local` leaves out the events of other processes. `shown` redacts those of this process, when they are handed over and so
    at the listener's cost; other processes have redacted theirs. `on_taken` is called whenever an event was taken out.
    """

    def __init__(
        self,
        kinds: frozenset[EventKind],
        capacity: int,
        on_close: Callable[[Subscription], None],
        *,
        local: bool = False,
        shown: Shown | None = None,
        on_taken: Callable[[], None] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity of a subscription must be at least 1, not {capacity!r}")
        self.kinds = kinds
        self.capacity = capacity
        self.local = local
        self.dropped = 0
        self.shown = shown
        self._events: deque[tuple[Event, Shown | None]] = deque()
        self._waiter: ReplyPort | None = None
        self._on_close = on_close
        self._on_taken = on_taken
        self.closed = False

    def offer(self, event: Event, shown: Shown | None = None) -> None:
        """Take an event in, or count it as dropped. `shown` redacts it when it is handed over. From any thread."""
        if self.closed:
            return
        if len(self._events) >= self.capacity:
            self.dropped += 1
            return
        self._events.append((event, shown))
        if (waiter := self._waiter) is not None:
            waiter.answer(None)

    def close(self) -> None:
        """Take no more events. Those that wait can still be read. Safe to call twice."""
        if not self.closed:
            self.closed = True
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
            if self.closed:
                raise StopAsyncIteration
            # Announced before looking again: an event offered in between finds the waiter or is found by the look.
            port = self._waiter = open_port()
            try:
                if self._nothing_yet():
                    await port.wait()
            finally:
                self._waiter = None
        return self._pop()

    def __iter__(self) -> Iterator[Event]:
        return iter(self.next, None)

    def next(self, timeout: float | None = None) -> Event | None:
        """Block this thread for the next event, up to `timeout` seconds; `None` when there is none, or no more."""
        while self._nothing_yet():
            port = self._waiter = ThreadPort()
            is_late = self._nothing_yet() and port.wait(timeout, late=lambda: _LATE) is _LATE
            self._waiter = None
            if is_late:
                break
        return self._pop() if self._events else None

    def _nothing_yet(self) -> bool:
        return not self._events and not self.closed

    def _pop(self) -> Event:
        event, shown = self._events.popleft()
        if self._on_taken is not None:
            self._on_taken()
        return event if shown is None else shown(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()


class SubscriptionRegistry:
    """The registry of subscriptions. `kinds` holds the kinds of events with listeners. Look here before you build an
    event. `listened_to` holds those that listeners of this process want from other processes too."""

    def __init__(self) -> None:
        self.kinds: frozenset[EventKind] = frozenset()
        self._wanted_elsewhere: frozenset[EventKind] = frozenset()
        self.listened_to: frozenset[EventKind] = frozenset()
        self._subscriptions: tuple[Subscription, ...] = ()
        self._by_kind: dict[EventKind, tuple[Subscription, ...]] = {}
        self._closed = False
        self._guard = threading.Lock()
        self._watchers: tuple[Callable[[], None], ...] = ()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` now and whenever `kinds` changes."""
        with self._guard:
            self._watchers = (*self._watchers, watcher)
            watcher()  # With the lock, or it may see an older state than a subscriber calls it for meanwhile.

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` no more. Harmless if it is not called."""
        with self._guard:
            self._watchers = tuple(each for each in self._watchers if each != watcher)

    def want_elsewhere(self, kinds: frozenset[EventKind]) -> None:
        """Have events of these kinds built without listeners here too, because other processes may have some."""
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

    def dispatch(self, event: Event) -> None:
        """Offer an event of this process to its listeners."""
        for subscription in self._by_kind.get(type(event), ()):
            subscription.offer(event, subscription.shown)

    def dispatch_remote(self, event: Event) -> None:
        """Offer an event of another process to its listeners."""
        for subscription in self._by_kind.get(type(event), ()):
            if not subscription.local:
                subscription.offer(event)

    @property
    def dropped(self) -> int:
        """Events that the present listeners have lost."""
        return sum(each.dropped for each in self._subscriptions)

    def close(self) -> None:
        """End every subscription."""
        with self._guard:
            self._closed = True
        for subscription in self._subscriptions:
            subscription.close()

    def forked(self) -> None:
        """Forget the listeners, and a lock that another thread of the parent may have held."""
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
        self.listened_to = frozenset().union(*(each.kinds for each in subscriptions if not each.local))
        self.kinds = frozenset(by_kind) | self._wanted_elsewhere
        for watcher in self._watchers:
            watcher()


def event_kinds(what: tuple[EventKind | str, ...]) -> frozenset[EventKind]:
    """The kinds of events that `what` names: classes, with their subclasses, or globs over the part of the wire name
    after `event.`; all kinds if `what` is empty. Only the name `heartbeat` includes heartbeats. Raises `ValueError` for
    a name without a kind."""
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


class EventPolicy:
    """How keys look in events, and which share of the events is published.

    `keys` applies where an event leaves: to listeners of the application, and on NATS. `plain` keeps keys; `hash` makes
    them 32 hexadecimal digits of BLAKE2b, keyed with `hash_key` if there is one, so that equal keys look equal; `none`
    makes them empty. `sample` maps globs over kinds to the share that is published, from 0 to 1; of several globs that fit
    a kind, the first counts. `draw` returns numbers from 0 to below 1.

    Raises `ValueError` for a glob that fits nothing or one of `UNSAMPLED`, for a share out of range, and for a `hash_key`
    that BLAKE2b does not take.
    """

    __slots__ = ("_draw", "_hash", "_hash_key", "_shares", "keys", "redacts", "samples")

    def __init__(
        self,
        keys: KeyForm = "plain",
        hash_key: bytes = b"",
        sample: Mapping[str, float] | None = None,
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        if len(hash_key) > _LONGEST_HASH_KEY:
            raise ValueError(f"a hash_key has at most {_LONGEST_HASH_KEY} bytes")
        self.keys: KeyForm = keys
        self.redacts = keys != "plain"
        self._hash_key = hash_key
        self._draw = draw
        if keys == "hash":
            from hashlib import blake2b  # Here, because few need it, and OpenSSL comes with it.

            self._hash = partial(blake2b, digest_size=_HASH_BYTES, key=hash_key)
        self._shares = shares(sample or {})
        self.samples = bool(self._shares)

    def __repr__(self) -> str:
        sampled = {kind.WIRE_NAME: share for kind, share in self._shares.items()}
        return f"<EventPolicy keys={self.keys} {'keyed' if self._hash_key else 'unkeyed'} sample={sampled}>"

    def sampled(self, kind: EventKind) -> bool:
        """Whether to publish the present event of this kind."""
        share = self._shares.get(kind)
        return share is None or self._draw() < share

    def key(self, key: str) -> str:
        """A key as events show it. An empty key stays empty."""
        if not key or not self.redacts:
            return key
        return "" if self.keys == "none" else self._hash(key.encode("utf-8", "surrogatepass")).hexdigest()

    def redacted(self, event: Event) -> Event:
        """The event as it leaves: itself, or a copy with its key redacted."""
        key: str | None = getattr(event, "key", None)
        changed: dict[str, Any] = {"key": self.key(key)} if key and self.redacts else {}
        return replace(event, **changed) if changed else event


def shares(sample: Mapping[str, float]) -> dict[EventKind, float]:
    """The share of each kind that is sampled. Raises `ValueError`."""
    found: dict[EventKind, float] = {}
    for glob, share in sample.items():
        if not 0 <= share <= 1:
            raise ValueError(f"the share of {glob!r} is a number from 0 to 1, not {share!r}")
        for kind in event_kinds((glob,)):
            found.setdefault(kind, share)
    for kind in sorted(found, key=lambda each: each.WIRE_NAME):
        if kind in UNSAMPLED and found[kind] < 1:
            raise ValueError(
                f"{kind.WIRE_NAME.removeprefix('event.')} cannot be sampled: who keeps copies of values needs each one"
            )
    return {kind: share for kind, share in found.items() if share < 1}


EVERYTHING = EventPolicy()  # Plain keys, and every event.
