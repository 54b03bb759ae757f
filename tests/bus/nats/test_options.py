"""Bus options without a test elsewhere. Each test fails if its option is ignored."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from typing import Any

import anyio.to_thread
import nats
import pytest

from cachebus.actors import Supervisor
from cachebus.bus import Address
from cachebus.bus.address import Subjects
from cachebus.bus.codec.messages import decode, encode
from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.options import NatsOptions
from cachebus.messages import CacheConfigurationError, CacheConnectionError, CacheTimeoutError, Found, Get, Touch
from cachebus.testing.processes import free_port
from cachebus.testing.servers import Server, run_nats

from ...lateness import within
from .actors import Answering
from .conftest import Connect, StartWorker, options

pytestmark = pytest.mark.anyio
PLACE = Address("test.place")
T = 20.0


async def test_answers_come_to_subjects_below_the_inbox_prefix(
    connect: Connect, start_worker: StartWorker, nats_server: Server
) -> None:
    await start_worker("answering", PLACE)
    bus = await connect(inbox_prefix="_INBOX_mine")
    stranger = await nats.connect(nats_server.url)
    try:
        heard = await stranger.subscribe("_INBOX_mine.>")
        await stranger.flush()
        await stranger.flush()
        assert await bus.request(PLACE, Get("k"), T) == Found("k")
        assert decode((await heard.next_msg(timeout=T)).data) == Found("k")
    finally:
        await stranger.close()


async def test_a_request_that_does_not_say_how_long_it_may_take_has_the_budget_of_the_bus(
    connect: Connect, nats_server: Server, namespace: str
) -> None:
    stranger = await nats.connect(nats_server.url)
    try:
        async with Supervisor(await connect(budget=0.05)) as supervisor:
            await supervisor.start(PLACE, Answering, visibility="shared")
            answer = await stranger.request(Subjects(namespace).request(PLACE), encode(Touch("k")), timeout=T)
            assert getattr(decode(answer.data), "code", "") == CacheTimeoutError.code
    finally:
        await stranger.close()


async def test_a_claim_waits_for_objections_as_long_as_it_is_told(connect: Connect) -> None:
    for number, seconds in enumerate((0.01, 0.5)):
        begun = time.monotonic()
        await (await connect(claim_wait=seconds)).claim(Address(f"test.place{number}"), "sole")
        took = time.monotonic() - begun
        assert took >= seconds


async def test_a_server_that_does_not_speak_is_waited_for_no_longer_than_the_connect_timeout() -> None:
    gone = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        gone.set()

    mute = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = mute.sockets[0].getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(CacheConnectionError, match=r"no answer in time|Timeout"):
        await NatsBus("t", NatsOptions(servers=(f"127.0.0.1:{port}",), connect_timeout=0.1)).open()
    assert time.monotonic() - begun < within(0.1)
    with anyio.fail_after(T):
        await gone.wait()
    mute.close()


async def test_the_pauses_between_tries_are_drawn_below_bounds_that_double(
    own_server: Server, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def uniform(least: float, most: float) -> float:
        drawn.append(most)
        return least

    monkeypatch.setattr("cachebus.bus.nats.connection.random.uniform", uniform)
    async with NatsBus(namespace, options(own_server, reconnect_wait=0.01, reconnect_wait_max=0.03)):
        await anyio.to_thread.run_sync(own_server.kill)
        with anyio.fail_after(T):
            while len(drawn) < 4:
                await asyncio.sleep(0.01)
    assert drawn[:4] == [0.01, 0.02, 0.03, 0.03]


async def test_the_server_knows_a_connection_by_its_name(namespace: str) -> None:
    port = free_port()
    with run_nats("--http_port", str(port)) as server:

        def names() -> list[str]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/connz", timeout=5.0) as answer:
                return [each.get("name", "") for each in json.load(answer)["connections"]]

        async with NatsBus(namespace, options(server, name="a shop")):
            assert await anyio.to_thread.run_sync(names) == ["a shop"]


async def test_bytes_that_wait_to_be_looked_at_have_a_bound(
    connect: Connect, nats_server: Server, namespace: str
) -> None:
    stranger = await nats.connect(nats_server.url)
    try:
        bus = await connect(pending_bytes=10_000)
        async with Supervisor(bus) as supervisor:
            await supervisor.start(PLACE, Answering, visibility="shared")
            for _ in range(50):
                await stranger.publish(Subjects(namespace).request(PLACE), bytes(9_000))
            with anyio.fail_after(T):
                while not bus.counters.slow_consumer:
                    await stranger.publish(Subjects(namespace).request(PLACE), bytes(9_000))
                    await asyncio.sleep(0)
    finally:
        await stranger.close()


@pytest.mark.parametrize("option", ["batch", "window", "ping_interval", "outbox", "budget"])
def test_a_number_is_above_zero(option: str) -> None:
    given: dict[str, Any] = {option: 0}
    with pytest.raises(CacheConfigurationError, match=f"{option}: expected a number above 0, not 0"):
        NatsOptions(**given)
