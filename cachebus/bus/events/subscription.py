"""Event subscriptions, their registry, and the policy for keys and sampling."""

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
Redactor = Callable[[Event], Event]  # Returns the redacted event.

KeyForm: TypeAlias = Literal["plain", "hash", "none"]

UNSAMPLED: frozenset[EventKind] = frozenset({CacheSet, CacheDeleted, CacheCleared, TagsInvalidated, EventsMissed})
"""Kinds that are never sampled: a listener that keeps copies of values would become stale if it missed one."""

_HASH_BYTES = 16
_MAX_HASH_KEY_BYTES = 64  # The limit of BLAKE2b.
_LATE = object()


class Subscription:
    """The events for one listener, in the order in which they were published.

    Iterate over it with `async for`, or with `for` in a thread; one task or thread iterates. Iteration ends when the
    subscription or its bus is closed. At most `capacity` events are queued. Further events are dropped and counted in
    `dropped`.

    With `local`, events of other processes are left out. `redact` is applied to events of this process when the
    listener takes them, so that the listener bears the cost; events of other processes arrive redacted. `on_taken` is
    called after each event is taken.
    """

    def __init__(
        self,
        kinds: frozenset[EventKind],
        capacity: int,
        on_close: Callable[[Subscription], None],
        *,
        local: bool = False,
        redact: Redactor | None = None,
        on_taken: Callable[[], None] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"the capacity of a subscription must be at least 1, not {capacity!r}")
        self.kinds = kinds
        self.capacity = capacity
        self.local = local
        self.dropped = 0
        self.redact = redact
        self._events: deque[tuple[Event, Redactor | None]] = deque()
        self._waiter: ReplyPort | None = None
        self._on_close = on_close
        self._on_taken = on_taken
        self.closed = False

    def offer(self, event: Event, redact: Redactor | None = None) -> None:
        """Queue an event, or count it as dropped. `redact` is applied when the listener takes it. Thread-safe."""
        if self.closed:
            return
        if len(self._events) >= self.capacity:
            self.dropped += 1
            return
        self._events.append((event, redact))
        if (waiter := self._waiter) is not None:
            waiter.answer(None)

    def close(self) -> None:
        """Stop receiving events. Queued events can still be read. Safe to call twice.

        Example:
            ```python
            events = cache.events("cache_set")
            await cache.set("user:1", "Ada")
            events.close()
            assert [event.key for event in events] == ["user:1"]
            ```
        """
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
            # Set the waiter before checking again: an event offered in between either wakes it or is seen by the check.
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
        """Block this thread until the next event and return it.

        Return `None` after `timeout` seconds, or if the subscription is closed and empty.

        Example:
            ```python
            with cache.events("cache_set") as events:
                await cache.set("user:1", "Ada")
                assert events.next(timeout=1).key == "user:1"
            ```
        """
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
        event, redact = self._events.popleft()
        if self._on_taken is not None:
            self._on_taken()
        return event if redact is None else redact(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()


class SubscriptionRegistry:
    """The subscriptions of a bus.

    `kinds` holds the kinds of events that have listeners; check it before you build an event. `listened_to` holds the
    kinds that listeners of this process also want from other processes.
    """

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
            # While the lock is held, so that a concurrent subscriber cannot call it with a newer state first.
            watcher()

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Stop calling `watcher`. Does nothing if it is not registered."""
        with self._guard:
            self._watchers = tuple(each for each in self._watchers if each != watcher)

    def want_elsewhere(self, kinds: frozenset[EventKind]) -> None:
        """Set the kinds of events to build even without local listeners, because other processes may listen."""
        with self._guard:
            self._wanted_elsewhere = kinds
            self._arrange(self._subscriptions)

    def subscribe(
        self, what: tuple[EventKind | str, ...], capacity: int, *, local: bool = False, redact: Redactor | None = None
    ) -> Subscription:
        """Add a listener."""
        subscription = Subscription(event_kinds(what), capacity, self._drop, local=local, redact=redact)
        with self._guard:
            if self._closed:
                raise CacheClosed("the bus is closed")
            self._arrange((*self._subscriptions, subscription))
        return subscription

    def dispatch(self, event: Event) -> None:
        """Deliver an event of this process to its listeners."""
        for subscription in self._by_kind.get(type(event), ()):
            subscription.offer(event, subscription.redact)

    def dispatch_remote(self, event: Event) -> None:
        """Deliver an event of another process to its listeners."""
        for subscription in self._by_kind.get(type(event), ()):
            if not subscription.local:
                subscription.offer(event)

    @property
    def dropped(self) -> int:
        """Number of events that the current listeners have lost."""
        return sum(each.dropped for each in self._subscriptions)

    def close(self) -> None:
        """End every subscription."""
        with self._guard:
            self._closed = True
        for subscription in self._subscriptions:
            subscription.close()

    def forked(self) -> None:
        """Drop all listeners in a forked child, and the lock, which another thread of the parent may have held."""
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
    """Return the kinds of events that `what` selects.

    `what` contains event classes, which include their subclasses, or globs over the part of the wire name after
    `event.`. If it is empty, all kinds are selected. Heartbeats are only included if they are named explicitly.
    Raises `ValueError` if a name matches no kind.
    """
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
            raise ValueError(f"unknown kind of event {each!r}; the known kinds are {', '.join(sorted(known))}")
    return frozenset(chosen)


class EventPolicy:
    """The redaction of keys in events, and the share of events that is published.

    `keys` applies to events that leave the cache: to listeners of the application, and on NATS.

    * `plain` leaves keys unchanged.
    * `hash` replaces a key by 32 hexadecimal digits of its BLAKE2b hash, so that equal keys remain equal. If `hash_key`
      is set, the hash is keyed with it.
    * `none` leaves keys empty.

    `sample` maps globs over kinds to the share that is published, from 0 to 1. If several globs match a kind, the first
    one counts. `draw` returns random numbers in [0, 1).

    Raises `ValueError` if a glob matches no kind or one of `UNSAMPLED`, if a share is out of range, or if `hash_key` is
    too long for BLAKE2b.
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
        if len(hash_key) > _MAX_HASH_KEY_BYTES:
            raise ValueError(f"hash_key must have at most {_MAX_HASH_KEY_BYTES} bytes, not {len(hash_key)}")
        self.keys: KeyForm = keys
        self.redacts = keys != "plain"
        self._hash_key = hash_key
        self._draw = draw
        if keys == "hash":
            from hashlib import blake2b  # Imported here, because it loads OpenSSL and few applications need it.

            self._hash = partial(blake2b, digest_size=_HASH_BYTES, key=hash_key)
        self._shares = shares(sample or {})
        self.samples = bool(self._shares)

    def __repr__(self) -> str:
        sampled = {kind.WIRE_NAME: share for kind, share in self._shares.items()}
        return f"<EventPolicy keys={self.keys} {'keyed' if self._hash_key else 'unkeyed'} sample={sampled}>"

    def sampled(self, kind: EventKind) -> bool:
        """True if the current event of this kind is in the sample."""
        share = self._shares.get(kind)
        return share is None or self._draw() < share

    def key(self, key: str) -> str:
        """Return the redacted key. An empty key stays empty."""
        if not key or not self.redacts:
            return key
        return "" if self.keys == "none" else self._hash(key.encode("utf-8", "surrogatepass")).hexdigest()

    def redacted(self, event: Event) -> Event:
        """Return the event, or a copy with a redacted key if keys are redacted."""
        key: str | None = getattr(event, "key", None)
        changed: dict[str, Any] = {"key": self.key(key)} if key and self.redacts else {}
        return replace(event, **changed) if changed else event


def shares(sample: Mapping[str, float]) -> dict[EventKind, float]:
    """Return the share of each sampled kind. Raises `ValueError`."""
    found: dict[EventKind, float] = {}
    for glob, share in sample.items():
        if not 0 <= share <= 1:
            raise ValueError(f"the share of {glob!r} must be a number from 0 to 1, not {share!r}")
        for kind in event_kinds((glob,)):
            found.setdefault(kind, share)
    for kind in sorted(found, key=lambda each: each.WIRE_NAME):
        if kind in UNSAMPLED and found[kind] < 1:
            raise ValueError(
                f"{kind.WIRE_NAME.removeprefix('event.')} cannot be sampled: "
                "listeners that keep copies of values need every event"
            )
    return {kind: share for kind, share in found.items() if share < 1}


EVERYTHING = EventPolicy()  # Plain keys, no sampling.
