from __future__ import annotations

from typing import Any

import pytest

from cachebus.actors.ports import Gauges, InlineStore
from cachebus.adapters.null import NullStore
from cachebus.messages import (
    WIRE_NAMES,
    Add,
    Clear,
    Cleared,
    CompareAndSet,
    Delete,
    Deleted,
    DeleteMany,
    DeletePattern,
    Exists,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Incremented,
    Invalidated,
    InvalidateTags,
    Missing,
    NotStored,
    Ping,
    Reply,
    Request,
    Scan,
    Scanned,
    Set,
    SetMany,
    Stored,
    StoredMany,
    Sweep,
    Touch,
    reply_types,
)

EXCHANGES: list[tuple[Request[Any], Reply]] = [
    (Get("a"), Missing()),
    (GetMany(("a", "b")), FoundMany({})),
    (Exists("a"), Missing()),
    (Set("a", 1), Stored(0)),
    (Set("a", 1, ttl=5.0, tags=("t",), only_if="absent"), Stored(0)),
    (Set("a", 1, only_if="present"), NotStored(0)),
    (SetMany({"a": 1, "b": 2}), StoredMany(2)),
    (Add("a", 1), Stored(0)),
    (CompareAndSet("a", 1, version=0), NotStored(0)),
    (Touch("a"), Missing()),
    (Increment("a"), Incremented(1)),
    (Increment("a", delta=-3, initial=10), Incremented(7)),
    (Increment("a", initial=None), Missing()),
    (Delete("a"), Deleted(0)),
    (DeleteMany(("a", "b")), Deleted(0)),
    (DeletePattern("*"), Deleted(0)),
    (Scan(), Scanned(())),
    (InvalidateTags(("t",)), Invalidated()),
    (Clear(), Cleared()),
    (Sweep(), Deleted(0)),
]


def ask(store: NullStore, request: Request[Any]) -> Reply:
    verb = store.verb(type(request))
    assert verb is not None
    return verb(request)


@pytest.mark.parametrize(("request_", "reply"), EXCHANGES)
def test_each_request_is_answered_as_if_nothing_were_there(request_: Request[Any], reply: Reply) -> None:
    assert ask(NullStore(), request_) == reply
    assert type(reply) in reply_types(type(request_))


def test_nothing_that_was_written_is_there_afterwards() -> None:
    store = NullStore()
    for request, reply in EXCHANGES * 2:
        assert ask(store, request) == reply


def test_no_request_to_a_backend_is_forgotten() -> None:
    known = {name for name in WIRE_NAMES if name.startswith("backend.")}
    assert {request.WIRE_NAME for request, _ in EXCHANGES} == known | {Sweep.WIRE_NAME}
    assert NullStore().verb(Ping) is None


async def test_it_is_an_inline_store_that_can_do_everything() -> None:
    store = NullStore()
    assert isinstance(store, InlineStore)
    assert store.capabilities.names() == ("patterns", "tags", "compare_and_set", "counters")
    await store.open()
    assert store.next_expiry() is None
    assert store.sweep(10) == 0
    await store.close()
    await store.close()


def test_reads_are_misses_and_are_told() -> None:
    store = NullStore()
    told: list[tuple[str, bool]] = []
    store.on_read = lambda key, hit: told.append((key, hit))
    for request in (Get("a"), GetMany(("b", "c", "b")), Exists("d"), Touch("e")):
        ask(store, request)
    assert told == [("a", False), ("b", False), ("c", False)]
    store.on_read = None
    ask(store, Get("a"))
    assert store.gauges() == Gauges(misses=4, max_entries=0, max_bytes=0)
    assert repr(store) == "<NullStore 4 misses>"


def test_writes_are_neither_counted_nor_told() -> None:
    store = NullStore()
    told: list[object] = []

    def tell(*what: object) -> None:
        told.append(what)

    store.on_write = store.on_removal = store.on_due = tell
    for request, _ in EXCHANGES:
        ask(store, request)
    assert told == []
    assert store.gauges().sets == store.gauges().entries == 0
