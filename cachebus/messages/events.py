"""Events: facts about the past. The common fields are those of `Event`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal

import msgspec

from .base import Event


class RemovalCause(StrEnum):
    """The cause of a removal: `EXPLICIT` on request, `REPLACED` by a newer value, `EXPIRED` at the end of its time, `SIZE` because
    the store was full."""

    # Enum's own hash is written in Python, and these are keys of counters on hot paths.
    __hash__ = str.__hash__

    EXPLICIT = "explicit"
    REPLACED = "replaced"
    EXPIRED = "expired"
    SIZE = "size"


class KeyEvent(Event, frozen=True, gc=False, tag=""):
    """An event about one key, or about the lock or the rate limit of that name."""

    key: str


class CacheHit(KeyEvent, frozen=True, gc=False, tag="event.cache_hit"):
    """A key was read and had a live value."""


class CacheMiss(KeyEvent, frozen=True, gc=False, tag="event.cache_miss"):
    """A key was read and had none."""


class CacheSet(KeyEvent, frozen=True, gc=False, tag="event.cache_set"):
    """A value was stored. `ttl` is in seconds."""

    version: float = 0.0
    ttl: float | None = None
    tags: tuple[str, ...] = ()


class CacheDeleted(KeyEvent, frozen=True, gc=False, tag="event.cache_deleted"):
    """A key was removed on request."""


class CacheEvicted(KeyEvent, frozen=True, gc=False, tag="event.cache_evicted"):
    """A value was evicted for `cause`: always `SIZE` so far."""

    cause: RemovalCause = RemovalCause.SIZE


class CacheExpired(KeyEvent, frozen=True, gc=False, tag="event.cache_expired"):
    """A value was removed because its time was up. It was unreadable since then, even if the event comes later."""


class CacheCleared(Event, frozen=True, gc=False, tag="event.cache_cleared"):
    """Every key of the namespace was removed."""


class TagsInvalidated(Event, frozen=True, gc=False, tag="event.tags_invalidated"):
    """Every entry with one of the tags became unreadable."""

    tags: tuple[str, ...]


class PayloadRejected(KeyEvent, frozen=True, gc=False, tag="event.payload_rejected"):
    """A stored payload was rejected for `reason`, and the read is a miss. `serializer` is that of the reader."""

    reason: str
    serializer: str = ""
    tenant: str = ""


class PayloadSealed(KeyEvent, frozen=True, gc=False, tag="event.payload_sealed"):
    """A payload of `size` bytes was sealed for `tenant`, with the key `key_id`."""

    key_id: str
    tenant: str = ""
    size: int = 0


class LoadStarted(KeyEvent, frozen=True, gc=False, tag="event.load_started"):
    """A loader was called for a key."""


class LoadSucceeded(KeyEvent, frozen=True, gc=False, tag="event.load_succeeded"):
    """A loader returned, after `duration` seconds."""

    duration: float = 0.0


class LoadFailed(KeyEvent, frozen=True, gc=False, tag="event.load_failed"):
    """A loader raised `error` (its type's name), after `duration` seconds."""

    error: str
    duration: float = 0.0


class StaleServed(KeyEvent, frozen=True, gc=False, tag="event.stale_served"):
    """A value was served after its time to live, because no fresher one came in time."""


class LoadLeaseLost(KeyEvent, frozen=True, gc=False, tag="event.load_lease_lost"):
    """A loaded value was not stored, because its lease was lost to an invalidation or a write of the key, or ran out."""


class RateLimitExceeded(KeyEvent, frozen=True, gc=False, tag="event.rate_limit_exceeded"):
    """A caller was refused: the limit named `key` had no `cost` units left. It has them again after `retry_after` seconds."""

    cost: int = 1
    retry_after: float = 0.0


class LockAcquired(KeyEvent, frozen=True, gc=False, tag="event.lock_acquired"):
    """`owner` holds the lock named `key`, with the fencing token `token`."""

    owner: str
    token: int


class LockReleased(KeyEvent, frozen=True, gc=False, tag="event.lock_released"):
    """`owner` released the lock named `key`."""

    owner: str = ""
    token: int = 0


class LockExpired(KeyEvent, frozen=True, gc=False, tag="event.lock_expired"):
    """The lock named `key`, held by `owner`, ran out. It was free since then, even if the event comes later."""

    owner: str = ""
    token: int = 0


class BackendConnected(Event, frozen=True, gc=False, tag="event.backend_connected"):
    """A backend's store can be reached: for the first time, or again. `store` is the technology."""

    store: str


class BackendDisconnected(Event, frozen=True, gc=False, tag="event.backend_disconnected"):
    """A backend's store could be reached and now cannot, for `reason`."""

    store: str
    reason: str


class CircuitOpened(Event, frozen=True, gc=False, tag="event.circuit_opened"):
    """A backend failed `failures` times in a row, and gets no requests for `retry_after` seconds."""

    address: str
    failures: int
    retry_after: float


class CircuitClosed(Event, frozen=True, gc=False, tag="event.circuit_closed"):
    """A backend whose circuit was open works again."""

    address: str


class RequestFailed(Event, frozen=True, gc=False, tag="event.request_failed"):
    """A backend failed a request with the wire name `request`, with an error of the code `error`. A read became a miss (`missed`), a
    write was not stored (`dropped`), a rate limit was passed (`admitted`), or the caller got the error (`raised`). `key` is empty
    if the request has none."""

    request: str
    error: str
    outcome: Literal["missed", "dropped", "raised", "admitted"]
    key: str = ""


class ActorStarted(Event, frozen=True, gc=False, tag="event.actor_started"):
    """An actor takes turns."""

    address: str


class ActorRestarted(Event, frozen=True, gc=False, tag="event.actor_restarted"):
    """An actor crashed for `reason` (the exception's type) and was restarted, for the `restarts`-th time."""

    address: str
    reason: str
    restarts: int


class ActorGaveUp(Event, frozen=True, gc=False, tag="event.actor_gave_up"):
    """An actor crashed too often and stays down; its requests are answered with `ActorFailed`."""

    address: str
    reason: str
    restarts: int


class ActorStopped(Event, frozen=True, gc=False, tag="event.actor_stopped"):
    """An actor answered its last request and takes no more."""

    address: str


class DeadLetter(Event, frozen=True, gc=False, tag="event.dead_letter"):
    """A message without a waiting sender could not be delivered. `wire_name` is that of the message."""

    address: str
    wire_name: str
    reason: str


class EventsMissed(Event, frozen=True, gc=False, tag="event.events_missed"):
    """Events of other processes did not arrive: `count` of kind `event` from the process `source`. If these are empty and 0, the
    connection was lost, and the number is unknown. `backend` is empty."""

    source: str
    event: str
    count: int


class Heartbeat(Event, frozen=True, tag="event.heartbeat"):
    """A process that emits events reports their numbers: `last` is the last `seq` of its `epoch` by kind and backend, such as
    `cache_set.primary`. It does so every `interval` seconds. Subscribers get heartbeats only if they name them."""

    interval: float = 0.0
    last: Mapping[str, int] = msgspec.field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        self._freeze("last")
