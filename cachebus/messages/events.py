"""Events: what happened, in the words that users know. The common fields are those of `Event`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal

import msgspec

from .base import Event


class RemovalCause(StrEnum):
    """Why a value went: `EXPLICIT` somebody asked, `REPLACED` by a newer one, `EXPIRED` its time was up, `SIZE` the
    store was full."""

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
    """A key was removed because somebody asked."""


class CacheEvicted(KeyEvent, frozen=True, gc=False, tag="event.cache_evicted"):
    """A value was given up for its `cause`: always `SIZE` so far."""

    cause: RemovalCause = RemovalCause.SIZE


class CacheExpired(KeyEvent, frozen=True, gc=False, tag="event.cache_expired"):
    """A value was removed because its time was up. It was unreadable from that moment, whenever this is said."""


class CacheCleared(Event, frozen=True, gc=False, tag="event.cache_cleared"):
    """Every key of the namespace was removed."""


class TagsInvalidated(Event, frozen=True, gc=False, tag="event.tags_invalidated"):
    """Every entry with one of the tags became unreadable."""

    tags: tuple[str, ...]


class PayloadRejected(KeyEvent, frozen=True, gc=False, tag="event.payload_rejected"):
    """What is stored under a key was not taken, for `reason`, and the read is a miss. `serializer` is the reader's own."""

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
    """A value whose time to live was over was served, because nothing fresher was to be had in time."""


class LoadLeaseLost(KeyEvent, frozen=True, gc=False, tag="event.load_lease_lost"):
    """A loaded value was not stored, because the right to do so was lost on the way: to an invalidation or a write of
    the key, or because the load outlasted its lease."""


class RateLimitExceeded(KeyEvent, frozen=True, gc=False, tag="event.rate_limit_exceeded"):
    """A caller was refused: the limit that `key` names had no `cost` units left, and will have them after `retry_after`
    seconds."""

    cost: int = 1
    retry_after: float = 0.0


class LockAcquired(KeyEvent, frozen=True, gc=False, tag="event.lock_acquired"):
    """`owner` holds the lock named `key`, with the fencing token `token`."""

    owner: str
    token: int


class LockReleased(KeyEvent, frozen=True, gc=False, tag="event.lock_released"):
    """`owner` gave the lock named `key` back."""

    owner: str = ""
    token: int = 0


class LockExpired(KeyEvent, frozen=True, gc=False, tag="event.lock_expired"):
    """The time of `owner`, who held the lock named `key`, ran out. It was so from that moment, whenever this is said."""

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
    """A backend failed `failures` times in a row, and is left alone for `retry_after` seconds."""

    address: str
    failures: int
    retry_after: float


class CircuitClosed(Event, frozen=True, gc=False, tag="event.circuit_closed"):
    """A backend that was left alone works again."""

    address: str


class RequestFailed(Event, frozen=True, gc=False, tag="event.request_failed"):
    """A backend did not do what a caller asked, a request of the kind `request` (its wire name), for the reason `error`
    (an error's code). A read was answered as a miss (`missed`), a write was not stored (`dropped`), who asked a rate limit
    went on (`admitted`), or the caller got the error (`raised`). `key` is empty where it was not about one."""

    request: str
    error: str
    outcome: Literal["missed", "dropped", "raised", "admitted"]
    key: str = ""


class ActorStarted(Event, frozen=True, gc=False, tag="event.actor_started"):
    """An actor takes turns."""

    address: str


class ActorRestarted(Event, frozen=True, gc=False, tag="event.actor_restarted"):
    """An actor crashed for `reason` (the exception's type) and has a new life, its `restarts`-th."""

    address: str
    reason: str
    restarts: int


class ActorGaveUp(Event, frozen=True, gc=False, tag="event.actor_gave_up"):
    """An actor crashed too often and stays down; its mail is answered with `ActorFailed`."""

    address: str
    reason: str
    restarts: int


class ActorStopped(Event, frozen=True, gc=False, tag="event.actor_stopped"):
    """An actor answered what it had been sent and takes no more."""

    address: str


class DeadLetter(Event, frozen=True, gc=False, tag="event.dead_letter"):
    """A message that nobody waits for could not be delivered. `wire_name` says what kind it was."""

    address: str
    wire_name: str
    reason: str


class EventsMissed(Event, frozen=True, gc=False, tag="event.events_missed"):
    """Events of other processes did not arrive: `count` of kind `event` from the process `source`. Where these are empty
    and 0, the connection was away, and nobody knows what was told meanwhile. `backend` is empty."""

    source: str
    event: str
    count: int


class Heartbeat(Event, frozen=True, tag="event.heartbeat"):
    """A process that has told events says how far their numbers go: `last` is the last `seq` of its `epoch` by kind and
    backend, such as `cache_set.primary`. It beats every `interval` seconds. Only who asks for heartbeats by name hears
    them: they are about events."""

    interval: float = 0.0
    last: Mapping[str, int] = msgspec.field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        self._freeze("last")
