"""Redacted keys, sampled events and local listeners, over a real server."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import nats
import pytest

from cachebus import open_cache
from cachebus.bus import Emitter, EventPolicy, LocalBus
from cachebus.bus.nats.bus import NatsBus
from cachebus.messages import CacheHit, CacheMiss, CacheSet, EventsMissed, RequestFailed
from cachebus.testing.servers import Server

from .conftest import Connect, options

pytestmark = pytest.mark.anyio
T = 20.0
SECRET = "s" * 32
KEY = "user:naïve"


def digest(key: str, secret: str = "") -> str:
    return hashlib.blake2b(key.encode(), digest_size=16, key=secret.encode()).hexdigest()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, KEY),
        ({"keys": "hash"}, digest(KEY)),
        ({"keys": "hash", "hash_key": SECRET}, digest(KEY, SECRET)),
        ({"keys": "none"}, ""),
    ],
)
async def test_a_key_leaves_as_the_settings_say(
    nats_server: Server, namespace: str, given: dict[str, Any], expected: str
) -> None:
    stranger = await nats.connect(nats_server.url)
    heard = await stranger.subscribe(f"cachebus.v1.{namespace}.evt.cache_set.*")
    await stranger.flush()
    try:
        async with open_cache("memory://", bus=nats_server.url, namespace=namespace, events=given) as cache:
            with cache.events(CacheSet) as shown, cache.client.bus.subscribe(CacheSet, real_keys=True) as real:
                await cache.set(KEY, 1)
                assert getattr(await anext(shown), "key", None) == expected
                assert getattr(await anext(real), "key", None) == KEY
            assert json.loads((await heard.next_msg(timeout=T)).data)["key"] == expected
            assert await cache.get(KEY) == 1
    finally:
        await stranger.close()


async def test_what_others_have_redacted_is_not_redacted_again(
    connect: Connect, nats_server: Server, namespace: str
) -> None:
    there = await connect()
    async with NatsBus(namespace, options(nats_server), policy=EventPolicy("hash")) as here:
        with here.subscribe(CacheSet) as heard, there.subscribe(CacheSet) as heard_there:
            await here.settled()
            await there.settled()
            Emitter(here).publish(CacheSet(key=KEY))
            assert getattr(await anext(heard_there), "key", "") == digest(KEY)
            assert getattr(await anext(heard), "key", "") == digest(KEY)
            Emitter(there).publish(CacheSet(key=digest(KEY)))
            assert getattr(await anext(heard), "key", "") == digest(KEY)


def test_what_has_no_key_gets_none_and_any_key_has_a_hash() -> None:
    policy = EventPolicy("hash")
    failed = RequestFailed("backend.clear", "timeout", "raised")
    assert policy.redacted(failed) is failed
    assert len(policy.key("half a surrogate pair \ud800")) == 32
    assert SECRET not in repr(EventPolicy("hash", SECRET.encode()))


async def test_a_sample_is_told_without_gaps_and_counted_in_full(nats_server: Server, namespace: str) -> None:
    bus = {"hosts": [f"{nats_server.host}:{nats_server.port}"], "events": ["cache_hit", "cache_miss", "cache_set"]}
    events = {"sample": {"cache_hit": 0.25, "cache_miss": 0}}
    async with (
        NatsBus(namespace, options(nats_server)) as there,
        open_cache("memory://", bus=bus, namespace=namespace, events=events) as cache,
    ):
        with (
            there.subscribe(CacheHit, CacheMiss, EventsMissed, CacheSet, capacity=10_000) as heard,
            cache.events(CacheHit, CacheMiss, capacity=10_000) as heard_here,
        ):
            await there.settled()
            await cache.set("k", 1)
            for _ in range(2000):
                await cache.get("k")
                await cache.get("absent")
            await cache.set("the last", 1)
            told = 0
            async for event in heard:
                if isinstance(event, CacheSet) and event.key == "the last":
                    break
                assert not isinstance(event, CacheMiss | EventsMissed)
                told += isinstance(event, CacheHit)
            here = [heard_here.next(0) for _ in range(len(heard_here))]
        snapshot = await cache.statistics()
    assert snapshot.hits == snapshot.misses == 2000
    # Six standard deviations on either side. Kinds have separate subscriptions, so some events may be in flight.
    assert 0 < told <= len(here)
    assert 384 < len(here) < 616
    assert all(isinstance(each, CacheHit) for each in here)
    assert there.counters.events_missed == 0


def test_what_a_sample_leaves_out_is_not_numbered() -> None:
    bus = LocalBus(policy=EventPolicy(sample={"cache_hit": 0.5}, draw=iter([0.4, 0.6, 0.5, 0.1]).__next__))
    emitter = Emitter(bus)
    with bus.subscribe(CacheHit) as heard:
        for key in "abcd":
            emitter.emit(CacheHit, key)
        told: list[Any] = [heard.next(0) for _ in range(len(heard))]
    assert [(each.key, each.seq) for each in told] == [("a", 1), ("d", 2)]


async def test_a_local_listener_hears_its_own_process_only(connect: Connect, nats_server: Server) -> None:
    there = await connect()
    async with open_cache("memory://", bus=nats_server.url, namespace=there.namespace) as cache:
        with cache.events(CacheSet, local=True) as own, cache.events(CacheSet) as every:
            await cache.client.bus.settled()  # type: ignore[attr-defined]
            Emitter(there).publish(CacheSet(key="there"))
            assert getattr(await anext(every), "key", "") == "there"
            await cache.set("here", 1)
            assert getattr(await anext(own), "key", "") == "here"
            assert not len(own)


async def test_what_only_local_listeners_want_is_not_fetched(connect: Connect) -> None:
    here, there = await connect(), await connect()
    with here.subscribe(CacheSet, local=True), here.subscribe(EventsMissed):
        await here.settled()
        Emitter(there).publish(CacheSet(key="k"))
        assert here.subscriptions.listened_to == {EventsMissed}
        with there.subscribe(CacheSet) as heard:
            await there.settled()
            Emitter(here).publish(CacheSet(key="k"))
            await anext(heard)  # Earlier events would have arrived by now.
    assert here.counters.events_received == 0
