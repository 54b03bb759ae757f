"""Backend actor: owns a store, keeps its counters, emits its events and removes expired entries."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import msgspec

from cachebus.bus import DeferredReply, Pending, ReplySlot, turn_trace
from cachebus.messages import (
    WIRE_NAMES,
    Admit,
    CacheCleared,
    CacheDeleted,
    CacheError,
    CacheEvicted,
    CacheExpired,
    CacheHit,
    CacheMiss,
    CacheSet,
    CapabilityError,
    Clear,
    Cleared,
    Delete,
    Deleted,
    DeleteMany,
    Describe,
    Description,
    Failed,
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
    Snapshot,
    Stored,
    StoredMany,
    Sweep,
    TagsInvalidated,
    TakeSnapshot,
    WatchLease,
)

from ..guard.guard import Guard, LazyStore
from ..guard.policy import GuardPolicy
from ..ports import BatchStore, InlineStore, LeaseNotifyingStore, LeasingStore, PipelinedStore, Store, Timer
from ..runtime.actor import Actor, Handlers, PlainHandler
from .pipeline import RequestPipeline

STORE_REQUESTS = tuple(
    cast("type[Request[Any]]", kind)
    for name, kind in WIRE_NAMES.items()
    if name.startswith(("backend.", "lease.", "rate.")) and kind is not WatchLease
)
"""Request types that a backend passes to its store."""

SWEEP_BATCH = 1000  # Maximum number of expired entries that one turn removes, to keep turns short.


@dataclass(slots=True)
class StoreCounters:
    """Counters of a batch store, computed from its replies.

    A server does not report evictions and expiries, so only explicit removals are counted.
    """

    hits: int = 0
    misses: int = 0
    sets: int = 0
    removals: dict[RemovalCause, int] = field(default_factory=lambda: dict.fromkeys(RemovalCause, 0))

    def count_all(self, batch: Sequence[Request[Any]], replies: Sequence[Reply]) -> None:
        """Count the requests of a batch from their replies."""
        kinds: list[object] = list(map(type, replies))
        hits, sets = kinds.count(Found), kinds.count(Stored)
        if hits + sets == len(kinds) and (not hits or GetOrLease not in map(type, batch)):
            self.hits += hits  # Fast path for the most frequent case.
            self.sets += sets
            return
        for request, reply in zip(batch, replies, strict=True):
            self.count(request, reply)

    def count(self, request: Request[Any], reply: Reply) -> None:
        """Count one request from its reply."""
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


class BackendActor(Actor):
    """Actor that owns a store: opens and closes it, keeps its counters and emits its events.

    - With an `InlineStore`, every turn is plain and the methods of the store are the handlers, so a read needs no
      additional call.
    - With a `BatchStore`, the requests that arrive during one round trip are sent together in the next.
    - With a `PipelinedStore`, a turn ends when its batch is sent. The next batch may be sent before the replies arrive.

    The last two are protected by a `Guard` with the policy `guard`.

    If the server is unavailable, the actor fails to start. With `opens_later` it starts, and requests fail until the
    server is available. A restarted actor always behaves like that, because an outage must not use up the restarts.
    """

    def __init__(
        self, store: InlineStore | BatchStore, guard: GuardPolicy | None = None, *, opens_later: bool = False
    ) -> None:
        self._store = store
        self._active_store: Any = store
        self._opens_later = opens_later
        self._policy = guard or GuardPolicy()
        self._pipelined = store if isinstance(store, PipelinedStore) else None
        self._guard: Guard | None = None
        self._sweep_at = float("inf")
        self._sweep_timer: Timer | None = None
        self._counters = StoreCounters()
        self._pipeline: RequestPipeline | None = None
        self._incarnation: DeferredReply | None = None
        if self._pipelined is not None:
            self.max_batch = self._pipelined.max_batch

    def __repr__(self) -> str:
        return f"<BackendActor of {self._store!r}>"

    async def on_start(self) -> None:
        if isinstance(self._store, InlineStore):
            await self._store.open()
        else:
            self._guard = Guard(self._policy, self.ctx, self._store.name)
            if self._pipelined is not None:
                count_all = self._counters.count_all
                self._pipeline = RequestPipeline(self._pipelined, self._guard, self.ctx, count_all, self._emit)
                self._incarnation = self.ctx.defer()
                self._incarnation.attach(_EndOfIncarnation(self._pipeline))
            await self._open(self._store, self._guard)
        self.ctx.subscriptions.watch(self._update_listeners)

    async def _open(self, store: BatchStore, guard: Guard) -> None:
        try:
            await store.open()
        except CacheError as error:
            if not error.transient or not (self._opens_later or self.ctx.restarts):
                raise
            self._use(LazyStore(store, partial(self._use, store)))
            guard.disconnected(str(error))
        else:
            guard.connected()

    def _use(self, store: Any) -> None:
        self._active_store = store
        if self._pipeline is not None:
            self._pipeline.store = store

    async def on_stop(self) -> None:
        self.ctx.subscriptions.unwatch(self._update_listeners)
        try:
            if self._pipeline is not None:
                await self._pipeline.drain()
            if self._guard is not None:
                self._guard.closed = True
            await self._store.close()
        finally:
            if self._incarnation is not None:
                self._incarnation.answer(())

    def handlers(self) -> Handlers:
        table = super().handlers()
        if isinstance(self._store, InlineStore):
            for kind in STORE_REQUESTS:
                table.plain[kind] = self._store.verb(kind) or _refuse(self._store, kind)
            for kind in (Clear, InvalidateTags, Admit):
                table.plain[kind] = self._emitting(table.plain[kind])
            self._store.on_due = self._schedule_sweep
            if isinstance(self._store, LeasingStore):
                self._store.defer = self.ctx.defer
        elif self._pipelined is not None and self._pipeline is not None:
            short = [kind for kind in STORE_REQUESTS if kind not in self._pipelined.long_running]
            table.batch.update(dict.fromkeys(short, self._on_pipelined))
            if self._pipeline.takes_turns:
                table.eager.update(dict.fromkeys(short, self._pipeline.take))
            table.waiting.update(dict.fromkeys(self._pipelined.long_running, self._pipeline.put_alone))
        else:
            table.batch.update(dict.fromkeys(STORE_REQUESTS, self._on_batch))
        if isinstance(self._store, LeaseNotifyingStore):
            table.waiting[WatchLease] = self._watch
        else:
            table.plain[WatchLease] = _refuse(self._store, WatchLease)
        return table

    def repair(self) -> Collection[DeferredReply] | None:
        if not isinstance(self._store, InlineStore):
            return None  # It is unknown what was sent, so new connections must be opened.
        unanswered = self._store.repair()
        self._sweep_at = float("inf")
        if (due := self._store.next_expiry()) is not None:
            self._schedule_sweep(due)
        return unanswered

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
        counts = gauges if isinstance(self._store, InlineStore) else self._counters
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
            guard=msgspec.structs.asdict(self._guard.statistics()) if self._guard is not None else {},
        )

    def on_sweep(self, request: Sweep) -> Deleted:
        """Remove a bounded number of expired entries, and schedule the next sweep."""
        if not isinstance(self._store, InlineStore):
            return Deleted(0)
        self._sweep_at = float("inf")
        swept = self._store.sweep(SWEEP_BATCH)
        if (due := self._store.next_expiry()) is not None:
            self._schedule_sweep(due)
        return Deleted(swept)

    def _schedule_sweep(self, when: float) -> None:
        if when < self._sweep_at:
            if self._sweep_timer is not None:
                self._sweep_timer.cancel()
            self._sweep_at = when
            self._sweep_timer = self.ctx.send_after(when - self.ctx.clock.monotonic(), Sweep())

    async def _on_batch(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        assert self._guard is not None
        traces = self._traces()
        replies = await self._guard.execute(self._active_store, batch, self.ctx.deadline)
        self._counters.count_all(batch, replies)
        if self.ctx.subscriptions.kinds:
            self._emit(batch, replies, traces)
        return replies

    async def _on_pipelined(self, batch: Sequence[Request[Any]]) -> Sequence[ReplySlot]:
        assert self._pipeline is not None
        return await self._pipeline.put(batch, self._traces())

    def _traces(self) -> Sequence[str | None]:
        return self.ctx.traces if self.ctx.subscriptions.kinds else ()

    def _emit(self, batch: Sequence[Request[Any]], replies: Sequence[Reply], traces: Sequence[str | None]) -> None:
        """Emit the events of a batch, each with the trace context of its request."""
        token = turn_trace.set(None)
        try:
            for place, (request, reply) in enumerate(zip(batch, replies, strict=True)):
                if traces:
                    turn_trace.set(traces[place])
                self._emit_one(request, reply)
        finally:
            turn_trace.reset(token)

    def _emit_one(self, request: Request[Any], reply: Reply) -> None:
        """Emit the events that follow from a request and its reply."""
        emit = self.ctx.emit
        match request, reply:
            case Get(key=key), Found() | Missing():
                emit(CacheHit if isinstance(reply, Found) else CacheMiss, key=key)
            case GetMany(keys=keys), FoundMany(entries=entries):
                for key in dict.fromkeys(keys):
                    emit(CacheHit if key in entries else CacheMiss, key=key)
            case _, Stored(version=version):
                key, tags = getattr(request, "key", ""), getattr(request, "tags", ())
                ttl = getattr(request, "ttl", None)
                emit(CacheSet, key=key, version=version, ttl=None if ttl == "default" else ttl, tags=tags)
            case SetMany(items=items, ttl=ttl, tags=tags), StoredMany():
                for key in items:
                    emit(CacheSet, key=key, ttl=None if ttl == "default" else ttl, tags=tags)
            case Increment(key=key), Incremented():
                emit(CacheSet, key=key)
            case Delete(key=key), Deleted(count=count) if count:
                emit(CacheDeleted, key=key)
            case DeleteMany(keys=keys), Deleted():
                for key in dict.fromkeys(keys):
                    emit(CacheDeleted, key=key)
            case Admit(key=key, cost=cost), RateLimitDenied(retry_after=retry_after):
                emit(RateLimitExceeded, key=key, cost=cost, retry_after=retry_after)
            case InvalidateTags(tags=tags), Invalidated():
                emit(TagsInvalidated, tags=tags)
            case _, Cleared():
                emit(CacheCleared)
            case _:
                pass

    async def _watch(self, request: WatchLease) -> DeferredReply:
        # A coroutine, although it does not wait, so that it runs on the event loop of the store.
        assert isinstance(self._store, LeaseNotifyingStore)
        deferred = self.ctx.defer()
        self._store.watch(request, deferred.answer)
        return deferred

    def _update_listeners(self) -> None:
        """Set the listeners of the store for the current subscriptions. Without subscriptions the store calls none."""
        if not isinstance(self._store, InlineStore):
            return
        kinds = self.ctx.subscriptions.kinds
        self._store.on_read = self._emit_read if kinds & {CacheHit, CacheMiss} else None
        self._store.on_write = partial(self.ctx.emit, CacheSet) if CacheSet in kinds else None
        self._store.on_removal = self._emit_removal if kinds & set(_REMOVALS.values()) else None

    def _emit_read(self, key: str, hit: bool) -> None:
        self.ctx.emit(CacheHit if hit else CacheMiss, key)

    def _emit_removal(self, key: str, cause: RemovalCause) -> None:
        if (kind := _REMOVALS.get(cause)) is not None:
            self.ctx.emit(kind, key)

    def _emitting(self, verb: PlainHandler) -> PlainHandler:
        def handle(request: Request[Any]) -> Reply | Pending | None:
            reply = verb(request)
            if isinstance(reply, Reply):
                self._emit_one(request, reply)
            return reply

        return handle


class _EndOfIncarnation(msgspec.Struct):
    """Reply port that is answered if the actor crashes, or is stopped while requests are in flight."""

    pipeline: RequestPipeline
    waiting: bool = True

    def answer(self, reply: Any) -> None:
        if isinstance(reply, Failed):
            self.pipeline.fail_all(reply)


_REMOVALS: dict[RemovalCause, type[CacheDeleted | CacheEvicted | CacheExpired]] = {
    RemovalCause.EXPLICIT: CacheDeleted,
    RemovalCause.SIZE: CacheEvicted,
    RemovalCause.EXPIRED: CacheExpired,
}


def _refuse(store: Store, kind: type[Request[Any]]) -> PlainHandler:
    def refuse(request: Request[Any]) -> Reply:
        raise CapabilityError(store=store.name, capability=kind.__name__)

    return refuse
