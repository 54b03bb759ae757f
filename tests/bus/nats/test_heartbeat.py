"""Heartbeats: they reveal lost events before a silence, and report no others."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.to_thread
import nats
import pytest
from msgspec.structs import replace

from cachebus.bus import Emitter
from cachebus.bus.address import Subjects
from cachebus.bus.codec.messages import JSON, encode
from cachebus.bus.nats.bus import NatsBus
from cachebus.messages import CacheDeleted, CacheSet, Event, EventsMissed, Heartbeat
from cachebus.testing.servers import Server

from .conftest import Connect, options

pytestmark = pytest.mark.anyio
T = 20.0


async def test_the_loss_of_the_last_events_is_told(connect: Connect) -> None:
    there = await connect(heartbeat=0.05)
    # The client drops messages above a subscription's limit, which is a loss like any other.
    here = await connect(pending_messages=10)
    with here.subscribe(CacheSet, EventsMissed) as heard:
        await here.settled()
        Emitter(there).publish(CacheSet(key="first"))
        assert getattr(await anext(heard), "key", "") == "first"
        for number in range(60):
            Emitter(there).publish(CacheSet(key=str(number)))
        arrived = missed = 0
        with anyio.fail_after(T):
            while arrived + missed < 60:  # Two losses with a heartbeat between them are reported separately.
                event: object = await anext(heard)
                if isinstance(event, CacheSet):
                    arrived += 1
                else:
                    assert isinstance(event, EventsMissed)
                    assert event.event == "event.cache_set"
                    missed += event.count
        assert arrived + missed == 60
        assert 0 < missed == here.counters.events_missed


async def test_without_heartbeats_it_is_not(connect: Connect) -> None:
    there = await connect(heartbeat=None)
    here = await connect()
    with here.subscribe(CacheSet, Heartbeat) as heard:
        await here.settled()
        Emitter(there).publish(CacheSet(key="k"))
        assert isinstance(await anext(heard), CacheSet)
        there._beat()
        await there.connection.flush()
        await here.settled()
        assert not len(heard)
    assert there.counters.heartbeats_sent == 0


async def test_who_has_told_something_beats_at_its_interval_until_it_is_closed(
    connect: Connect, nats_server: Server, namespace: str
) -> None:
    here = await connect()
    async with NatsBus(namespace, options(nats_server, heartbeat=0.05)) as there:
        with here.subscribe("heartbeat") as heard, here.subscribe() as everything:
            await here.settled()
            there._beat()
            assert there.counters.heartbeats_sent == 0
            Emitter(there, "primary").publish(CacheSet(key="k"))
            Emitter(there, "primary").publish(CacheSet(key="l"))
            Emitter(there).publish(CacheDeleted(key="k"))
            beats: list[Any] = [await anext(heard) for _ in range(3)]
            await there.aclose()
            last: Any = None
            with anyio.fail_after(T):
                while last is None or last.seq < there.counters.heartbeats_sent:
                    last = await anext(heard)
            assert [each.seq for each in beats] == [1, 2, 3]
            assert all(after.time - before.time > 0.03 for before, after in itertools.pairwise(beats))
            assert last.last == {"cache_set.primary": 2, "cache_deleted._": 1}
            assert (last.interval, last.origin) == (0.05, beats[0].origin)
            assert not any(isinstance(everything.next(0), Heartbeat) for _ in range(len(everything)))


async def test_what_a_full_outbox_drops_is_missed(own_server: Server, namespace: str) -> None:
    async with (
        NatsBus(namespace, options(own_server, outbox=10, heartbeat=0.05)) as there,
        NatsBus(namespace, options(own_server)) as here,
    ):
        with here.subscribe(CacheSet, EventsMissed) as heard:
            await here.settled()
            Emitter(there).publish(CacheSet(key="k"))
            await anext(heard)
            await anyio.to_thread.run_sync(own_server.kill)
            with anyio.fail_after(T):
                while there.connection.up or here.connection.up:
                    await asyncio.sleep(0.01)
            for number in range(25):
                Emitter(there).publish(CacheSet(key=str(number)))
            await anyio.to_thread.run_sync(own_server.start)
            missed = arrived = 0
            with anyio.fail_after(T):
                # Those of the ten that are published before the listener reconnects are missed as well.
                while missed + arrived < 25:
                    event = await anext(heard)
                    missed += event.count if isinstance(event, EventsMissed) else 0
                    arrived += isinstance(event, CacheSet)
            assert missed >= 15
    assert there.counters.events_dropped == 15


class Stranger:
    """Publisher of events and heartbeats with chosen numbers."""

    def __init__(self, client: Any, namespace: str) -> None:
        self.client = client
        self.subjects = Subjects(namespace)

    async def say(self, event: Event, seq: int, origin: str = "o") -> None:
        event = replace(event, namespace=self.subjects.namespace, origin=origin, epoch=1, seq=seq)
        await self.client.publish(self.subjects.event(type(event), ""), encode(event, JSON))

    async def beat(self, seq: int, **last: int) -> None:
        await self.say(Heartbeat(last={f"{kind}._": number for kind, number in last.items()}), seq)


@pytest.fixture
async def stranger(nats_server: Server, namespace: str) -> AsyncIterator[Stranger]:
    client = await nats.connect(nats_server.url)
    yield Stranger(client, namespace)
    await client.close()


async def test_nothing_is_missed_that_was_told_before_anybody_listened(connect: Connect, stranger: Stranger) -> None:
    bus = await connect()
    with bus.subscribe(CacheDeleted, EventsMissed) as heard:
        await bus.settled()
        await stranger.beat(1, cache_set=100, cache_deleted=7)
        await stranger.say(CacheDeleted(key="8"), 8)
        assert isinstance(await anext(heard), CacheDeleted)
        with bus.subscribe(CacheSet) as sets:
            await bus.settled()
            await stranger.beat(2, cache_set=103, cache_deleted=8)
            await stranger.say(CacheSet(key="104"), 104)
            assert isinstance(await anext(sets), CacheSet)
        # After a new subscription, the events in between do not count as missed.
        await bus.settled()
        with bus.subscribe(CacheSet) as sets:
            await bus.settled()
            await stranger.beat(3, cache_set=200, cache_deleted=8)
            await stranger.say(CacheSet(key="201"), 201)
            assert isinstance(await anext(sets), CacheSet)
        await stranger.say(CacheDeleted(key="9"), 9)
        assert isinstance(await anext(heard), CacheDeleted)
    assert bus.counters.events_missed == 0


async def test_the_first_event_of_a_kind_can_be_missed_too(connect: Connect, stranger: Stranger) -> None:
    bus = await connect()
    with bus.subscribe(CacheDeleted, CacheSet, EventsMissed) as heard:
        await bus.settled()
        await stranger.beat(1, cache_set=5)
        await stranger.beat(2, cache_set=5, cache_deleted=2)
        told: Any = await anext(heard)
        assert (told.event, told.count, told.source) == ("event.cache_deleted", 2, "o")
        await stranger.beat(3, cache_set=5, cache_deleted=2, no_such_kind=9)
        await stranger.beat(4, cache_set=6, cache_deleted=2)
        told = await anext(heard)
        assert (told.event, told.count) == ("event.cache_set", 1)


async def test_a_heartbeat_that_overtakes_events_makes_no_gap(connect: Connect, stranger: Stranger) -> None:
    bus = await connect()
    with bus.subscribe(CacheSet, EventsMissed, capacity=10_000) as heard:
        await bus.settled()
        for seq in range(1, 2001):
            await stranger.say(CacheSet(key=str(seq)), seq)
            if seq % 10 == 0:
                await stranger.beat(seq, cache_set=seq)
        for _ in range(2000):
            assert isinstance(await anext(heard), CacheSet)
        await stranger.beat(2001, cache_set=2001)
        missed: Any = await anext(heard)
        assert (missed.event, missed.count) == ("event.cache_set", 1)
