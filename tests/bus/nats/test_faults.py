"""Faults of servers, workers and messages, and their effect on callers and workers."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import anyio.to_thread
import nats
import nats.errors
import pytest

from cachebus.actors import Supervisor
from cachebus.bus import Address
from cachebus.bus.address import Subjects
from cachebus.bus.codec.messages import JSON, decode, decode_each, encode
from cachebus.bus.nats.bus import NatsBus
from cachebus.messages import (
    BadMessage,
    CacheConnectionError,
    CacheError,
    CacheTimeoutError,
    CircuitClosed,
    EventsMissed,
    Exists,
    Failed,
    Found,
    Get,
    Increment,
    Incremented,
    Missing,
    NoSuchActor,
    Overloaded,
    Present,
    Reply,
    Touch,
)
from cachebus.testing.servers import Server, run_nats

from ...lateness import within
from .actors import Answering
from .conftest import Connect, StartWorker, options

pytestmark = pytest.mark.anyio
PLACE = Address("test.place")
T = 20.0


async def until_back(bus: NatsBus) -> None:
    """Send requests until one is answered."""
    with anyio.fail_after(T):
        while True:
            try:
                assert await bus.request(PLACE, Get("k"), 1.0) == Found("k")
                return
            except (CacheConnectionError, CacheTimeoutError, NoSuchActor):
                await asyncio.sleep(0.01)


async def test_a_killed_worker_costs_no_idempotent_request_where_another_serves(
    connect: Connect, start_worker: StartWorker
) -> None:
    first, second = await start_worker("answering", PLACE), await start_worker("answering", PLACE)
    bus = await connect(resend_after=0.3)
    answered, failed, longest = 0, 0, 0.0
    ended = asyncio.Event()

    async def caller(number: int) -> None:
        nonlocal answered, failed, longest
        while not ended.is_set():
            begun = time.monotonic()
            try:
                assert await bus.request(PLACE, Get(str(number)), T) == Found(str(number))
                answered += 1
            except CacheError:
                failed += 1
            longest = max(longest, time.monotonic() - begun)

    async with anyio.create_task_group() as callers:
        for number in range(100):
            callers.start_soon(caller, number)
        await asyncio.sleep(0.3)
        await anyio.to_thread.run_sync(first.kill)
        before = answered
        with anyio.fail_after(T):
            while answered < before + 2000:
                await asyncio.sleep(0.01)
        ended.set()
    assert failed == 0
    assert longest < T / 2
    assert await bus.request(PLACE, Get("pid"), T) == Found(second.process.pid)


async def test_a_worker_that_leaves_finishes_what_it_was_sent_and_the_others_go_on(
    connect: Connect, start_worker: StartWorker
) -> None:
    workers = [await start_worker("answering", PLACE) for _ in range(3)]
    bus = await connect(resend_after=T, batch=4, window=8)
    asked = 0
    ended = asyncio.Event()

    async def caller(number: int) -> None:
        nonlocal asked
        while not ended.is_set():
            # Neither request may be repeated or lost, and one of them is slow.
            asked += 1
            if number % 3:
                assert await bus.request(PLACE, Exists("0.001"), T) == Present()
            else:
                assert await bus.request(PLACE, Get(str(number)), T) == Found(str(number))

    async with anyio.create_task_group() as callers:
        for number in range(50):
            callers.start_soon(caller, number)
        for worker in workers[:2]:
            before = asked
            with anyio.fail_after(T):
                while asked < before + 500:
                    await asyncio.sleep(0.01)
            assert await anyio.to_thread.run_sync(worker.leave) == 0
        ended.set()
    assert bus.counters.requests_resent == 0


async def test_a_request_that_is_not_idempotent_is_never_sent_twice(
    connect: Connect, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE)
    bus = await connect(resend_after=0.05)
    slow = asyncio.create_task(bus.request(PLACE, Exists("0.5"), T))
    counted = [asyncio.create_task(bus.request(PLACE, Increment("k"), T)) for _ in range(5)]
    assert await slow == Present()
    assert await asyncio.gather(*counted) == [
        Incremented(1),
        Incremented(2),
        Incremented(3),
        Incremented(4),
        Incremented(5),
    ]
    assert bus.counters.requests_resent >= 1
    assert await bus.request(PLACE, Increment("k"), T) == Incremented(6)


async def test_a_killed_server_fails_callers_at_once_and_everything_works_when_it_is_back(
    own_server: Server, namespace: str, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE, server=own_server)
    async with NatsBus(namespace, options(own_server)) as bus:
        assert await bus.request(PLACE, Get("k"), T) == Found("k")
        parked = asyncio.create_task(bus.request(PLACE, Touch("k"), T))
        assert await bus.request(PLACE, Exists("0"), T) == Present()
        with bus.subscribe(EventsMissed) as gaps:
            await anyio.to_thread.run_sync(own_server.kill)
            with pytest.raises(CacheConnectionError, match="was lost; the request may or may not have taken effect"):
                await parked
            begun = time.monotonic()
            with pytest.raises(CacheConnectionError, match="the connection to NATS is down"):
                await bus.request(PLACE, Get("k"), T)
            assert time.monotonic() - begun < within(0.5)
            await anyio.to_thread.run_sync(own_server.start)
            await until_back(bus)
            gap = await anext(gaps)
            assert isinstance(gap, EventsMissed)
            assert gap.source == ""
        assert bus.counters.reconnects == 1


async def test_a_server_that_says_nothing_is_given_up(
    own_server: Server, namespace: str, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE, server=own_server)
    async with NatsBus(namespace, options(own_server, ping_interval=0.1)) as bus:
        assert await bus.request(PLACE, Get("k"), T) == Found("k")
        own_server.pause()
        try:
            with pytest.raises(CacheError):
                await bus.request(PLACE, Get("k"), T)
            with anyio.fail_after(T):
                while bus.connection.up:
                    await asyncio.sleep(0.01)
        finally:
            own_server.resume()
        await until_back(bus)


async def test_an_error_that_ends_a_client_of_nats_for_good_does_not_end_the_bus(
    own_server: Server, namespace: str, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE, server=own_server)
    async with NatsBus(namespace, options(own_server)) as bus:
        # The server disconnects a client that sends a line above the limit, and nats-py then closes permanently.
        bus.connection.write("x" * 5000, b"")
        await until_back(bus)
        with anyio.fail_after(T):
            while not bus.counters.reconnects:
                await asyncio.sleep(0.01)
        await until_back(bus)


async def test_a_flush_that_was_given_up_leaves_the_connection_as_it_was(connect: Connect) -> None:
    bus = await connect()
    async with Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        other = await connect()
        for _ in range(20):
            flush = asyncio.create_task(other.connection.flush())
            await asyncio.sleep(0)
            flush.cancel()
        assert await other.request(PLACE, Get("k"), T) == Found("k")
        assert other.counters.reconnects == 0


@pytest.fixture
async def stranger(nats_server: Server) -> Any:
    """Open a client that knows only the subjects of cachebus."""
    client = await nats.connect(nats_server.url)
    yield client
    await client.close()


async def test_bytes_that_are_no_message_are_answered_and_end_nothing(
    connect: Connect, stranger: Any, namespace: str
) -> None:
    bus = await connect()
    subject = Subjects(namespace).request(PLACE)
    async with Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        bad = [
            b"",
            b"\xc1",
            b"junk",
            encode(Missing()),
            b'{"kind":',
            encode(Get("k"))[:-1],
            encode(Get("k")).replace(b"backend.get", b"backend.gut"),
        ]
        for body in bad:
            answer = await stranger.request(subject, body, timeout=T)
            failed = decode(answer.data)
            assert isinstance(failed, Failed)
            assert failed.code == BadMessage.code
            assert answer.headers["Nats-Service-Error-Code"] == BadMessage.code
        for headers in (
            {"Content-Type": "text/html"},
            *({"Cachebus-Budget": each} for each in ("soon", "nan", "inf", "-1", "1,2")),
        ):
            answer = await stranger.request(subject, encode(Get("k")), timeout=T, headers=headers)
            assert getattr(decode(answer.data), "code", "") == BadMessage.code
        assert bus.counters.bad_messages == len(bad) + 6
        assert decode((await stranger.request(subject, encode(Get("k")), timeout=T)).data) == Found("k")


async def test_an_array_is_answered_with_an_array_and_each_element_for_itself(
    connect: Connect, stranger: Any, namespace: str
) -> None:
    bus = await connect()
    async with Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        body = json.dumps(
            [
                {"kind": "backend.exists", "key": "0.05"},
                {"kind": "backend.gut", "key": "a"},
                {"kind": "backend.get", "key": "a"},
                {"kind": "backend.get", "key": 2},
            ]
        ).encode()
        headers = {"Content-Type": "application/json", "Cachebus-Request-Id": "r1"}
        answer = await stranger.request(Subjects(namespace).request(PLACE), body, timeout=T, headers=headers)
        replies, is_array = decode_each(answer.data, JSON)
        assert is_array
        assert [type(each) for each in replies] == [Present, Failed, Found, Failed]
        assert answer.headers["Content-Type"] == JSON
        assert answer.headers["Cachebus-Request-Id"] == "r1"


@pytest.mark.parametrize(
    ("reply", "code"), [(Found("anyone's"), BadMessage.code), (Failed.of(Overloaded()), Overloaded.code)]
)
async def test_one_answer_to_an_array_is_only_taken_if_it_is_a_failure(
    reply: Reply, code: str, connect: Connect, stranger: Any, namespace: str
) -> None:
    async def answer(message: Any) -> None:
        await message.respond(encode(reply))

    await stranger.subscribe(Subjects(namespace).request(PLACE), cb=answer)
    await stranger.flush()
    bus = await connect()
    asked = (bus.request(PLACE, Get(key), T) for key in "abc")
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [getattr(each, "code", each) for each in answers] == [code] * 3


async def test_a_spent_budget_is_answered_and_not_worked_on(connect: Connect, stranger: Any, namespace: str) -> None:
    bus = await connect()
    subject = Subjects(namespace).request(PLACE)
    async with Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        headers = {"Cachebus-Budget": "0"}
        answer = await stranger.request(subject, encode(Increment("k")), timeout=T, headers=headers)
        assert getattr(decode(answer.data), "code", "") == CacheTimeoutError.code
        assert bus.counters.requests_expired == 1
        # A request that the actor never answers is answered at its deadline.
        answer = await stranger.request(subject, encode(Touch("k")), timeout=T, headers={"Cachebus-Budget": "0.05"})
        assert getattr(decode(answer.data), "code", "") == CacheTimeoutError.code
        assert await bus.request(PLACE, Increment("k"), T) == Incremented(1)


async def test_an_answer_is_never_sent_to_a_subject_of_ours(connect: Connect, stranger: Any, namespace: str) -> None:
    bus = await connect()
    subjects = Subjects(namespace)
    async with Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        heard = await stranger.subscribe(subjects.events(CircuitClosed))
        aimed = subjects.event(CircuitClosed, "primary")
        await stranger.publish(subjects.request(PLACE), encode(Get("k")), reply=aimed)
        await stranger.request(subjects.request(PLACE), encode(Get("k")), timeout=T)
        with pytest.raises(nats.errors.TimeoutError):
            await heard.next_msg(timeout=0.05)


async def test_a_flood_of_junk_and_a_large_message_leave_the_worker_up(
    start_worker: StartWorker, connect: Connect, namespace: str
) -> None:
    bus = await connect()
    await start_worker("answering", PLACE)
    stranger = await nats.connect(f"nats://{bus.options.servers[0]}")
    try:
        subject = Subjects(namespace).request(PLACE)
        for number in range(10_000):
            await stranger.publish(subject, b"\xc1" * (number % 50))
            if number % 1000 == 0:
                assert await bus.request(PLACE, Get("k"), T) == Found("k")
        large = encode(Get("k" * 900_000))
        assert len(decode((await stranger.request(subject, large, timeout=T)).data).value) == 900_000  # type: ignore[union-attr]
        assert await bus.request(PLACE, Get("k"), T) == Found("k")
    finally:
        await stranger.close()


async def test_a_message_of_two_mebibytes_is_answered_where_the_server_lets_it_through(
    namespace: str, tmp_path: Path
) -> None:
    (tmp_path / "large.conf").write_text("max_payload: 8MB\n")
    with run_nats("--config", str(tmp_path / "large.conf")) as server:
        stranger = await nats.connect(server.url)
        async with NatsBus(namespace, options(server)) as bus, Supervisor(bus) as supervisor:
            await supervisor.start(PLACE, Answering, visibility="shared")
            subject = Subjects(namespace).request(PLACE)
            answer = await stranger.request(subject, bytes(2 * 1024 * 1024), timeout=T)
            assert getattr(decode(answer.data), "code", "") == BadMessage.code
            assert decode((await stranger.request(subject, encode(Get("k")), timeout=T)).data) == Found("k")
        await stranger.close()


async def test_too_many_that_wait_are_turned_away(connect: Connect, start_worker: StartWorker) -> None:
    await start_worker("answering", PLACE)
    bus = await connect(max_waiting=5, window=1)
    results = await asyncio.gather(*(bus.request(PLACE, Get("k"), T) for _ in range(20)), return_exceptions=True)
    assert results.count(Found("k")) == 5
    assert sum(isinstance(each, Overloaded) for each in results) == 15


async def test_messages_that_wait_too_long_are_counted_and_reported_once(
    connect: Connect, namespace: str, stranger: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await connect(pending_messages=10)
    async with Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        for _ in range(2000):
            await stranger.publish(Subjects(namespace).request(PLACE), encode(Get("k")))
        await stranger.flush()
        with anyio.fail_after(T):
            while not bus.counters.slow_consumer:
                await asyncio.sleep(0.01)
        assert sum("were dropped" in each.message for each in caplog.records) == 1
        assert await bus.request(PLACE, Get("k"), T) == Found("k")
