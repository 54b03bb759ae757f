"""The actor in front of a store: it counts, tells what happened, and keeps what has expired from piling up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from cachebus.bus import Deferred
from cachebus.messages import (
    Add,
    CacheCleared,
    CacheDeleted,
    CacheEvicted,
    CacheExpired,
    CacheHit,
    CacheMiss,
    CacheSet,
    CapabilityError,
    Clear,
    CompareAndSet,
    Delete,
    Deleted,
    DeleteMany,
    DeletePattern,
    Describe,
    Description,
    Exists,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    InvalidateTags,
    Ping,
    Pong,
    Release,
    RemovalCause,
    Renew,
    Reply,
    Request,
    Scan,
    Set,
    SetMany,
    Snapshot,
    Sweep,
    TagsInvalidated,
    TakeSnapshot,
    Touch,
)

from .actor import Actor, Handlers, PlainHandler
from .guard_policy import GuardPolicy
from .outcomes import Tally, facts
from .ports import BatchStore, InlineStore, LeasingStore, PipelinedStore, Store
from .resilience import Guard

STORE_REQUESTS: tuple[type[Request[Any]], ...] = (
    Get,
    GetMany,
    Exists,
    Set,
    SetMany,
    Add,
    CompareAndSet,
    Touch,
    Increment,
    Delete,
    DeleteMany,
    DeletePattern,
    Scan,
    InvalidateTags,
    Clear,
    GetOrLease,
    Renew,
    Release,
)
"""What a backend hands to its store."""

SWEEP_BATCH = 1000
"""Expired entries that one turn removes at most, so that no turn is long."""


class BackendActor(Actor):
    """Stands before a store and owns it: opens it, closes it, counts, and publishes what happened.

    Over an `InlineStore` every turn is plain, and the store's own verbs are the handlers: a read costs no call more
    than the store's. Over a `BatchStore` everything that arrives during one round trip leaves with the next. Over a
    `PipelinedStore` a turn ends when its batch is sent, and the next may be sent before its replies are there. Before
    both stands a `Guard` that does as `guard` says.
    """

    def __init__(self, store: InlineStore | BatchStore, guard: GuardPolicy | None = None) -> None:
        self._store = store
        self._policy = guard or GuardPolicy()
        self._guard: Guard | None = None
        self._sweep_at = float("inf")
        self._call_off: Callable[[], None] | None = None
        self._tally = Tally()
        if isinstance(store, PipelinedStore):
            self.max_batch = store.max_batch

    def __repr__(self) -> str:
        return f"<BackendActor before {self._store!r}>"

    async def on_start(self) -> None:
        await self._store.open()
        if not isinstance(self._store, InlineStore):
            self._guard = Guard(self._policy, self.ctx, self._store.name)
            self._guard.connected()
        self.ctx.audience.watch(self._listen)

    async def on_stop(self) -> None:
        self.ctx.audience.unwatch(self._listen)
        await self._store.close()

    def handlers(self) -> Handlers:
        table = super().handlers()
        if isinstance(self._store, InlineStore):
            for kind in STORE_REQUESTS:
                table.plain[kind] = self._store.verb(kind) or _refuse(self._store, kind)
            table.plain[Clear] = self._clear(table.plain[Clear])
            table.plain[InvalidateTags] = self._invalidate_tags(table.plain[InvalidateTags])
            self._store.on_due = self._due
            if isinstance(self._store, LeasingStore):
                self._store.defer = self.ctx.defer
        elif isinstance(self._store, PipelinedStore):
            table.batch.update(dict.fromkeys(STORE_REQUESTS, self._on_pipelined))
            # Another method is another batch.
            table.batch.update(dict.fromkeys(self._store.apart, self._on_apart))
        else:
            table.batch.update(dict.fromkeys(STORE_REQUESTS, self._on_batch))
        return table

    # What every actor answers

    def on_ping(self, request: Ping) -> Pong:
        return Pong(self.ctx.address)

    def on_describe(self, request: Describe) -> Description:
        capabilities = self._store.capabilities
        gauges = self._store.gauges()
        limits = {
            "max_entries": gauges.max_entries,
            "max_bytes": gauges.max_bytes,
            "max_key_bytes": capabilities.max_key_bytes,
            "max_value_bytes": capabilities.max_value_bytes,
        }
        return Description(self.ctx.address, self._store.name, capabilities.names(), limits)

    def on_take_snapshot(self, request: TakeSnapshot) -> Snapshot:
        gauges = self._store.gauges()
        counts = gauges if isinstance(self._store, InlineStore) else self._tally
        return Snapshot(
            address=self.ctx.address,
            store=self._store.name,
            hits=counts.hits,
            misses=counts.misses,
            sets=counts.sets,
            removals={cause.value: count for cause, count in counts.removals.items()},
            entries=gauges.entries,
            max_entries=gauges.max_entries,
            weight=gauges.weight,
            max_bytes=gauges.max_bytes,
            restarts=self.ctx.restarts,
            overloaded=self.ctx.overloaded,
            guard=asdict(self._guard.statistics()) if self._guard is not None else {},
        )

    # Expiry

    def on_sweep(self, request: Sweep) -> Deleted:
        """Remove what is due, a bounded number at a time, and be called again when the next is."""
        if not isinstance(self._store, InlineStore):
            return Deleted(0)
        self._sweep_at = float("inf")
        swept = self._store.sweep(SWEEP_BATCH)
        if (due := self._store.next_expiry()) is not None:
            self._due(due)
        return Deleted(swept)

    def _due(self, when: float) -> None:
        if when < self._sweep_at:
            if self._call_off is not None:
                self._call_off()
            self._sweep_at = when
            self._call_off = self.ctx.send_after(when - self.ctx.clock.monotonic(), Sweep())

    # Over a batch store

    async def _on_batch(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        assert not isinstance(self._store, InlineStore)
        assert self._guard is not None
        replies = await self._guard.execute(self._store, batch, self.ctx.deadline)
        self._account(batch, replies)
        return replies

    async def _on_pipelined(self, batch: Sequence[Request[Any]]) -> Deferred:
        assert isinstance(self._store, PipelinedStore)
        assert self._guard is not None
        promise = self.ctx.defer()

        def replied(replies: Sequence[Reply]) -> None:
            self._account(batch, replies)
            promise.answer(replies)

        try:
            await self._guard.submit(self._store, batch, self.ctx.deadline, replied)
        except BaseException:
            promise.answer(())  # Nobody waits for it; the cell answers the batch.
            raise
        return promise

    async def _on_apart(self, batch: Sequence[Request[Any]]) -> Deferred:
        return await self._on_pipelined(batch)

    def _account(self, batch: Sequence[Request[Any]], replies: Sequence[Reply]) -> None:
        """Count what came of a batch, and tell whoever listens."""
        self._tally.count_all(batch, replies)
        if self.ctx.audience.kinds:
            for request, reply in zip(batch, replies, strict=True):
                for event in facts(request, reply):
                    self.ctx.emit(event)

    # Events of an inline store

    def _listen(self) -> None:
        """Turn the store's listeners on and off with the audience: nobody listening, nothing is called."""
        if not isinstance(self._store, InlineStore):
            return
        kinds = self.ctx.audience.kinds
        self._store.on_read = self._tell_read if kinds & {CacheHit, CacheMiss} else None
        self._store.on_write = self._tell_write if CacheSet in kinds else None
        self._store.on_removal = self._tell_removal if kinds & set(_REMOVALS.values()) else None

    def _tell_read(self, key: str, hit: bool) -> None:
        self.ctx.emit(CacheHit(key=key) if hit else CacheMiss(key=key))

    def _tell_write(self, key: str, version: float, ttl: float | None, tags: tuple[str, ...]) -> None:
        self.ctx.emit(CacheSet(key=key, version=version, ttl=ttl, tags=tags))

    def _tell_removal(self, key: str, cause: RemovalCause) -> None:
        if (kind := _REMOVALS.get(cause)) is not None:
            self.ctx.emit(kind(key=key))

    def _clear(self, verb: PlainHandler) -> PlainHandler:
        def clear(request: Clear) -> Reply | Deferred | None:
            reply = verb(request)
            self.ctx.emit(CacheCleared())
            return reply

        return clear

    def _invalidate_tags(self, verb: PlainHandler) -> PlainHandler:
        def invalidate_tags(request: InvalidateTags) -> Reply | Deferred | None:
            reply = verb(request)
            self.ctx.emit(TagsInvalidated(tags=request.tags))
            return reply

        return invalidate_tags


_REMOVALS: dict[RemovalCause, type[CacheDeleted | CacheEvicted | CacheExpired]] = {
    RemovalCause.EXPLICIT: CacheDeleted,
    RemovalCause.SIZE: CacheEvicted,
    RemovalCause.EXPIRED: CacheExpired,
}


def _refuse(store: Store, kind: type[Request[Any]]) -> PlainHandler:
    def refuse(request: Request[Any]) -> Reply:
        raise CapabilityError(store=store.name, capability=kind.__name__)

    return refuse
