"""The ports that adapters implement: what a store must do to stand behind a `BackendActor`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from cachebus.bus import SYSTEM_CLOCK, Clock, DeferredReply, TimerQueue, running_loop, running_timers
from cachebus.bus.spawn import spawn
from cachebus.messages import LockGranted, RemovalCause, Reply, Request, WatchLease

from .runtime.turns import is_interruption

__all__ = [
    "NO_PROGRESS",
    "SLOWEST_LINE",
    "SYSTEM_CLOCK",
    "BatchStore",
    "Capabilities",
    "Clock",
    "DeferredReply",
    "Gauges",
    "InlineLockStore",
    "InlineStore",
    "LeaseNotifyingStore",
    "LeasingStore",
    "LockListener",
    "LockStore",
    "OnReplies",
    "PipelinedStore",
    "Progress",
    "ReadListener",
    "RemovalListener",
    "Store",
    "Timer",
    "TimerQueue",
    "Timers",
    "WriteListener",
    "is_interruption",
    "running_loop",
    "running_timers",
    "spawn",
]


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """The abilities of a store. Anything else is answered with `CapabilityError`, never with a quiet 0 or False. A limit
    of `None` is none. Times to live are rounded up to `ttl_resolution` seconds; 0 is a millisecond or less."""

    patterns: bool = False
    tags: bool = False
    compare_and_set: bool = False
    counters: bool = False
    leases: bool = False
    rate_limits: bool = False
    locks: bool = False
    max_key_bytes: int | None = None
    max_value_bytes: int | None = None
    ttl_resolution: float = 0.0

    def names(self) -> tuple[str, ...]:
        """The capabilities that the store has, by name."""
        return tuple(name for name in self.__struct_fields__ if getattr(self, name) is True)


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """How full a store is, and what it did since it was made. A bound of `None` is none; weights are bytes. An inline store
    counts its hits, misses, sets and removals itself; the actor of a batch store counts them from the replies."""

    hits: int = 0
    misses: int = 0
    sets: int = 0
    entries: int = 0
    max_entries: int | None = None
    weight: int = 0
    max_bytes: int | None = None
    removals: dict[RemovalCause, int] = {}


ReadListener = Callable[[str, bool], None]
"""Called for each key that is read, with whether it had a live value."""

WriteListener = Callable[[str, float, float | None, tuple[str, ...]], None]
"""Called for each value that is stored: key, version, seconds to live, tags."""

RemovalListener = Callable[[str, RemovalCause], None]
"""Called for each value that a store removes by itself or on request, except by `Clear`, which is one fact."""


class Timer(Protocol):
    """A callback that is armed."""

    def cancel(self) -> None:
        """Do not call back. From any thread; once it was called back or cancelled, this does nothing."""


class Timers(Protocol):
    """Arms callbacks on an event loop, from any thread, finalizers included. Instants are on the owner's monotonic clock.

    A callback must not wait, and runs in no task: what needs one is started with `Context.start_soon`. What it raises is
    logged and counted, and harms no other. `running_timers` gives timers on the loop that runs in this thread.
    """

    def call_at(self, when: float, callback: Callable[[], Any], /) -> Timer:
        """Call `callback` when the clock has reached `when`."""
        ...

    def call_after(self, delay: float, callback: Callable[[], Any], /) -> Timer:
        """Call `callback` after `delay` seconds."""
        ...


class Store(Protocol):
    """A technology that keeps values, as its actor sees it. `name` is that of the technology (`memory`, `redis`)."""

    name: str
    capabilities: Capabilities

    async def open(self) -> None:
        """Make ready, connections included. Raises `CacheConnectionError` when the store cannot be reached; then it may
        be called again."""

    async def close(self) -> None:
        """Give back what `open` took. Safe to call twice."""

    def gauges(self) -> Gauges:
        """How full the store is, without asking a server."""
        ...


@runtime_checkable
class BatchStore(Store, Protocol):
    """A store that must wait for its answers, and likes many questions at once."""

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        """Carry out a batch and return one reply an operation, in order. The error of one operation is its own `Failed`;
        an error of all of them is raised."""
        ...


OnReplies = Callable[[Sequence[Reply]], None]
"""Takes the replies of a batch, one an operation, in order; called once, on the store's event loop."""


class Progress(Protocol):
    """What a batch under way is carried by: `last_progress` is when bytes last moved, on the monotonic clock."""

    @property
    def last_progress(self) -> float: ...


SLOWEST_LINE = 1e6
"""Bytes a second below which a backend counts as not answering."""


