"""Requests over NATS: within a process and across processes, single and concurrent, and their errors."""

from __future__ import annotations

import asyncio
import os
import threading

import anyio.to_thread
import pytest

from cachebus.actors import Supervisor
from cachebus.bus import Address
from cachebus.messages import (
    ActorFailed,
    BadMessage,
    CacheCapacityError,
    CacheError,
    CacheKeyError,
    CacheSerializationError,
    CacheTimeoutError,
    DeadLetter,
    Delete,
    Exists,
    Found,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Incremented,
    Missing,
    NoSuchActor,
    Present,
    Set,
    TakeSnapshot,
    Touch,
)
from cachebus.testing.servers import Server

from .actors import Answering
from .conftest import Connect, StartWorker

pytestmark = pytest.mark.anyio
PLACE = Address("test.place")
T = 20.0


async def test_an_actor_of_another_process_answers(connect: Connect, start_worker: StartWorker) -> None:
    worker = await start_worker("answering", PLACE)
    bus = await connect()
    assert await bus.request(PLACE, Get("pid"), T) == Found(worker.process.pid)
    assert await bus.request(PLACE, Get("missing"), T) == Missing()
    assert await bus.request(PLACE, Exists("0"), T) == Present()
    assert await bus.request(PLACE, GetMany(("a", "b")), T) == FoundMany({"a": Found(1), "b": Found(1)})


async def test_an_actor_of_this_process_answers_inline_and_is_not_asked_over_nats(connect: Connect) -> None:
    bus = await connect()
    async with Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        assert bus.recipient(PLACE).turn(Get)(Get("pid")) == Found(os.getpid())
        assert await bus.request(PLACE, Get("pid"), T) == Found(os.getpid())
        assert bus.counters.messages_sent == 0


async def test_a_private_actor_is_not_reached_from_elsewhere(connect: Connect) -> None:
    bus, other = await connect(), await connect()
    async with Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering)
        with pytest.raises(NoSuchActor):
            await other.request(PLACE, Get("k"), T)


async def test_a_request_to_nobody_says_so_at_once(connect: Connect) -> None:
    bus = await connect()
    with pytest.raises(NoSuchActor, match=r"no actor serves the address 'test\.place'"):
        await bus.request(PLACE, Get("k"), T)


async def test_callers_who_ask_together_travel_together_and_get_their_own_answers(
    connect: Connect, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE)
    bus = await connect()

    async def caller(number: int) -> None:
        for turn in range(20):
            assert await bus.request(PLACE, Get(f"{number}.{turn}"), T) == Found(f"{number}.{turn}")

    await asyncio.gather(*(caller(number) for number in range(100)))
    assert bus.counters.requests_sent == 2000
    assert bus.counters.messages_sent <= 200


async def test_a_message_is_bounded_by_count_and_by_bytes(connect: Connect, start_worker: StartWorker) -> None:
    await start_worker("answering", PLACE)
    few, small = await connect(batch=3, window=1), await connect(batch_bytes=1000, window=1)
    await asyncio.gather(*(few.request(PLACE, Get(str(number)), T) for number in range(31)))
    # The first leaves alone, and the others in batches of three.
    assert few.counters.messages_sent == 11
    await asyncio.gather(*(small.request(PLACE, Get(str(number) * 400), T) for number in range(9)))
    assert small.counters.messages_sent == 5


async def test_one_that_takes_long_holds_up_none_of_those_it_travelled_with(
    connect: Connect, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE)
    bus = await connect(window=1, resend_after=T)
    first = asyncio.create_task(bus.request(PLACE, Get("k"), T))
    await asyncio.sleep(0)
    parked = asyncio.create_task(bus.request(PLACE, Touch("k"), T))
    others = [asyncio.create_task(bus.request(PLACE, Get(str(number)), T)) for number in range(10)]
    await asyncio.gather(first, *others)
    assert bus.counters.messages_sent == 2
    assert not parked.done()
    assert await bus.request(PLACE, Increment("k"), T) == Incremented(1)
    assert await parked == Present(1.0)


async def test_each_of_a_message_of_requests_gets_its_own_error(connect: Connect, start_worker: StartWorker) -> None:
    await start_worker("answering", PLACE)
    bus = await connect(window=1)
    first = asyncio.create_task(bus.request(PLACE, Get("k"), T))
    await asyncio.sleep(0)
    answers = await asyncio.gather(
        bus.request(PLACE, Get("a"), T),
        bus.request(PLACE, Set("k", 1), T),
        bus.request(PLACE, TakeSnapshot(), T),
        bus.request(PLACE, Get("object"), T),
        bus.request(PLACE, Get("b"), T),
        return_exceptions=True,
    )
    await first
    assert (answers[0], answers[4]) == (Found("a"), Found("b"))
    assert [type(each) for each in answers[1:4]] == [CacheKeyError, BadMessage, CacheSerializationError]
    assert bus.counters.messages_sent == 2


