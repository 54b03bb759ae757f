"""Events of the past: kept by JetStream once each, told again since a time, with gaps reported."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import nats
import pytest
from msgspec.structs import replace
from nats.js import JetStreamContext

from cachebus import CapabilityError, open_cache, open_sync_cache
from cachebus.__main__ import main
from cachebus.bus import Emitter
from cachebus.bus.address import Subjects
from cachebus.bus.codec.messages import JSON, encode
from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.options import NatsOptions
from cachebus.messages import CacheConfigurationError, CacheDeleted, CacheSet, Event, EventsMissed
from cachebus.testing.servers import Server, run_nats

from .conftest import RunWorker

pytestmark = pytest.mark.anyio


@pytest.fixture
async def jetstream(nats_server: Server) -> AsyncIterator[JetStreamContext]:
    """JetStream as somebody else sees it."""
    client = await nats.connect(nats_server.url)
    yield client.jetstream()
    await client.close()


def bus_url(server: Server, namespace: str, **options: Any) -> str:
    words = "".join(f"&{name}={value}" for name, value in options.items())
    return f"{server.url}?events_stream={namespace}&events=cache_*{words}"


def keys(events: list[Event]) -> list[str]:
    return [getattr(each, "key", "gap") for each in events]


async def kept(jetstream: JetStreamContext, namespace: str, count: int) -> None:
    """Wait until a stream holds so many events."""
    while (await jetstream.stream_info(namespace)).state.messages < count:
        await asyncio.sleep(0.01)


async def test_what_happened_before_is_told_first_and_then_what_happens(
    nats_server: Server, namespace: str, jetstream: JetStreamContext
) -> None:
    url = bus_url(nats_server, namespace)
    async with open_cache("memory://", bus=url, namespace=namespace) as cache:
        for number in range(300):
            await cache.set(str(number), number)
        await cache.delete("0")
        await kept(jetstream, namespace, 301)
        # Another process, whose queue is much smaller than what there is, and which knows the stream by no name.
        async with open_cache("memory://", bus=nats_server.url, namespace=namespace) as other:
            with other.events(CacheSet, CacheDeleted, EventsMissed, capacity=7, since=3600) as heard:
                told = [await anext(heard) for _ in range(301)]
                assert keys(told) == [*map(str, range(300)), "0"]
                assert isinstance(told[-1], CacheDeleted)
                await cache.set("now", 1)
                assert keys([await anext(heard)]) == ["now"]
                assert heard.dropped == 0
            with other.events(CacheDeleted, since=timedelta(hours=1)) as heard:
                assert keys([await anext(heard)]) == ["0"]


async def test_since_is_a_moment(nats_server: Server, namespace: str, jetstream: JetStreamContext) -> None:
    async with open_cache("memory://", bus=bus_url(nats_server, namespace), namespace=namespace) as cache:
        await cache.set("before", 1)
        await kept(jetstream, namespace, 1)
        first = await jetstream.get_msg(namespace, 1)
        assert first.time is not None
        # The server's clock decides, so what comes next must be later by it.
        await asyncio.sleep(0.02)
        await cache.set("after", 1)
        await kept(jetstream, namespace, 2)
        with cache.events(CacheSet, since=first.time + timedelta(milliseconds=10)) as heard:
            assert keys([await anext(heard)]) == ["after"]
        for wrong, sentence in (
            (datetime(2020, 1, 1), "time zone"),  # noqa: DTZ001
            (datetime.now(UTC) + timedelta(hours=1), "past"),
            (-1, "past"),
            (float("nan"), "past"),
        ):
            with pytest.raises(ValueError, match=sentence):
                cache.events(since=wrong)
        with pytest.raises(TypeError, match="since"):
            cache.events(since="1h")  # type: ignore[arg-type]


async def test_a_cache_without_such_a_bus_has_no_past() -> None:
    async with open_cache("memory://") as cache:
        with pytest.raises(CapabilityError, match="events_stream"):
            cache.events(since=1)


async def test_an_event_is_kept_once_by_its_id(
    nats_server: Server, namespace: str, jetstream: JetStreamContext
) -> None:
    async with open_cache("memory://", bus=bus_url(nats_server, namespace), namespace=namespace) as cache:
        await cache.set("k", 1)
        await kept(jetstream, namespace, 1)
        message = await jetstream.get_msg(namespace, 1)
        assert message.data is not None
        assert (message.headers or {})["Nats-Msg-Id"] == json.loads(message.data)["id"]
        again = await jetstream.publish(message.subject or "", message.data, headers=message.headers)
        assert again.duplicate
        assert (await jetstream.stream_info(namespace)).state.messages == 1


async def test_a_stream_is_made_with_bounds_and_one_that_is_there_stays_as_it_is(
    nats_server: Server, namespace: str, jetstream: JetStreamContext
) -> None:
    url = bus_url(nats_server, namespace, events_stream_max_age=100, events_stream_max_bytes=5_000_000)
    async with open_cache("memory://", bus=url, namespace=namespace):
        config = (await jetstream.stream_info(namespace)).config
        assert config.subjects == [f"cachebus.v1.{namespace}.evt.>"]
        assert (config.max_age, config.max_bytes, config.duplicate_window) == (100, 5_000_000, 100)
    # Another application, which shares the stream and would have other bounds.
    second = f"{namespace}x"
    async with open_cache("memory://", bus=bus_url(nats_server, namespace), namespace=second):
        config = (await jetstream.stream_info(namespace)).config
        assert config.subjects == [f"cachebus.v1.{each}.evt.>" for each in (namespace, second)]
        assert config.max_bytes == 5_000_000


async def test_what_the_stream_has_given_up_is_a_gap(
    nats_server: Server, namespace: str, jetstream: JetStreamContext
) -> None:
    async with open_cache("memory://", bus=bus_url(nats_server, namespace), namespace=namespace) as cache:
        for number in range(5):
            await cache.set(str(number), number)
        await kept(jetstream, namespace, 5)
        await jetstream.purge_stream(namespace, seq=3)
        with cache.events("cache_*", "events_missed", since=3600) as heard:
            assert keys([await anext(heard) for _ in range(4)]) == ["gap", "2", "3", "4"]
        # Whoever asks for what is still there misses nothing.
        oldest = await jetstream.get_msg(namespace, 3)
        assert oldest.time is not None
        with cache.events("cache_*", "events_missed", since=oldest.time) as heard:
            assert keys([await anext(heard)]) == ["2"]


async def test_a_number_that_is_left_out_is_a_gap(
    nats_server: Server, namespace: str, jetstream: JetStreamContext
) -> None:
    async with open_cache("memory://", bus=bus_url(nats_server, namespace), namespace=namespace) as cache:
        for seq in (7, 8, 12):
            event = CacheSet(key=str(seq))
            event = replace(event, namespace=namespace, backend="primary", origin="o", epoch=1, seq=seq)
            await jetstream.publish(Subjects(namespace).event(CacheSet, "primary"), encode(event, JSON))
        await jetstream.publish(Subjects(namespace).event(CacheSet, "primary"), b"junk")
        with cache.events(CacheSet, EventsMissed, since=60) as heard:
            told: list[Any] = [await anext(heard) for _ in range(4)]
            assert keys(told) == ["7", "8", "gap", "12"]
            assert (told[2].source, told[2].event, told[2].count) == ("o", "event.cache_set", 3)


async def published(jetstream: JetStreamContext, namespace: str, **stamps: Any) -> None:
    """Keep an event of another process."""
    header: dict[str, Any] = {"namespace": namespace, "backend": "primary", "epoch": 1, "seq": 1, **stamps}
    event = CacheSet(key="k", **header)
    await jetstream.publish(Subjects(namespace).event(CacheSet, "primary"), encode(event, JSON))


async def test_a_replay_remembers_so_many_numberings(
    nats_server: Server, namespace: str, jetstream: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachebus.bus.nats.jetstream._NUMBERINGS", 3)
    options = NatsOptions(servers=(f"{nats_server.host}:{nats_server.port}",), events_stream=namespace)
    async with NatsBus(namespace, options) as bus:
        for number in range(10):
            await published(jetstream, namespace, origin=str(number % 5 if number < 5 else 4), seq=number)
        with bus.subscribe(CacheSet, EventsMissed, since=0.0) as heard:
            assert keys([await anext(heard) for _ in range(10)]) == ["k"] * 10
            (replay,) = bus._replays
            assert "of 3/3 numberings" in repr(replay)
            # What was heard last is remembered.
            await published(jetstream, namespace, origin="4", seq=12)
            assert isinstance(await anext(heard), EventsMissed)


async def test_a_replay_that_fails_says_so_and_ends(
    nats_server: Server, namespace: str, jetstream: JetStreamContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = NatsOptions(servers=(f"{nats_server.host}:{nats_server.port}",), events_stream=namespace)
    async with NatsBus(namespace, options) as bus:
        with bus.subscribe(CacheSet, EventsMissed, since=0.0) as heard:
            await published(jetstream, namespace, origin="o")
            assert keys([await anext(heard)]) == ["k"]

            def broken(*_: Any) -> None:
                raise AttributeError("as nats-py may")

            monkeypatch.setattr("cachebus.bus.nats.jetstream.decode", broken)
            await published(jetstream, namespace, origin="o", seq=2)
            with anyio.fail_after(30):
                assert isinstance(await anext(heard), EventsMissed)
                with pytest.raises(StopAsyncIteration):
                    await anext(heard)
        await asyncio.sleep(0)
        assert not bus._replays


def test_a_thread_that_takes_one_at_a_time_gets_all(nats_server: Server, namespace: str) -> None:
    url = bus_url(nats_server, namespace)
    with open_sync_cache("memory://", bus=url, namespace=namespace) as cache:
        cache.set_many({str(number): number for number in range(200)})
        with cache.events(CacheSet, EventsMissed, since=600, capacity=1) as heard:
            told = [heard.next(10) for _ in range(200)]
            assert [getattr(each, "key", None) for each in told] == [*map(str, range(200))]
            cache.set("more", 1)
            assert keys([each for each in [heard.next(10)] if each]) == ["more"]
            assert heard.dropped == 0


async def test_a_replay_goes_on_after_the_server_was_away(namespace: str) -> None:
    with run_nats(jetstream=True) as server:
        options = NatsOptions(servers=(f"{server.host}:{server.port}",), events_stream="kept")
        async with NatsBus(namespace, options) as bus:
            with bus.subscribe(CacheSet, EventsMissed, since=0.0) as heard:
                Emitter(bus, "primary").publish(CacheSet(key="before"))
                assert keys([await anext(heard)]) == ["before"]
                await anyio.to_thread.run_sync(server.restart)
                with anyio.fail_after(30):
                    Emitter(bus, "primary").publish(CacheSet(key="after"))
                    # Nothing twice, nothing left out.
                    assert keys([await anext(heard)]) == ["after"]


async def test_a_server_without_streams_is_named_at_the_start(namespace: str) -> None:
    with run_nats() as server:
        with pytest.raises(CacheConfigurationError, match="JetStream"):
            async with open_cache("memory://", bus=bus_url(server, namespace), namespace=namespace):
                pass
        async with open_cache("memory://", bus=server.url, namespace=namespace) as cache:
            with cache.events(since=60) as heard:
                assert isinstance(await anext(heard), EventsMissed)
                with pytest.raises(StopAsyncIteration):
                    await anext(heard)


def test_the_plain_cache_and_the_command_line_replay_too(
    run_worker: RunWorker, nats_server: Server, namespace: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "cachebus.yaml"
    config.write_text(f"namespace: {namespace}\nbus: {bus_url(nats_server, namespace)}\nbackends: ['memory://']\n")
    worker = run_worker("--config", str(config), "--bus", bus_url(nats_server, namespace))
    assert worker.process.poll() is None
    with_bus = ["--bus", nats_server.url, "--namespace", namespace]
    for key in "abc":
        assert main(["set", key, "1", *with_bus]) == 0
    capfd.readouterr()
    assert main(["events", *with_bus, "--since", "10m", "--kind", "set", "--count", "3", "--json"]) == 0
    assert [json.loads(line)["key"] for line in capfd.readouterr().out.splitlines()] == ["a", "b", "c"]
    with (
        open_sync_cache("bus:primary", bus=nats_server.url, namespace=namespace) as cache,
        cache.events(CacheSet, since=600) as heard,
    ):
        assert keys([each for each in (heard.next(10) for _ in range(3)) if each]) == ["a", "b", "c"]
    assert main(["events", "--bus", nats_server.url, "--namespace", "nobodys", "--since", "10m"]) == 3
    with pytest.raises(SystemExit):
        main(["events", "--since", "soon"])
