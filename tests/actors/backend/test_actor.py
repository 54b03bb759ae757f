"""The backend actor without a bus: forwarded requests, counters and events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from cachebus.actors import STORE_REQUESTS, BackendActor, Capabilities, Context, Gauges
from cachebus.actors.backend.actor import SWEEP_BATCH
from cachebus.adapters.memory.store import MemoryStore
from cachebus.messages import (
    BackendConnected,
    CacheCleared,
    CacheDeleted,
    CacheEvicted,
    CacheExpired,
    CacheHit,
    CacheMiss,
    CacheSet,
    CapabilityError,
    CircuitOpened,
    Clear,
    Cleared,
    Delete,
    Deleted,
    DeleteMany,
    Describe,
    Event,
    Found,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Incremented,
    Invalidated,
    InvalidateTags,
    Missing,
    Ping,
    Pong,
    RemovalCause,
    Reply,
    Request,
    Set,
    SetMany,
    Stored,
    StoredMany,
    Sweep,
    TagsInvalidated,
    TakeSnapshot,
)
from cachebus.testing.fakes import RecordingContext

from ...clock import ManualClock

pytestmark = pytest.mark.anyio


class Recorder(RecordingContext):
    """Recording context with a manual clock, for an actor with two restarts and three refused messages."""

    clock: ManualClock

    def __init__(self, *kinds: type[Event]) -> None:
        super().__init__(*kinds, address="backend.test", clock=ManualClock())
        self.restarts = 2
        self.overloaded = 3


class ScriptedStore:
    """Batch store that returns the replies given by the test."""

    name = "scripted"
    capabilities = Capabilities(patterns=True, max_key_bytes=250)

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.open_count = 0

    async def open(self) -> None:
        self.open_count += 1

    async def close(self) -> None:
        self.open_count -= 1

    def gauges(self) -> Gauges:
        return Gauges(entries=7, max_entries=9)

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return [self.replies.pop(0) for _ in batch]


async def started(store: Any, context: Recorder) -> BackendActor:
    actor = BackendActor(store)
    actor.ctx = cast("Context", context)
    await actor.on_start()
    return actor


async def test_over_an_inline_store_its_own_verbs_are_the_handlers() -> None:
    store = MemoryStore()
    actor = await started(store, Recorder())
    table = actor.handlers()
    assert set(STORE_REQUESTS) <= set(table.plain)
    assert table.plain[Get] == store.get
    assert table.batch == {}


async def test_over_a_batch_store_every_request_goes_into_batches() -> None:
    actor = await started(ScriptedStore(), Recorder())
    table = actor.handlers()
    assert set(table.batch) == set(STORE_REQUESTS)
    assert {Ping, Describe, TakeSnapshot} <= set(table.plain)


async def test_while_nobody_listens_a_store_has_nobody_to_tell() -> None:
    store, context = MemoryStore(), Recorder(CircuitOpened)
    actor = await started(store, context)
    actor.handlers()
    assert (store.on_read, store.on_write, store.on_removal) == (None, None, None)
    with context.subscriptions.subscribe((CacheMiss,), 10):
        assert store.on_read is not None
        assert (store.on_write, store.on_removal) == (None, None)
    assert store.on_read is None
    with context.subscriptions.subscribe((CacheSet, CacheEvicted), 10):
        assert store.on_write is not None
        assert store.on_removal is not None
    await actor.on_stop()
    context.subscriptions.subscribe((CacheMiss,), 10)
    assert store.on_read is None


async def test_an_inline_store_is_told_about_event_by_event() -> None:
    context = Recorder()
    store = MemoryStore(max_entries=2, policy="lru", clock=context.clock)
    actor = await started(store, context)
    plain = actor.handlers().plain
    plain[Get](Get("a"))
    plain[Set](Set("a", 1, 5.0, ("t",)))
    plain[Get](Get("a"))
    plain[Delete](Delete("a"))
    plain[Delete](Delete("a"))
    for key in "abc":
        plain[Set](Set(key, 1, None))
    plain[InvalidateTags](InvalidateTags(("t",)))
    plain[Clear](Clear())
    kinds = [type(event) for event in context.emitted]
    assert kinds == [
        CacheMiss,
        CacheSet,
        CacheHit,
        CacheDeleted,
        CacheSet,
        CacheSet,
        CacheEvicted,
        CacheSet,
        TagsInvalidated,
        CacheCleared,
    ]
    first_set, evicted = context.emitted[1], context.emitted[6]
    assert isinstance(first_set, CacheSet)
    assert (first_set.key, first_set.ttl, first_set.tags) == ("a", 5.0, ("t",))
    assert isinstance(evicted, CacheEvicted)
    assert (evicted.key, evicted.cause) == ("a", RemovalCause.SIZE)


async def test_expired_entries_are_swept_when_they_are_due_a_bounded_number_at_a_time() -> None:
    context = Recorder(CacheExpired)
    store = MemoryStore(max_entries=None, clock=context.clock)
    actor = await started(store, context)
    plain = actor.handlers().plain
    for number in range(SWEEP_BATCH + 5):
        plain[Set](Set(str(number), number, 1.0))
    assert len(context.sent) == 1
    (delay, message) = context.sent.pop()
    assert isinstance(message, Sweep)
    assert 1.0 <= delay <= 1.2
    context.clock.advance(delay)
    assert actor.on_sweep(Sweep()) == Deleted(SWEEP_BATCH)
    assert len(store) == 5
    (delay, _) = context.sent.pop()
    assert delay <= 0.0
    assert actor.on_sweep(Sweep()) == Deleted(5)
    assert context.sent == []
    assert len(context.emitted) == SWEEP_BATCH + 5


async def test_an_earlier_expiry_moves_the_sweep() -> None:
    context = Recorder()
    actor = await started(MemoryStore(clock=context.clock), context)
    plain = actor.handlers().plain
    plain[Set](Set("late", 1, 500.0))
    plain[Set](Set("soon", 1, 1.0))
    assert [round(delay) for delay, _ in context.sent] == [1]


@pytest.mark.parametrize(
    ("request_", "reply", "events"),
    [
        (Get("k"), Found(1), [CacheHit(key="k")]),
        (Get("k"), Missing(), [CacheMiss(key="k")]),
        (GetMany(("a", "b", "a")), FoundMany({"a": Found(1)}), [CacheHit(key="a"), CacheMiss(key="b")]),
        (Set("k", 1, 5.0, ("t",)), Stored(3.0), [CacheSet(key="k", version=3.0, ttl=5.0, tags=("t",))]),
        (SetMany({"a": 1, "b": 2}), StoredMany(2), [CacheSet(key="a"), CacheSet(key="b")]),
        (Increment("k"), Incremented(1), [CacheSet(key="k")]),
        (Delete("k"), Deleted(1), [CacheDeleted(key="k")]),
        (Delete("k"), Deleted(0), []),
        (DeleteMany(("a", "b")), Deleted(2), [CacheDeleted(key="a"), CacheDeleted(key="b")]),
        (InvalidateTags(("t",)), Invalidated(), [TagsInvalidated(tags=("t",))]),
        (Clear(), Cleared(), [CacheCleared()]),
    ],
    ids=repr,
)
async def test_what_a_batch_store_did_is_told_from_its_replies(
    request_: Request[Any], reply: Reply, events: list[Event]
) -> None:
    context = Recorder()
    actor = await started(ScriptedStore(reply), context)
    handler = actor.handlers().batch[type(request_)]
    assert await handler([request_]) == [reply]
    assert [each for each in context.emitted if type(each) is not BackendConnected] == events


async def test_what_a_batch_store_did_is_counted_from_its_replies() -> None:
    replies = [Found(1), Missing(), FoundMany({"a": Found(1)}), Stored(1.0), StoredMany(3), Deleted(2)]
    requests = [Get("a"), Get("b"), GetMany(("a", "b")), Set("a", 1), SetMany({}), DeleteMany(("a", "b"))]
    actor = await started(ScriptedStore(*replies), Recorder())
    await actor.handlers().batch[Get](requests)
    snapshot = actor.on_take_snapshot(TakeSnapshot())
    assert (snapshot.hits, snapshot.misses, snapshot.sets) == (2, 2, 4)
    assert snapshot.removals == {"explicit": 2, "replaced": 0, "expired": 0, "size": 0}
    assert (snapshot.entries, snapshot.max_entries, snapshot.store) == (7, 9, "scripted")
    assert (snapshot.restarts, snapshot.overloaded) == (2, 3)
    assert (snapshot.requests, snapshot.hit_rate) == (4, 0.5)


async def test_what_a_store_cannot_do_is_a_capability_error() -> None:
    class Limited(MemoryStore):
        def verb(self, kind: type[Request[Any]]) -> Callable[[Any], Reply] | None:
            return None if kind is Increment else super().verb(kind)

    actor = await started(Limited(), Recorder())
    with pytest.raises(CapabilityError, match="store 'memory' does not support Increment"):
        actor.handlers().plain[Increment](Increment("k"))


async def test_a_backend_says_what_it_is() -> None:
    actor = await started(ScriptedStore(), Recorder())
    assert actor.on_ping(Ping()) == Pong("backend.test")
    description = actor.on_describe(Describe())
    assert description.store == "scripted"
    assert description.capabilities == ("patterns",)
    assert description.limits["max_entries"] == 9
    assert description.limits["max_key_bytes"] == 250


async def test_a_store_is_opened_and_closed_with_its_actor() -> None:
    store = ScriptedStore()
    actor = await started(store, Recorder())
    assert store.open_count == 1
    await actor.on_stop()
    assert store.open_count == 0
