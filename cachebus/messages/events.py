"""Events: facts about the past. `Event` defines their common fields."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal

import msgspec

from .base import Event


class RemovalCause(StrEnum):
    """Cause of a removal.

    `EXPLICIT`: on request. `REPLACED`: by a newer value. `EXPIRED`: its time to live ended. `SIZE`: the store was full.
    """

    # Enum.__hash__ is implemented in Python, and these are keys of counters on hot paths.
    __hash__ = str.__hash__

    EXPLICIT = "explicit"
    REPLACED = "replaced"
    EXPIRED = "expired"
    SIZE = "size"


class KeyEvent(Event, frozen=True, gc=False, tag=""):
    """An event about one key, or about the lock or rate limit with that name."""

    key: str


class CacheHit(KeyEvent, frozen=True, gc=False, tag="event.cache_hit"):
    """A key was read and had a live value."""


class CacheMiss(KeyEvent, frozen=True, gc=False, tag="event.cache_miss"):
    """A key was read and had no live value."""


class CacheSet(KeyEvent, frozen=True, gc=False, tag="event.cache_set"):
    """A value was stored. `ttl` is in seconds."""

    version: float = 0.0
    ttl: float | None = None
    tags: tuple[str, ...] = ()


class CacheDeleted(KeyEvent, frozen=True, gc=False, tag="event.cache_deleted"):
    """A key was removed on request."""


class CacheEvicted(KeyEvent, frozen=True, gc=False, tag="event.cache_evicted"):
    """A value was evicted. `cause` is currently always `SIZE`."""

    cause: RemovalCause = RemovalCause.SIZE


class CacheExpired(KeyEvent, frozen=True, gc=False, tag="event.cache_expired"):
    """An expired value was removed. It was unreadable from its expiry on, even if the event is later."""


class CacheCleared(Event, frozen=True, gc=False, tag="event.cache_cleared"):
    """Every key of the namespace was removed."""


class TagsInvalidated(Event, frozen=True, gc=False, tag="event.tags_invalidated"):
    """Every entry with one of the tags was invalidated."""

    tags: tuple[str, ...]


class PayloadRejected(KeyEvent, frozen=True, gc=False, tag="event.payload_rejected"):
    """A stored payload was rejected for `reason`, and the read became a miss.

    `serializer` is the reader's serializer.
    """

    reason: str
    serializer: str = ""
    tenant: str = ""


class PayloadSealed(KeyEvent, frozen=True, gc=False, tag="event.payload_sealed"):
    """A payload of `size` bytes was sealed for `tenant` with the key `key_id`."""

    key_id: str
    tenant: str = ""
    size: int = 0


class LoadStarted(KeyEvent, frozen=True, gc=False, tag="event.load_started"):
    """A loader was called for a key."""


class LoadSucceeded(KeyEvent, frozen=True, gc=False, tag="event.load_succeeded"):
    """A loader returned after `duration` seconds."""

    duration: float = 0.0


class LoadFailed(KeyEvent, frozen=True, gc=False, tag="event.load_failed"):
    """A loader raised an exception after `duration` seconds. `error` is the exception's type name."""

    error: str
    duration: float = 0.0


class StaleServed(KeyEvent, frozen=True, gc=False, tag="event.stale_served"):
    """An expired value was served, because no fresher one was available in time."""


class LoadLeaseLost(KeyEvent, frozen=True, gc=False, tag="event.load_lease_lost"):
    """A loaded value was not stored. Its lease expired, or an invalidation or a write of the key revoked it."""


class RateLimitExceeded(KeyEvent, frozen=True, gc=False, tag="event.rate_limit_exceeded"):
    """The rate limit `key` had fewer than `cost` units left, and the call was refused.

    It has them after `retry_after` seconds.
    """

    cost: int = 1
    retry_after: float = 0.0


class LockAcquired(KeyEvent, frozen=True, gc=False, tag="event.lock_acquired"):
    """`owner` acquired the lock named `key` with the fencing token `token`."""

    owner: str
    token: int


class LockReleased(KeyEvent, frozen=True, gc=False, tag="event.lock_released"):
    """`owner` released the lock named `key`."""

    owner: str = ""
    token: int = 0


class LockExpired(KeyEvent, frozen=True, gc=False, tag="event.lock_expired"):
    """The lock named `key`, held by `owner`, expired. It was free from its expiry on, even if the event is later."""

    owner: str = ""
    token: int = 0


class BackendConnected(Event, frozen=True, gc=False, tag="event.backend_connected"):
    """A backend connected or reconnected to its store. `store` is the store's type."""

    store: str


class BackendDisconnected(Event, frozen=True, gc=False, tag="event.backend_disconnected"):
    """A backend lost the connection to its store for `reason`."""

    store: str
    reason: str


class CircuitOpened(Event, frozen=True, gc=False, tag="event.circuit_opened"):
    """A backend failed `failures` times in a row and gets no requests for `retry_after` seconds."""

    address: str
    failures: int
    retry_after: float


class CircuitClosed(Event, frozen=True, gc=False, tag="event.circuit_closed"):
    """A backend whose circuit was open has recovered."""

    address: str


class RequestFailed(Event, frozen=True, gc=False, tag="event.request_failed"):
    """A backend failed a request. `request` is its wire name, and `error` the code of the error.

    Outcomes: a read became a miss (`missed`), a write was not stored (`dropped`), a rate limit was not enforced
    (`admitted`), or the caller got the error (`raised`). `key` is empty if the request has no key.
    """

    request: str
    error: str
    outcome: Literal["missed", "dropped", "raised", "admitted"]
    key: str = ""


class ActorStarted(Event, frozen=True, gc=False, tag="event.actor_started"):
    """An actor started."""

    address: str


class ActorRestarted(Event, frozen=True, gc=False, tag="event.actor_restarted"):
    """An actor crashed and was restarted. `reason` is the exception's type, and `restarts` counts the restarts."""

    address: str
    reason: str
    restarts: int


class ActorGaveUp(Event, frozen=True, gc=False, tag="event.actor_gave_up"):
    """An actor crashed too often and was stopped. Its requests are answered with `ActorFailed`."""

    address: str
    reason: str
    restarts: int


class ActorStopped(Event, frozen=True, gc=False, tag="event.actor_stopped"):
    """An actor answered its last request and stopped."""

    address: str


class DeadLetter(Event, frozen=True, gc=False, tag="event.dead_letter"):
    """A message whose sender does not wait for a reply could not be delivered.

    `wire_name` is the message's wire name.
    """

    address: str
    wire_name: str
    reason: str


class EventsMissed(Event, frozen=True, gc=False, tag="event.events_missed"):
    """Events from another process were lost: `count` events of kind `event` from the process `source`.

    If `source` and `event` are empty and `count` is 0, the connection was lost and the number is unknown. `backend` is
    empty.
    """

    source: str
    event: str
    count: int


class Heartbeat(Event, frozen=True, tag="event.heartbeat"):
    """Periodic report of a process that emits events, sent every `interval` seconds.

    `last` maps a kind and a backend, such as `cache_set.primary`, to the last `seq` of the `epoch`. Subscribers get
    heartbeats only if they subscribe to this class explicitly.
    """

    interval: float = 0.0
    last: Mapping[str, int] = msgspec.field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        self._freeze("last")
