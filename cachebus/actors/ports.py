"""The ports that adapters implement: stores behind a `BackendActor`, and lock stores behind a `LockManager`."""

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
    """The operations that a store supports, and its limits.

    An unsupported operation fails with `CapabilityError`; it never returns 0 or `False` instead. A limit of `None`
    means unlimited. Times to live are rounded up to `ttl_resolution` seconds; 0 means a millisecond or less.
    """

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
        """Return the names of the supported capabilities."""
        return tuple(name for name in self.__struct_fields__ if getattr(self, name) is True)


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a store and its counters since it was created.

    A bound of `None` means unlimited; weights are in bytes. An inline store counts its own hits, misses, sets and
    removals. For a batch store, the actor counts them from the replies.
    """

    hits: int = 0
    misses: int = 0
    sets: int = 0
    entries: int = 0
    max_entries: int | None = None
    weight: int = 0
    max_bytes: int | None = None
    removals: dict[RemovalCause, int] = {}


ReadListener = Callable[[str, bool], None]
"""Called for each key that is read: key, and `True` if it had a live value."""

WriteListener = Callable[[str, float, float | None, tuple[str, ...]], None]
"""Called for each value that is stored: key, version, time to live in seconds, tags."""

RemovalListener = Callable[[str, RemovalCause], None]
"""Called for each value that is removed, by the store itself or on request. `Clear` does not call it."""


class Timer(Protocol):
    """A scheduled callback."""

    def cancel(self) -> None:
        """Cancel the callback. Thread-safe. Does nothing if the callback has run or was cancelled."""


class Timers(Protocol):
    """Schedules callbacks on an event loop. Instants are on the owner's monotonic clock.

    Callbacks can be scheduled from any thread, and also from finalizers. A callback must not wait, and it runs
    outside of any task; use `Context.start_soon` to start one. If a callback raises, the error is logged and counted,
    and other callbacks still run. `running_timers` returns the timers of the loop that runs in this thread.
    """

    def call_at(self, when: float, callback: Callable[[], Any], /) -> Timer:
        """Call `callback` when the clock reaches `when`."""
        ...

    def call_after(self, delay: float, callback: Callable[[], Any], /) -> Timer:
        """Call `callback` after `delay` seconds."""
        ...


class Store(Protocol):
    """A store of values, as its actor sees it. `name` is the name of the technology, such as `memory` or `redis`."""

    name: str
    capabilities: Capabilities

    async def open(self) -> None:
        """Open the store and its connections.

        Raises `CacheConnectionError` if the store cannot be reached; it may then be called again.
        """

    async def close(self) -> None:
        """Release the resources that `open` acquired. Safe to call twice."""

    def gauges(self) -> Gauges:
        """Return the size and the counters of the store, without a request to a server."""
        ...


@runtime_checkable
class BatchStore(Store, Protocol):
    """A store that waits for I/O and executes requests in batches."""

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        """Execute a batch and return one reply per operation, in order. If one operation fails, its reply is
        `Failed`; an error that affects the whole batch is raised."""
        ...


OnReplies = Callable[[Sequence[Reply]], None]
"""Receives the replies of a batch, one per operation, in order. Called once, on the store's event loop."""


class Progress(Protocol):
    """The connection that carries a batch in flight.

    `last_progress` is the time at which bytes were last transferred, on the monotonic clock.
    """

    @property
    def last_progress(self) -> float: ...


SLOWEST_LINE = 1e6
"""Bytes per second below which a backend counts as unresponsive."""


class _NoProgress:
    last_progress = float("-inf")


NO_PROGRESS = _NoProgress()
"""The progress of a store that does not track transfers."""


@runtime_checkable
class PipelinedStore(BatchStore, Protocol):
    """A batch store that can have several batches in flight. The turn of its actor ends when a batch is sent.

    Batches take effect in the order in which they are submitted. A batch is submitted once the previous one is sent. A
    batch of more than `max_batch` requests is better split: one half is prepared while the other executes. Requests of
    the `long_running` kinds take many round trips. Each is sent in a separate batch, so that no other request waits for
    it.
    """

    max_batch: int
    long_running: frozenset[type[Request[Any]]]

    def try_submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress | None:
        """Send a batch, or return `None` if sending it would have to wait. Called on the store's event loop.

        `on_replies` is called once, possibly before this method returns. If nothing was sent, a `CacheError` is
        raised and `on_replies` is not called.
        """
        ...

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        """Send a batch, and wait for a connection and for buffer space if necessary. Otherwise like `try_submit`."""
        ...


