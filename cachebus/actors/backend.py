"""The actor in front of a store: it counts, tells what happened, and keeps what has expired from piling up."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from threading import get_ident
from typing import Any

import msgspec

from cachebus.bus import Deferred, TaskPort, current_trace, turn_trace
from cachebus.messages import (
    Add,
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
    RateLimitDenied,
    RateLimitExceeded,
    ReleaseLease,
    RemovalCause,
    RenewLease,
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
    WatchLease,
)

from .actor import Actor, Handlers, PlainHandler
from .guard_policy import GuardPolicy
from .late import LateStore
from .outcomes import Tally, tell_facts
from .ports import BatchStore, InlineStore, LeasingStore, PipelinedStore, Store, Timer, WatchfulStore
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
    RenewLease,
    ReleaseLease,
    Admit,
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

    A server that is not there when the actor begins fails its start, or, with `opens_later`, each request until it is
    there. A life after the first always begins so: an outage shall not use up the restarts.
    """

    def __init__(
        self, store: InlineStore | BatchStore, guard: GuardPolicy | None = None, *, opens_later: bool = False
    ) -> None:
        self._store = store
        self._asked: Any = store
        self._opens_later = opens_later
        self._policy = guard or GuardPolicy()
        self._pipelined = store if isinstance(store, PipelinedStore) else None
        self._guard: Guard | None = None
        self._sweep_at = float("inf")
        self._sweep_timer: Timer | None = None
        self._tally = Tally()
        self._lone = True
        self._thread = 0
        if self._pipelined is not None:
            self.max_batch = self._pipelined.max_batch

    def __repr__(self) -> str:
        return f"<BackendActor before {self._store!r}>"

    async def on_start(self) -> None:
        self._thread = get_ident()
        if isinstance(self._store, InlineStore):
            await self._store.open()
        else:
            self._guard = Guard(self._policy, self.ctx, self._store.name)
            await self._open(self._store, self._guard)
        self.ctx.audience.watch(self._listen)

    async def _open(self, store: BatchStore, guard: Guard) -> None:
        try:
            await store.open()
        except CacheError as error:
            if not error.transient or not (self._opens_later or self.ctx.restarts):
                raise

            def opened() -> None:
                self._asked = store

            self._asked = LateStore(store, opened)
            guard.disconnected(str(error))
        else:
            guard.connected()

    async def on_stop(self) -> None:
        self.ctx.audience.unwatch(self._listen)
        if self._guard is not None:
            self._guard.close()
        await self._store.close()

    def handlers(self) -> Handlers:
        table = super().handlers()
        if isinstance(self._store, InlineStore):
            for kind in STORE_REQUESTS:
                table.plain[kind] = self._store.verb(kind) or _refuse(self._store, kind)
            table.plain[Clear] = self._clear(table.plain[Clear])
            table.plain[InvalidateTags] = self._invalidate_tags(table.plain[InvalidateTags])
            table.plain[Admit] = self._admit(table.plain[Admit])
            self._store.on_due = self._due
            if isinstance(self._store, LeasingStore):
                self._store.defer = self.ctx.defer
        elif self._pipelined is not None:
            table.batch.update(dict.fromkeys(STORE_REQUESTS, self._on_pipelined))
            table.eager.update(dict.fromkeys(STORE_REQUESTS, self._at_once))
            # Another method is another batch.
            table.batch.update(dict.fromkeys(self._pipelined.apart, self._on_apart))
        else:
            table.batch.update(dict.fromkeys(STORE_REQUESTS, self._on_batch))
        if isinstance(self._store, WatchfulStore):
            table.waiting[WatchLease] = self._watch
        else:
            table.plain[WatchLease] = _refuse(self._store, WatchLease)
        return table

    def repair(self) -> Collection[Deferred] | None:
        if not isinstance(self._store, InlineStore):
            return None  # What was being sent is not known: the connections are opened anew.
        owed = self._store.repair()
        self._sweep_at = float("inf")
        if (due := self._store.next_expiry()) is not None:
            self._due(due)
        return owed

    def pause(self, waiting: int) -> TaskPort | None:
        if self._pipelined is None or self._guard is None or waiting >= self.max_batch:
            return None
        return self._guard.pause(waiting)

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
            guard=msgspec.structs.asdict(self._guard.statistics()) if self._guard is not None else {},
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
            if self._sweep_timer is not None:
                self._sweep_timer.cancel()
            self._sweep_at = when
            self._sweep_timer = self.ctx.send_after(when - self.ctx.clock.monotonic(), Sweep())

    # Over a batch store

    async def _on_batch(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        assert self._guard is not None
        traces = self._traces()
        replies = await self._guard.execute(self._asked, batch, self.ctx.deadline)
        self._account(batch, replies, traces)
        return replies

    def _at_once(self, request: Request[Any]) -> Deferred | None:
        """A lone caller's request, sent without the way through the mailbox and the task: a third of its time.

        Where the last batch was of several, or others are under way, requests rather wait for each other.
        """
        if not self._lone or get_ident() != self._thread:
            return None
        assert self._pipelined is not None
        assert self._guard is not None
        promise, batch = self.ctx.defer(), (request,)
        traces = (current_trace(),) if self.ctx.audience.kinds else ()

        def replied(replies: Sequence[Reply]) -> None:
            self._account(batch, replies, traces)
            promise.answer(replies[0])

        sent = False
        try:
            sent = self._guard.submit_at_once(self._asked, batch, replied)
        finally:
            if not sent:
                promise.answer(())  # Nobody waits for it.
        return promise if sent else None

    async def _on_pipelined(self, batch: Sequence[Request[Any]]) -> Deferred:
        assert self._pipelined is not None
        assert self._guard is not None
        self._lone = len(batch) == 1
        promise, traces = self.ctx.defer(), self._traces()

        def replied(replies: Sequence[Reply]) -> None:
            self._account(batch, replies, traces)
            promise.answer(replies)

        try:
            await self._guard.submit(self._asked, batch, self.ctx.deadline, replied)
        except BaseException:
            promise.answer(())  # Nobody waits for it; the cell answers the batch.
            raise
        return promise

    async def _on_apart(self, batch: Sequence[Request[Any]]) -> Deferred:
        return await self._on_pipelined(batch)

    def _traces(self) -> Sequence[str | None]:
        return self.ctx.traces if self.ctx.audience.kinds else ()

    def _account(self, batch: Sequence[Request[Any]], replies: Sequence[Reply], traces: Sequence[str | None]) -> None:
        """Count what came of a batch, and tell whoever listens, each event with the trace of its request."""
        self._tally.count_all(batch, replies)
        if not self.ctx.audience.kinds:
            return
        token = turn_trace.set(None)
        try:
            for place, (request, reply) in enumerate(zip(batch, replies, strict=True)):
                if traces:
                    turn_trace.set(traces[place])
                tell_facts(request, reply, self.ctx.tell)
        finally:
            turn_trace.reset(token)

    async def _watch(self, request: WatchLease) -> Deferred:
        # It waits for nothing: a coroutine, so that it is the actor's task that asks, on the store's event loop.
        assert isinstance(self._store, WatchfulStore)
        promise = self.ctx.defer()
        self._store.watch(request, promise.answer)
        return promise

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
        self.ctx.tell(CacheHit if hit else CacheMiss, key)

    def _tell_write(self, key: str, version: float, ttl: float | None, tags: tuple[str, ...]) -> None:
        self.ctx.tell(CacheSet, key, version, ttl, tags)

    def _tell_removal(self, key: str, cause: RemovalCause) -> None:
        if (kind := _REMOVALS.get(cause)) is not None:
            self.ctx.tell(kind, key)

    def _clear(self, verb: PlainHandler) -> PlainHandler:
        def clear(request: Clear) -> Reply | Deferred | None:
            reply = verb(request)
            self.ctx.tell(CacheCleared)
            return reply

        return clear

    def _invalidate_tags(self, verb: PlainHandler) -> PlainHandler:
        def invalidate_tags(request: InvalidateTags) -> Reply | Deferred | None:
            reply = verb(request)
            self.ctx.tell(TagsInvalidated, request.tags)
            return reply

        return invalidate_tags

    def _admit(self, verb: PlainHandler) -> PlainHandler:
        def admit(request: Admit) -> Reply | Deferred | None:
            reply = verb(request)
            if isinstance(reply, RateLimitDenied):
                self.ctx.tell(RateLimitExceeded, request.key, request.cost, reply.retry_after)
            return reply

        return admit


_REMOVALS: dict[RemovalCause, type[CacheDeleted | CacheEvicted | CacheExpired]] = {
    RemovalCause.EXPLICIT: CacheDeleted,
    RemovalCause.SIZE: CacheEvicted,
    RemovalCause.EXPIRED: CacheExpired,
}


def _refuse(store: Store, kind: type[Request[Any]]) -> PlainHandler:
    def refuse(request: Request[Any]) -> Reply:
        raise CapabilityError(store=store.name, capability=kind.__name__)

    return refuse
