"""Events: what happened, in the words that users know. The common fields are those of `Event`."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Literal

from .base import Event, message


class RemovalCause(StrEnum):
    """Why a value went: `EXPLICIT` somebody asked, `REPLACED` by a newer one, `EXPIRED` its time was up, `SIZE` the
    store was full."""

    # Enum's own hash is written in Python, and these are keys of counters on hot paths.
    __hash__ = str.__hash__

    EXPLICIT = "explicit"
    REPLACED = "replaced"
    EXPIRED = "expired"
    SIZE = "size"


@message("event.cache_hit")
class CacheHit(Event):
    """A key was read and had a live value."""

    key: str


@message("event.cache_miss")
class CacheMiss(Event):
    """A key was read and had none."""

    key: str


@message("event.cache_set")
class CacheSet(Event):
    """A value was stored. `ttl` is in seconds."""

    key: str
    version: float = 0.0
    ttl: float | None = None
    tags: tuple[str, ...] = ()


@message("event.cache_deleted")
class CacheDeleted(Event):
    """A key was removed because somebody asked."""

    key: str


@message("event.cache_evicted")
class CacheEvicted(Event):
    """A value was given up for its `cause`: always `SIZE` so far."""

    key: str
    cause: RemovalCause = RemovalCause.SIZE


@message("event.cache_expired")
class CacheExpired(Event):
    """A value was removed because its time was up. It was unreadable from that moment, whenever this is said."""

    key: str


@message("event.cache_cleared")
class CacheCleared(Event):
    """Every key of the namespace was removed."""


@message("event.tags_invalidated")
class TagsInvalidated(Event):
    """Every entry with one of the tags became unreadable."""

    tags: tuple[str, ...]


@message("event.payload_rejected")
class PayloadRejected(Event):
    """What is stored under a key was not taken, for `reason`, and the read is a miss. `serializer` is the reader's own."""

    key: str
    reason: str
    serializer: str = ""
    tenant: str = ""


@message("event.payload_sealed")
class PayloadSealed(Event):
    """A payload of `size` bytes was sealed for `tenant`, with the key `key_id`."""

    key: str
    key_id: str
    tenant: str = ""
    size: int = 0


@message("event.load_started")
class LoadStarted(Event):
    """A loader was called for a key."""

    key: str


@message("event.load_succeeded")
class LoadSucceeded(Event):
    """A loader returned, after `duration` seconds."""

    key: str
    duration: float = 0.0


@message("event.load_failed")
class LoadFailed(Event):
    """A loader raised `error` (its type's name), after `duration` seconds."""

    key: str
    error: str
    duration: float = 0.0


@message("event.stale_served")
class StaleServed(Event):
    """A value whose time to live was over was served, because nothing fresher was to be had in time."""

    key: str


@message("event.load_lease_lost")
class LoadLeaseLost(Event):
    """A loaded value was not stored, because the right to do so was lost on the way: to an invalidation or a write of
    the key, or because the load outlasted its lease."""

    key: str


@message("event.rate_limit_exceeded")
class RateLimitExceeded(Event):
    """A caller was refused: the limit that `key` names had no `cost` units left, and will have them after `retry_after`
    seconds."""

    key: str
    cost: int = 1
    retry_after: float = 0.0


@message("event.lock_acquired")
class LockAcquired(Event):
    """`owner` holds the lock named `key`, with the fencing token `token`."""

    key: str
    owner: str
    token: int


@message("event.lock_released")
class LockReleased(Event):
    """`owner` gave the lock named `key` back."""

    key: str
    owner: str = ""
    token: int = 0


@message("event.lock_expired")
class LockExpired(Event):
    """The time of `owner`, who held the lock named `key`, ran out. It was so from that moment, whenever this is said."""

    key: str
    owner: str = ""
    token: int = 0


@message("event.backend_connected")
class BackendConnected(Event):
    """A backend's store can be reached: for the first time, or again. `store` is the technology."""

    store: str


@message("event.backend_disconnected")
class BackendDisconnected(Event):
    """A backend's store could be reached and now cannot, for `reason`."""

    store: str
    reason: str


@message("event.circuit_opened")
class CircuitOpened(Event):
    """A backend failed `failures` times in a row, and is left alone for `retry_after` seconds."""

    address: str
    failures: int
    retry_after: float


@message("event.circuit_closed")
class CircuitClosed(Event):
    """A backend that was left alone works again."""

    address: str


@message("event.request_failed")
class RequestFailed(Event):
    """A backend did not do what a caller asked, a request of the kind `request` (its wire name), for the reason `error`
    (an error's code). A read was answered as a miss (`missed`), a write was not stored (`dropped`), who asked a rate limit
    went on (`admitted`), or the caller got the error (`raised`). `key` is empty where it was not about one."""

    request: str
    error: str
    outcome: Literal["missed", "dropped", "raised", "admitted"]
    key: str = ""


@message("event.actor_started")
class ActorStarted(Event):
    """An actor takes turns."""

    address: str


@message("event.actor_restarted")
class ActorRestarted(Event):
    """An actor crashed for `reason` (the exception's type) and has a new life, its `restarts`-th."""

    address: str
    reason: str
    restarts: int


@message("event.actor_gave_up")
class ActorGaveUp(Event):
    """An actor crashed too often and stays down; its mail is answered with `ActorFailed`."""

    address: str
    reason: str
    restarts: int


@message("event.actor_stopped")
class ActorStopped(Event):
    """An actor answered what it had been sent and takes no more."""

    address: str


@message("event.dead_letter")
class DeadLetter(Event):
    """A message that nobody waits for could not be delivered. `wire_name` says what kind it was."""

    address: str
    wire_name: str
    reason: str


@message("event.events_missed")
class EventsMissed(Event):
    """Events of other processes did not arrive: `count` of kind `event` from the process `source`. Where these are empty
    and 0, the connection was away, and nobody knows what was told meanwhile. `backend` is empty."""

    source: str
    event: str
    count: int


@message("event.heartbeat")
class Heartbeat(Event):
    """A process that has told events says how far their numbers go: `last` is the last `seq` of its `epoch` by kind and
    backend, such as `cache_set.primary`. It beats every `interval` seconds. Only who asks for heartbeats by name hears
    them: they are about events."""

    interval: float = 0.0
    last: dict[str, int] = field(default_factory=dict[str, int])
