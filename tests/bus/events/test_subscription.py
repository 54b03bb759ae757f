"""Subscriptions: bounded, ordered, counted, and free without a listener."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.to_thread
import pytest

from cachebus.bus import Emitter, LocalBus, SubscriptionRegistry
from cachebus.messages import CacheDeleted, CacheHit, CacheMiss, CacheSet, Event, Get

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bus() -> AsyncIterator[LocalBus]:
    bus = LocalBus("test")
    yield bus
    bus.close()


async def test_events_come_in_the_order_they_were_published(bus: LocalBus) -> None:
    with bus.subscribe(CacheHit, CacheMiss) as events:
        for number in range(5):
            bus.publish(CacheHit(key=str(number)))
            bus.publish(CacheMiss(key=str(number)))
            bus.publish(CacheSet(key="not asked for"))
        events.close()
        heard = [event async for event in events]
    assert [type(event) for event in heard] == [CacheHit, CacheMiss] * 5
    assert [event.key for event in heard[::2]] == list("01234")  # type: ignore[attr-defined]


async def test_a_full_listener_loses_events_and_counts_them(bus: LocalBus) -> None:
    with bus.subscribe(CacheHit, capacity=2) as slow, bus.subscribe(CacheHit) as quick:
        for number in range(5):
            bus.publish(CacheHit(key=str(number)))
        assert (len(slow), slow.dropped, len(quick), quick.dropped) == (2, 3, 5, 0)
        assert bus.subscriptions.dropped == 3
        assert repr(slow) == "<Subscription 2/2 waiting, 3 dropped>"
        assert (await anext(slow)).key == "0"  # type: ignore[attr-defined]
        bus.publish(CacheHit(key="5"))
        assert (len(slow), slow.dropped) == (2, 3)


async def test_a_listener_that_waits_is_woken(bus: LocalBus) -> None:
    heard: list[Event] = []
    with bus.subscribe(CacheHit) as events:

        async def listen() -> None:
            async for event in events:
                heard.append(event)  # noqa: PERF401 (looked at while it grows)

        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            await anyio.wait_all_tasks_blocked()
            bus.publish(CacheHit(key="from a task"))
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(bus.publish, CacheHit(key="from a thread"))
            while len(heard) < 2:
                await anyio.lowlevel.checkpoint()
            events.close()
    assert [event.key for event in heard] == ["from a task", "from a thread"]  # type: ignore[attr-defined]


async def test_a_thread_listens_by_iterating_or_with_a_timeout(bus: LocalBus) -> None:
    events = bus.subscribe(CacheHit)
    bus.publish(CacheHit(key="first"))
    assert events.next().key == "first"  # type: ignore[union-attr]
    assert await anyio.to_thread.run_sync(events.next, 0.01) is None

    async with anyio.create_task_group() as group:
        heard: list[str] = []

        def listen() -> None:
            heard.extend(event.key for event in events)  # type: ignore[attr-defined]

        group.start_soon(anyio.to_thread.run_sync, listen)
        for number in range(100):
            bus.publish(CacheHit(key=str(number)))
            await anyio.lowlevel.checkpoint()
        events.close()
    assert heard == [str(number) for number in range(100)]
    assert events.next() is None


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (("cache_h*",), {CacheHit}),
        (("event.cache_hit", "cache_miss"), {CacheHit, CacheMiss}),
        ((CacheHit, "cache_se?"), {CacheHit, CacheSet}),
    ],
)
async def test_kinds_are_chosen_by_class_or_by_a_glob_over_their_names(
    bus: LocalBus, what: tuple[Any, ...], expected: set[type[Event]]
) -> None:
    with bus.subscribe(*what) as events:
        assert events.kinds == expected
        assert bus.subscriptions.kinds == expected


async def test_naming_nothing_listens_to_everything(bus: LocalBus) -> None:
    with bus.subscribe() as events:
        assert {CacheHit, CacheMiss, CacheSet, CacheDeleted} <= events.kinds


async def test_a_name_that_no_event_has_is_refused_with_those_there_are(bus: LocalBus) -> None:
    with pytest.raises(ValueError, match=r"unknown kind of event 'cache_hti'.*cache_hit"):
        bus.subscribe("cache_hti")


@pytest.mark.parametrize("capacity", [0, -1])
async def test_a_subscription_without_room_is_refused(bus: LocalBus, capacity: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        bus.subscribe(CacheHit, capacity=capacity)


async def test_closing_twice_is_harmless_and_what_waits_can_be_read(bus: LocalBus) -> None:
    events = bus.subscribe(CacheHit)
    bus.publish(CacheHit(key="k"))
    events.close()
    events.close()
    bus.publish(CacheHit(key="too late"))
    assert [event async for event in events] == [CacheHit(key="k")]
    assert bus.subscriptions.kinds == frozenset()


async def test_closing_the_bus_ends_every_listener(bus: LocalBus) -> None:
    events = bus.subscribe()
    async with anyio.create_task_group() as group:

        async def listen() -> None:
            assert [event async for event in events] == []

        group.start_soon(listen)
        await anyio.wait_all_tasks_blocked()
        bus.close()


def test_a_watcher_is_told_whenever_the_wanted_kinds_change() -> None:
    subscriptions = SubscriptionRegistry()
    seen: list[frozenset[type[Event]]] = []

    def watch() -> None:
        seen.append(subscriptions.kinds)

    subscriptions.watch(watch)
    first = subscriptions.subscribe((CacheHit,), 10)
    subscriptions.subscribe((CacheMiss,), 10)
    first.close()
    subscriptions.unwatch(watch)
    subscriptions.subscribe((CacheSet,), 10)
    assert seen == [frozenset(), {CacheHit}, {CacheHit, CacheMiss}, {CacheMiss}]


def test_an_emitter_stamps_what_somebody_wants_and_nothing_else() -> None:
    bus = LocalBus("shop")
    emitter = Emitter(bus, "hot")
    unheard, heard = CacheMiss(key="k"), CacheHit(key="k")
    with bus.subscribe(CacheHit) as events:
        emitter.publish(unheard)
        emitter.publish(heard)
        event = events.next()
    assert unheard == CacheMiss(key="k")
    assert type(event) is CacheHit
    assert event.key == "k"
    assert heard == CacheHit(key="k"), "the emitted event must not change"
    assert (event.namespace, event.backend, event.seq, event.epoch) == ("shop", "hot", 1, emitter.epoch)
    assert event.origin
    assert event.id.startswith(event.origin)
    assert event.time > 1_600_000_000


def test_each_epoch_of_an_emitter_is_later_and_counts_anew() -> None:
    bus = LocalBus("shop")
    emitter = Emitter(bus)
    with bus.subscribe(CacheHit) as events:
        for _ in range(2):
            emitter.publish(CacheHit(key="k"))
        first = emitter.epoch
        emitter.renew()
        emitter.publish(CacheHit(key="k"))
        heard = [events.next() for _ in range(3)]
    assert [event.seq for event in heard if event] == [1, 2, 1]
    assert emitter.epoch > first


def test_a_watcher_that_joins_while_somebody_subscribes_has_the_last_word_right() -> None:
    subscriptions = SubscriptionRegistry()
    wanted: list[frozenset[type[Event]]] = []
    tried = threading.Event()

    class Guard:
        """Lock of the subscriptions that signals when another thread tries to take it."""

        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __enter__(self) -> None:
            if threading.current_thread() is subscriber:
                tried.set()
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            if threading.current_thread() is subscriber:
                done.set()

    done = threading.Event()
    subscriber = threading.Thread(target=subscriptions.subscribe, args=((CacheHit,), 10))
    subscriptions._guard = Guard()  # type: ignore[assignment]

    def watch() -> None:
        kinds = subscriptions.kinds
        if not wanted and subscriber.ident is None:
            subscriber.start()
            tried.wait(30)
            if not subscriptions._guard.lock.locked():  # type: ignore[attr-defined]
                done.wait(30)
        wanted.append(kinds)

    subscriptions.watch(watch)
    subscriber.join()
    assert wanted[-1] == {CacheHit}


async def test_a_class_names_those_that_inherit_from_it(bus: LocalBus) -> None:
    with bus.subscribe(Event) as everything, bus.subscribe() as named_nothing:
        assert everything.kinds == named_nothing.kinds
        bus.publish(CacheHit(key="k"))
        assert len(everything) == 1


async def test_a_class_that_no_event_is_of_is_refused(bus: LocalBus) -> None:
    with pytest.raises(ValueError, match="unknown kind of event"):
        bus.subscribe(Get)  # type: ignore[arg-type]
