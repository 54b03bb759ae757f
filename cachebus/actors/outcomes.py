"""What a request and its reply say happened: counters and events of a store that keeps none of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachebus.messages import (
    Admit,
    CacheCleared,
    CacheDeleted,
    CacheHit,
    CacheMiss,
    CacheSet,
    Cleared,
    Delete,
    Deleted,
    DeleteMany,
    Found,
    FoundMany,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    Incremented,
    Invalidated,
    InvalidateTags,
    Missing,
    RateLimitDenied,
    RateLimitExceeded,
    RemovalCause,
    Reply,
    Request,
    SetMany,
    Stored,
    StoredMany,
    TagsInvalidated,
)

Tell = Callable[..., None]
"""Takes a kind of event and its fields, builds the event if it is wanted, and publishes it."""


@dataclass(slots=True)
class StoreCounters:
    """Counters of a batch store, counted by its actor from the replies.

    A server evicts and expires by itself and says nothing, so the removals are the explicit ones.
    """

    hits: int = 0
    misses: int = 0
    sets: int = 0
    removals: dict[RemovalCause, int] = field(default_factory=lambda: dict.fromkeys(RemovalCause, 0))

    def count_all(self, batch: Sequence[Request[Any]], replies: Sequence[Reply]) -> None:
        """Count a batch by its replies."""
        kinds: list[object] = list(map(type, replies))
        hits, sets = kinds.count(Found), kinds.count(Stored)
        if hits + sets == len(kinds) and (not hits or GetOrLease not in map(type, batch)):
            self.hits += hits  # The commonest, without a look at each.
            self.sets += sets
            return
        for request, reply in zip(batch, replies, strict=True):
            self.count(request, reply)

    def count(self, request: Request[Any], reply: Reply) -> None:
        """Count one request by its reply."""
        if isinstance(reply, Found):
            self.hits += not isinstance(request, GetOrLease)
        elif isinstance(reply, Missing):
            self.misses += isinstance(request, Get)
        elif isinstance(reply, FoundMany) and isinstance(request, GetMany):
            self.hits += len(reply.entries)
            self.misses += len(set(request.keys)) - len(reply.entries)
        elif isinstance(reply, Stored):
            self.sets += 1
        elif isinstance(reply, StoredMany):
            self.sets += reply.count
        elif isinstance(reply, Deleted):
            self.removals[RemovalCause.EXPLICIT] += reply.count


def emit_events(request: Request[Any], reply: Reply, tell: Tell) -> None:
    """Emit the events that a request and its reply amount to; `tell` builds those that are listened to."""
    if isinstance(request, Get) and isinstance(reply, Found):
        tell(CacheHit, key=request.key)
    elif isinstance(request, Get) and isinstance(reply, Missing):
        tell(CacheMiss, key=request.key)
    elif isinstance(request, GetMany) and isinstance(reply, FoundMany):
        for key in dict.fromkeys(request.keys):
            tell(CacheHit if key in reply.entries else CacheMiss, key=key)
    elif isinstance(reply, Stored):
        ttl = getattr(request, "ttl", None)
        tell(
            CacheSet,
            key=getattr(request, "key", ""),
            version=reply.version,
            ttl=None if ttl == "default" else ttl,
            tags=getattr(request, "tags", ()),
        )
    elif isinstance(request, SetMany) and isinstance(reply, StoredMany):
        for key in request.items:
            tell(CacheSet, key=key, ttl=None if request.ttl == "default" else request.ttl, tags=request.tags)
    elif isinstance(request, Increment) and isinstance(reply, Incremented):
        tell(CacheSet, key=request.key)
    elif isinstance(request, Delete) and isinstance(reply, Deleted):
        if reply.count:
            tell(CacheDeleted, key=request.key)
    elif isinstance(request, DeleteMany) and isinstance(reply, Deleted):
        for key in dict.fromkeys(request.keys):
            tell(CacheDeleted, key=key)
    elif isinstance(request, Admit):
        if isinstance(reply, RateLimitDenied):
            tell(RateLimitExceeded, key=request.key, cost=request.cost, retry_after=reply.retry_after)
    elif isinstance(request, InvalidateTags) and isinstance(reply, Invalidated):
        tell(TagsInvalidated, tags=request.tags)
    elif isinstance(reply, Cleared):
        tell(CacheCleared)