@runtime_checkable
class LeaseNotifyingStore(Store, Protocol):
    """A store whose server notifies its clients when a lease ends, so that callers can wait for it."""

    def watch(self, request: WatchLease, on_reply: Callable[[Reply], None]) -> None:
        """Call `on_reply` once with a reply to `request`, now or later.

        Runs on the store's event loop; does not wait.
        """


@runtime_checkable
class InlineStore(Store, Protocol):
    """A store that never waits, so its operations run on the caller's stack.

    Each of the four listeners may be `None`; a read then costs one comparison. `on_due` is called when the next
    expiry of the store has moved to an earlier time.
    """

    @property
    def on_read(self) -> ReadListener | None: ...
    @on_read.setter
    def on_read(self, hook: ReadListener | None, /) -> None: ...

    on_write: WriteListener | None
    on_removal: RemovalListener | None
    on_due: Callable[[float], None] | None

    def repair(self) -> Collection[DeferredReply]:
        """Restore consistency after a verb was interrupted at an arbitrary instruction. Return the pending replies.

        A value that was being written may be missing; all other state is correct. This method may be interrupted too,
        and is then called again.
        """
        ...

    def verb(self, kind: type[Request[Any]]) -> Callable[[Any], Reply] | None:
        """Return the function that executes requests of one kind, or `None`. The function raises `CacheError`s."""

    def next_expiry(self) -> float | None:
        """Return the earliest time at which an entry may expire, on the store's monotonic clock, or `None`."""

    def sweep(self, limit: int) -> int:
        """Remove expired entries and return their number. Examines at most `limit` entries."""
        ...


@runtime_checkable
class LeasingStore(InlineStore, Protocol):
    """An inline store that lets callers wait for a load.

    Its verb for `GetOrLease` may return a reply created by `defer` and answer it later. If `defer` is `None`, no caller
    waits.
    """

    defer: Callable[[], DeferredReply] | None


class LockListener(Protocol):
    """Receives notifications of a lock store on behalf of waiting callers, on the store's event loop."""

    def granted(self, name: str, ticket: str, grant: LockGranted) -> None:
        """Handle a grant: the waiting ticket now holds the lock."""

    def look(self, name: str, ticket: str = "", delay: float = 0.0) -> None:
        """Query the store again after `delay` seconds, because the lock may have been granted or released."""

    def look_everywhere(self) -> None:
        """Query the store again for every waiter, because a notification may have been lost."""

    def expired(self, name: str, owner: str, token: int) -> None:
        """Handle the expiry of a holder's lease."""


@runtime_checkable
class LockStore(Protocol):
    """A store of locks, as the `LockManager` sees it.

    It executes `AcquireLock`, `RenewLock`, `ReleaseLock` and `DescribeLock` without waiting for a lock. A store that
    waits for I/O is a `BatchStore` too.

    If `poll` is `None`, the store keeps the queue of waiters. It answers an `AcquireLock` that has to wait with
    `LockQueued`, and notifies `listener` when the lock may have been granted. Other stores answer `LockDenied`. The
    manager then polls for the first waiter, every `poll` seconds or at a small multiple of it.
    """

    name: str
    poll: float | None
    listener: LockListener | None


@runtime_checkable
class InlineLockStore(LockStore, Protocol):
    """A lock store that never waits."""

    def decide(self, request: Request[Any]) -> Reply:
        """Execute one request. Raises `CacheError`."""
        ...

    def next_expiry(self) -> float | None:
        """Return the time at which the next lease may expire, on the store's monotonic clock."""

    def repair(self) -> None:
        """Restore consistency after a call was interrupted at an arbitrary instruction."""

    def sweep(self) -> None:
        """Release the locks whose leases have expired."""