class _NoProgress:
    last_progress = float("-inf")


NO_PROGRESS = _NoProgress()
"""Of a store that cannot see bytes move."""


@runtime_checkable
class PipelinedStore(BatchStore, Protocol):
    """A batch store that can have several batches under way: the turn of its actor ends when a batch is sent.

    Batches take effect in the order of their submission; the next is submitted when the one before it was sent. A batch
    of more than `max_batch` requests is better sent in two: one is prepared while the other is carried out. Requests of
    the `long_running` kinds take many round trips. Each goes in a batch of its own, so that nothing else waits for it.
    """

    max_batch: int
    long_running: frozenset[type[Request[Any]]]

    def try_submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress | None:
        """Send a batch if nothing has to be waited for; else return `None`. Called on the store's event loop. `on_replies`
        is called once, perhaps before this returns. Raises a `CacheError` if nothing was sent, and does not call it."""
        ...

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        """As `try_submit`, waiting for a connection and for room."""
        ...


@runtime_checkable
class LeaseNotifyingStore(Store, Protocol):
    """A store whose server says when a lease has ended, so that callers can wait for it."""

    def watch(self, request: WatchLease, on_reply: Callable[[Reply], None]) -> None:
        """Call `on_reply` once, with a reply to `request`, now or later. Called on the store's event loop; does not wait."""


@runtime_checkable
class InlineStore(Store, Protocol):
    """A store that never waits, so that its operations run on the caller's stack. The four listeners may be `None`, which
    costs a reader one comparison. `on_due` is called when the store's next expiry has become an earlier one."""

    @property
    def on_read(self) -> ReadListener | None: ...
    @on_read.setter
    def on_read(self, hook: ReadListener | None, /) -> None: ...

    on_write: WriteListener | None
    on_removal: RemovalListener | None
    on_due: Callable[[float], None] | None

    def repair(self) -> Collection[DeferredReply]:
        """Put right what a verb left half done that was interrupted at any instruction, and return the replies that are
        still owed. What was being written may be missing, and nothing is wrong. May be interrupted and called again."""
        ...

    def verb(self, kind: type[Request[Any]]) -> Callable[[Any], Reply] | None:
        """The function that carries out requests of one kind, or `None` if there is none. It raises `CacheError`s."""

    def next_expiry(self) -> float | None:
        """When the next entry may be due, on the store's monotonic clock; `None` while nothing expires."""

    def sweep(self, limit: int) -> int:
        """Remove entries whose time is up, looking at no more than `limit` of them, and say how many went."""
        ...


@runtime_checkable
class LeasingStore(InlineStore, Protocol):
    """An inline store that lets callers wait for a load: its verb of `GetOrLease` may return what `defer` makes instead of
    a reply. While `defer` is `None`, no caller waits."""

    defer: Callable[[], DeferredReply] | None


class LockListener(Protocol):
    """Takes the news of a lock store for the callers that wait, on the store's event loop."""

    def granted(self, name: str, ticket: str, grant: LockGranted) -> None:
        """A ticket that waited holds the lock now."""

    def look(self, name: str, ticket: str = "", delay: float = 0.0) -> None:
        """A ticket may hold the lock now, or its lease may be over: ask again after `delay` seconds."""

    def look_everywhere(self) -> None:
        """Something may have been missed: ask again for every waiter."""

    def expired(self, name: str, owner: str, token: int) -> None:
        """The time of a holder has run out."""


@runtime_checkable
class LockStore(Protocol):
    """Where locks are kept, as the `LockManager` sees it: it carries out `AcquireLock`, `RenewLock`, `ReleaseLock` and
    `DescribeLock`, each at once. One that waits for its answers is a `BatchStore` too.

    If `poll` is `None`, it keeps the queue: an `AcquireLock` that waits is answered `LockQueued`, and `listener` hears when its
    turn may have come. Other stores answer `LockDenied`. They are asked again for the first waiter, after `poll` seconds
    or several times as many.
    """

    name: str
    poll: float | None
    listener: LockListener | None


@runtime_checkable
class InlineLockStore(LockStore, Protocol):
    """A lock store that never waits."""

    def decide(self, request: Request[Any]) -> Reply:
        """Carry out one request. Raises `CacheError`."""
        ...

    def next_expiry(self) -> float | None:
        """When the time of the next holder may be up, on the store's monotonic clock."""

    def repair(self) -> None:
        """Put right what was left half done by a call that was interrupted at any instruction."""

    def sweep(self) -> None:
        """Take their locks from holders whose time is up."""