async def test_a_crash_is_answered_and_the_next_life_serves(connect: Connect, start_worker: StartWorker) -> None:
    await start_worker("answering", PLACE)
    bus = await connect()
    with pytest.raises(ActorFailed, match="RuntimeError"):
        await bus.request(PLACE, Delete("k"), T)
    assert await bus.request(PLACE, Get("k"), T) == Found("k")


async def test_a_request_ends_by_its_deadline_and_its_late_answer_is_counted(
    connect: Connect, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE)
    bus = await connect()
    with pytest.raises(CacheTimeoutError):
        await bus.request(PLACE, Exists("0.8"), 0.3)
    assert await bus.request(PLACE, Exists("0"), T) == Present()
    async with asyncio.timeout(T):
        while not bus.counters.late_replies:
            await asyncio.sleep(0.01)
    assert bus.counters.late_replies == 1


async def test_callers_of_one_message_keep_their_own_deadlines(connect: Connect, start_worker: StartWorker) -> None:
    await start_worker("answering", PLACE)
    bus = await connect(window=1, resend_after=0.1)
    answers = await asyncio.gather(
        *(bus.request(PLACE, Exists("0.8"), timeout) for timeout in (0.2, T, 0.4)), return_exceptions=True
    )
    assert [type(each) for each in answers] == [CacheTimeoutError, Present, CacheTimeoutError]
    assert bus.counters.requests_resent == 3
    assert bus.counters.messages_sent == 2


async def test_a_request_whose_caller_is_cancelled_while_it_waits_is_not_sent(
    connect: Connect, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE)
    bus = await connect(window=1)
    first = asyncio.create_task(bus.request(PLACE, Get("a"), T))
    await asyncio.sleep(0)
    gone = asyncio.create_task(bus.request(PLACE, Increment("gone"), T))
    kept = asyncio.create_task(bus.request(PLACE, Get("b"), T))
    await asyncio.sleep(0)
    gone.cancel()
    assert (await first, await kept) == (Found("a"), Found("b"))
    assert bus.counters.requests_sent == 2


async def test_what_is_too_large_is_refused_with_the_sizes_and_the_connection_stays(
    connect: Connect, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE)
    bus = await connect()
    for request in (Set("k", bytes(2_000_000)), Get("large:2000000")):
        with pytest.raises(CacheCapacityError, match=r"2,0\d\d,\d\d\d bytes, the limit is 1,044,480 bytes"):
            await bus.request(PLACE, request, T)
    assert await bus.request(PLACE, Get("large:900000"), T) == Found(bytes(900_000))
    # Together, the answers exceed the size limit of a message.
    many = await asyncio.gather(*(bus.request(PLACE, Get("large:300000"), T) for _ in range(8)))
    assert many == [Found(bytes(300_000))] * 8
    assert bus.counters.reconnects == 0


async def test_what_is_sent_arrives_in_order_and_what_cannot_be_done_is_a_dead_letter(
    connect: Connect, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE)
    bus = await connect()
    for _ in range(1000):
        bus.send(PLACE, Increment("k"))
    assert await bus.request(PLACE, Increment("k"), T) == Incremented(1001)
    with bus.subscribe(DeadLetter) as letters:
        bus.send(PLACE, Set("k", 1))
        letter = await anext(letters)
        assert isinstance(letter, DeadLetter)
        assert (letter.wire_name, letter.reason) == ("backend.set", "the key is refused")
        bus.send(Address("test.nobody"), Set("k", 1))
        letter = await anext(letters)
        assert isinstance(letter, DeadLetter)
        assert "no actor serves" in letter.reason


async def test_threads_and_other_loops_ask_and_the_loop_itself_may_not_block(
    connect: Connect, start_worker: StartWorker
) -> None:
    await start_worker("answering", PLACE)
    bus = await connect()
    assert await anyio.to_thread.run_sync(lambda: bus.request_blocking(PLACE, Get("k"), T)) == Found("k")
    sent = bus.counters.requests_sent
    with pytest.raises(CacheError, match="would stop the event loop"):
        bus.request_blocking(PLACE, Delete("k"), T)
    assert await bus.request(PLACE, Get("k"), T) == Found("k")
    assert bus.counters.requests_sent == sent + 1
    answers: list[object] = []

    def elsewhere() -> None:
        answers.append(asyncio.run(bus.request(PLACE, Get("k"), T)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await anyio.to_thread.run_sync(thread.join)
    assert answers == [Found("k")]


async def test_a_bus_that_is_closed_answers_what_it_was_asked_before(
    connect: Connect, nats_server: Server, namespace: str
) -> None:
    asking = await connect()
    async with Supervisor(serving := await connect()) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        asked = [asyncio.create_task(asking.request(PLACE, Exists("0.05"), T)) for _ in range(4)]
        await asyncio.sleep(0.02)
        await serving.aclose()
        assert await asyncio.gather(*asked) == [Present()] * 4
