"""Events between processes: published kinds and formats, delivery to listeners, and detected gaps."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import anyio
import nats
import pytest
from msgspec.structs import replace

from cachebus.bus import Emitter
from cachebus.bus.address import Subjects
from cachebus.bus.codec.messages import JSON, MSGPACK, decode, encode
from cachebus.bus.nats.bus import NatsBus
from cachebus.messages import CacheConfigurationError, CacheHit, CacheSet, Event, EventsMissed
from cachebus.testing.servers import Server

from .conftest import Connect, options

pytestmark = pytest.mark.anyio
T = 20.0


async def test_a_listener_hears_events_of_its_own_process_and_of_others_once(connect: Connect) -> None:
    here, there = await connect(), await connect()
    with here.subscribe(CacheSet) as heard, there.subscribe(CacheSet) as heard_there:
        await here.settled()
        await there.settled()
        for number in range(100):
            Emitter(here, "primary").publish(CacheSet(key=f"here {number}"))
            Emitter(there, "primary").publish(CacheSet(key=f"there {number}"))
        for each in (heard, heard_there):
            keys = [getattr(await anext(each), "key", "") for _ in range(200)]
            assert sorted(keys) == sorted(f"{place} {number}" for place in ("here", "there") for number in range(100))
            assert not len(each)
    assert here.counters.events_sent == here.counters.events_received == 100
    assert here.counters.events_missed == 0


async def test_what_goes_out_is_what_the_options_name(connect: Connect, nats_server: Server, namespace: str) -> None:
    stranger = await nats.connect(nats_server.url)
    heard = await stranger.subscribe(f"cachebus.v1.{namespace}.evt.>")
    await stranger.flush()
    try:
        bus = await connect(events=("cache_hit",))
        Emitter(bus, "primary").publish(CacheSet(key="k"))
        Emitter(bus, "primary").publish(CacheHit(key="naïve ☕"))
        msg = await heard.next_msg(timeout=T)
        assert msg.subject == f"cachebus.v1.{namespace}.evt.cache_hit.primary"
        assert msg.headers == {"Content-Type": "application/json"}
        event = json.loads(msg.data)
        assert (event["kind"], event["key"], event["seq"]) == ("event.cache_hit", "naïve ☕", 1)
        assert (event["namespace"], event["backend"]) == (namespace, "primary")
        assert event["origin"].startswith(f"{os.getpid()}-")
        assert event["id"]
        packed = await connect(events=("cache_set",), events_as_json=False)
        Emitter(packed, "primary").publish(CacheSet(key="k"))
        msg = await heard.next_msg(timeout=T)
        assert msg.headers == {"Content-Type": MSGPACK}
        assert getattr(decode(msg.data, MSGPACK), "key", "") == "k"
    finally:
        await stranger.close()


async def test_an_event_that_nobody_wants_is_not_built(connect: Connect) -> None:
    silent = await connect(events=())
    assert not silent.subscriptions.kinds
    assert CacheHit not in (await connect()).subscriptions.kinds


async def test_a_gap_in_the_numbers_of_an_origin_is_told(connect: Connect, nats_server: Server, namespace: str) -> None:
    bus = await connect()
    stranger = await nats.connect(nats_server.url)
    try:
        with bus.subscribe(CacheSet, EventsMissed) as heard:
            await bus.settled()
            for seq in (7, 8, 12, 13, 13):
                event = CacheSet(key=str(seq))
                event = replace(event, namespace=namespace, backend="primary", origin="o", epoch=1, seq=seq)
                await stranger.publish(Subjects(namespace).event(CacheSet, "primary"), encode(event, JSON))
            told: list[Any] = [await anext(heard) for _ in range(6)]
        assert [getattr(each, "key", "gap") for each in told] == ["7", "8", "gap", "12", "13", "13"]
        assert (told[2].source, told[2].event, told[2].count) == ("o", "event.cache_set", 3)
        assert bus.counters.events_missed == 3
    finally:
        await stranger.close()


@pytest.mark.parametrize("body", [b"", b"junk", encode(EventsMissed("", "", 0), JSON)[:-2], b"{}" * 1000])
async def test_junk_on_an_event_subject_is_counted(
    connect: Connect, nats_server: Server, namespace: str, body: bytes
) -> None:
    bus = await connect()
    stranger = await nats.connect(nats_server.url)
    try:
        with bus.subscribe(CacheSet) as heard:
            await bus.settled()
            subject = Subjects(namespace).event(CacheSet, "primary")
            await stranger.publish(subject, body)
            event = CacheSet(key="k")
            event = replace(event, namespace=namespace, seq=1)
            await stranger.publish(subject, encode(event, JSON))
            assert getattr(await anext(heard), "key", "") == "k"
        assert bus.counters.bad_messages == 1
    finally:
        await stranger.close()


async def test_events_wait_for_a_lost_connection_within_the_bound_of_the_outbox(
    own_server: Server, namespace: str
) -> None:
    async with (
        NatsBus(namespace, options(own_server, outbox=10)) as bus,
        NatsBus(namespace, options(own_server)) as there,
    ):
        with there.subscribe(CacheSet) as heard:
            await there.settled()
            await anyio.to_thread.run_sync(own_server.kill)
            with anyio.fail_after(T):
                while bus.connection.up:
                    await asyncio.sleep(0.01)
            emitter = Emitter(bus, "primary")
            for number in range(25):
                emitter.publish(CacheSet(key=str(number)))
            assert bus.counters.events_dropped == 15
            await anyio.to_thread.run_sync(own_server.start)
            with anyio.fail_after(T):
                while bus.counters.events_sent < 10:
                    await asyncio.sleep(0.01)
            del heard
    assert bus.counters.reconnects == 1


async def test_what_waits_when_a_bus_is_closed_goes_out_first(
    connect: Connect, nats_server: Server, namespace: str
) -> None:
    there = await connect()
    with there.subscribe(CacheSet, capacity=10_000) as heard:
        await there.settled()
        async with NatsBus(namespace, options(nats_server)) as bus:
            emitter = Emitter(bus, "primary")
            for number in range(5000):
                emitter.publish(CacheSet(key=str(number)))
        events: list[Event] = [await anext(heard) for _ in range(5000)]
    assert [getattr(each, "key", "") for each in events] == [str(number) for number in range(5000)]


async def test_events_from_a_thread_go_out(connect: Connect) -> None:
    here, there = await connect(), await connect()
    with there.subscribe(CacheSet) as heard:
        await there.settled()
        emitter = Emitter(here, "primary")

        def emit() -> None:
            for number in range(100):
                emitter.publish(CacheSet(key=str(number)))

        await anyio.to_thread.run_sync(emit)
        assert [getattr(await anext(heard), "key", "") for _ in range(100)] == [str(number) for number in range(100)]


async def test_a_kind_that_does_not_exist_is_refused(connect: Connect) -> None:
    with pytest.raises((CacheConfigurationError, ValueError), match="unknown kind of event 'cache_hits'"):
        await connect(events=("cache_hits",))


async def test_a_head_without_an_end_of_line_is_one_bad_event(
    connect: Connect, nats_server: Server, namespace: str
) -> None:
    here, there = await connect(), await connect()
    subject = Subjects(namespace).event(CacheSet, "primary").encode()
    head = b"NATS/1.0\r\nContent-Type: text/plain"
    with here.subscribe(CacheSet) as heard:
        await here.settled()
        reader, writer = await asyncio.open_connection(nats_server.host, nats_server.port)
        writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
        writer.write(b"HPUB %b %d %d\r\n%b{}\r\nPING\r\n" % (subject, len(head), len(head) + 2, head))
        while await reader.readline() != b"PONG\r\n":
            pass
        writer.close()
        for number in range(3):
            Emitter(there, "primary").publish(CacheSet(key=f"k{number}"))
        async with asyncio.timeout(T):
            assert [getattr(await anext(heard), "key", "") for _ in range(3)] == ["k0", "k1", "k2"]
    assert here.counters.bad_messages == 1


async def test_large_events_leave_in_several_writes(connect: Connect) -> None:
    bus = await connect(outbox=200)
    for number in range(120):
        Emitter(bus, "primary").publish(CacheSet(key=f"{number:03}" + "x" * 700_000))
    async with asyncio.timeout(T):
        while bus.counters.events_sent + bus.counters.events_dropped < 120:
            await asyncio.sleep(0.01)
    assert (bus.counters.events_sent, bus.counters.events_dropped) == (120, 0)
