"""Message age: a request that its caller gave up is not carried out, wherever it waited, and no state accumulates."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from typing import Any

import anyio.to_thread
import nats
import pytest

from cachebus.actors import Supervisor
from cachebus.bus import Address
from cachebus.bus.address import Subjects
from cachebus.bus.clock import SYSTEM_CLOCK
from cachebus.bus.codec.messages import decode, encode
from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.connection import MessageAges, age_clock
from cachebus.bus.nats.responder import IncomingBatch
from cachebus.messages import CacheTimeoutError, Found, Get, Increment, Incremented, Touch
from cachebus.testing.processes import suspend
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import Server

from .actors import Answering
from .conftest import Connect, StartWorker

pytestmark = pytest.mark.anyio
PLACE = Address("test.place")
T = 20.0


async def expired(worker: Any, bus: NatsBus, *, budget: float = 0.5) -> None:
    """Send a request to a stopped worker, which continues long after the caller has given up."""
    await anyio.to_thread.run_sync(suspend, worker.process.pid)
    with pytest.raises(CacheTimeoutError):
        await bus.request(PLACE, Increment("k"), budget)
    # Not a wait for an event: the time that the worker stays stopped after the budget is spent.
    await asyncio.sleep(1.0)
    os.kill(worker.process.pid, signal.SIGCONT)


async def test_a_worker_that_was_stopped_does_not_work_on_what_its_caller_has_given_up(
    connect: Connect, start_worker: StartWorker
) -> None:
    worker = await start_worker("answering", PLACE)
    bus = await connect(resend_after=T)
    assert await bus.request(PLACE, Increment("k"), T) == Incremented(1)
    await expired(worker, bus)
    assert await bus.request(PLACE, Increment("k"), T) == Incremented(2)


async def test_nor_if_it_has_never_heard_of_the_caller(connect: Connect, start_worker: StartWorker) -> None:
    worker = await start_worker("answering", PLACE)
    bus = await connect(resend_after=T)
    await expired(worker, bus)
    other = await connect()
    assert await other.request(PLACE, Increment("k"), T) == Incremented(1)


async def test_nor_if_the_caller_says_nothing_of_the_time(
    connect: Connect, start_worker: StartWorker, nats_server: Server, namespace: str
) -> None:
    worker = await start_worker("answering", PLACE)
    stranger = await nats.connect(nats_server.url)
    try:
        await anyio.to_thread.run_sync(suspend, worker.process.pid)
        subject = Subjects(namespace).request(PLACE)
        asked = asyncio.create_task(
            stranger.request(subject, encode(Increment("k")), timeout=T, headers={"Cachebus-Budget": "0.5"})
        )
        await asyncio.sleep(1.5)  # Not a wait for an event: the time that the worker stays stopped.
        os.kill(worker.process.pid, signal.SIGCONT)
        assert getattr(decode((await asked).data), "code", "") == CacheTimeoutError.code
    finally:
        await stranger.close()
    bus = await connect()
    assert await bus.request(PLACE, Increment("k"), T) == Incremented(1)


@pytest.mark.parametrize("known", [True, False])
async def test_what_a_proxy_before_the_worker_held_back_is_not_worked_on(
    connect: Connect, nats_server: Server, namespace: str, known: bool
) -> None:
    with Proxy.before(nats_server) as proxy:
        there = await connect(server=proxy, ping_interval=60.0)
        bus = await connect(resend_after=T)
        async with Supervisor(there) as supervisor:
            await supervisor.start(PLACE, Answering, visibility="shared")
            if known:
                assert await bus.request(PLACE, Increment("k"), T) == Incremented(1)
            await anyio.to_thread.run_sync(proxy.switch, "half_open")
            with pytest.raises(CacheTimeoutError):
                await bus.request(PLACE, Increment("k"), 0.5)
            await asyncio.sleep(1.0)  # Not a wait for an event: the time for which the bytes are held back.
            await anyio.to_thread.run_sync(proxy.switch, "pass")
            assert await bus.request(PLACE, Increment("k"), T) == Incremented(2 if known else 1)
            assert there.counters.requests_expired == 1


async def test_what_a_proxy_before_the_caller_held_back_is_not_worked_on(connect: Connect, nats_server: Server) -> None:
    with Proxy.before(nats_server) as proxy:
        there = await connect()
        bus = await connect(server=proxy, ping_interval=60.0, resend_after=T)
        async with Supervisor(there) as supervisor:
            await supervisor.start(PLACE, Answering, visibility="shared")
            assert await bus.request(PLACE, Increment("k"), T) == Incremented(1)
            await anyio.to_thread.run_sync(proxy.switch, "half_open")
            with pytest.raises(CacheTimeoutError):
                await bus.request(PLACE, Increment("k"), 0.5)
            await asyncio.sleep(1.0)  # Not a wait for an event: the time for which the bytes are held back.
            await anyio.to_thread.run_sync(proxy.switch, "pass")
            assert await bus.request(PLACE, Increment("k"), T) == Incremented(2)
            assert there.counters.requests_expired == 1


async def test_what_is_answered_is_forgotten_at_once(connect: Connect, nats_server: Server, namespace: str) -> None:
    bus = await connect()
    stranger = await nats.connect(nats_server.url)
    subject = Subjects(namespace).request(PLACE)
    try:
        async with Supervisor(bus) as supervisor:
            await supervisor.start(PLACE, Answering, visibility="shared")
            for request in (Get("k"), Increment("k")):
                headers = {"Cachebus-Budget": "1000000"}
                await stranger.request(subject, encode(request), timeout=T, headers=headers)
            # A request that waits, and so has a deadline, is forgotten as well.
            parked = asyncio.create_task(
                stranger.request(subject, encode(Touch("k")), timeout=T, headers={"Cachebus-Budget": "1000000"})
            )
            while not supervisor_has_parked(bus):
                await asyncio.sleep(0)
            await bus.request(PLACE, Increment("k"), T)
            await parked
            gc.collect()
            assert not [each for each in gc.get_objects() if type(each) is IncomingBatch]
    finally:
        await stranger.close()


def supervisor_has_parked(bus: NatsBus) -> bool:
    """Return `True` if a request of another process waits for its answer."""
    return any(responder.open for responder, _ in bus._serving.values())


async def test_a_budget_is_capped(connect: Connect, nats_server: Server, namespace: str) -> None:
    bus = await connect(max_budget=0.05)
    stranger = await nats.connect(nats_server.url)
    try:
        async with Supervisor(bus) as supervisor:
            await supervisor.start(PLACE, Answering, visibility="shared")
            headers = {"Cachebus-Budget": "1000000"}
            answer = await stranger.request(
                Subjects(namespace).request(PLACE), encode(Touch("k")), timeout=T, headers=headers
            )
            assert getattr(decode(answer.data), "code", "") == CacheTimeoutError.code
    finally:
        await stranger.close()


async def test_a_reply_goes_below_an_inbox_prefix_and_nowhere_else(
    connect: Connect, nats_server: Server, namespace: str
) -> None:
    bus = await connect(inbox_prefix="_MINE", reply_prefixes=("_INBOX_theirs.",))
    stranger = await nats.connect(nats_server.url)
    subject = Subjects(namespace).request(PLACE)
    try:
        async with Supervisor(bus) as supervisor:
            await supervisor.start(PLACE, Answering, visibility="shared")
            heard = await stranger.subscribe(">")
            for aimed in ("$JS.API.STREAM.PURGE.events", "_INBOX.x.1", "_MINE", "cachebus.v1.x.evt.y", "_INBOX_theirs"):
                await stranger.publish(subject, encode(Increment("k")), reply=aimed)
            for aimed in ("_MINE.1", "_INBOX_theirs.1"):
                await stranger.publish(subject, encode(Increment("k")), reply=aimed)
            answers: list[Any] = []
            while len(answers) < 2:
                msg = await heard.next_msg(timeout=T)
                if msg.subject != subject and not msg.subject.startswith(("$SRV", "_SRV")):
                    answers.append((msg.subject, decode(msg.data)))
            assert answers == [("_MINE.1", Incremented(1)), ("_INBOX_theirs.1", Incremented(2))]
            assert bus.counters.replies_refused == 5
            await stranger.publish("$SRV.PING", b"", reply="$JS.API.STREAM.PURGE.events")
            await stranger.publish("$SRV.PING", b"", reply="_MINE.2")
            while (msg := await heard.next_msg(timeout=T)).subject != "_MINE.2":
                assert msg.subject == "$SRV.PING"
    finally:
        await stranger.close()


async def test_a_caller_of_another_namespace_of_inboxes_is_heard_by_default(connect: Connect) -> None:
    there, bus = await connect(), await connect(inbox_prefix="_INBOX_app")
    async with Supervisor(there) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="shared")
        assert await bus.request(PLACE, Get("k"), T) == Found("k")


# The estimate alone, with given times.


def test_the_age_is_what_a_delay_has_on_top_of_the_smallest() -> None:
    ages = MessageAges()
    assert ages.age(100.0, 100.0, "a", 7.0) == 0.0  # The clocks differ by 93.
    assert ages.age(101.0, 101.0, "a", 8.0) == 0.0
    assert ages.age(105.5, 105.5, "a", 9.0) == pytest.approx(3.5, abs=0.01)
    assert ages.age(106.0, 106.0, "a", 13.5) == 0.0  # Faster than all earlier messages.
    assert ages.age(106.0, 106.0, "a", 13.0) == pytest.approx(0.5, abs=0.01)


def test_a_new_sender_is_judged_by_the_link_until_that_is_well() -> None:
    ages = MessageAges()
    for _ in range(3):
        assert ages.age(104.5, 100.0, "new", 7.0) == pytest.approx(4.25)
    assert ages.age(104.5, 104.5, "new", 11.5) == 0.0
    assert ages.age(109.0, 104.5, "new", 11.6) == pytest.approx(4.4, abs=0.01)
    assert ages.age(104.5, 100.0) == pytest.approx(4.25)


def test_a_stalled_link_takes_nothing_from_what_has_just_been_sent() -> None:
    ages = MessageAges()
    ages.age(100.0, 100.0, "a", 0.0)
    assert ages.age(110.0, 100.0, "a", 10.0) == 0.0


def test_the_smallest_delay_is_forgotten_after_a_window_without_one_as_small() -> None:
    ages = MessageAges()
    ages.age(100.0, 100.0, "a", 0.0)
    # The sender's machine slept for two seconds, which its clock does not count.
    first = ages.age(103.0, 103.0, "a", 1.0)
    assert first == pytest.approx(2.0, abs=0.01)
    for second in range(1, 23):
        ages.age(103.0 + second, 103.0 + second, "a", 1.0 + second)
    assert ages.age(126.0, 126.0, "a", 24.0) == 0.0


def test_what_was_held_up_moves_nothing() -> None:
    ages = MessageAges()
    ages.age(100.0, 100.0, "a", 0.0)
    for second in range(30):  # The connection is slow for half a minute.
        ages.age(103.0 + second, 100.0 + second, "a", float(second))
    assert ages.age(133.0, 130.0, "a", 30.0) == pytest.approx(3.0, abs=0.05)


def test_clocks_that_drift_apart_over_a_silence_cost_nothing_on_a_good_link() -> None:
    ages = MessageAges()
    ages.age(100.0, 100.0, "a", 0.0)
    assert ages.age(3700.0, 3700.0, "a", 3599.0) == 0.0  # A drift of one second in an hour.
    held_up = ages.age(3704.0, 3700.0, "a", 3599.5)
    assert held_up == pytest.approx(3.5, abs=0.1)


def test_the_senders_that_are_remembered_are_bounded() -> None:
    ages = MessageAges()
    for number in range(10_050):
        ages.age(100.0, 100.0, str(number), 0.0)
    assert "10000/10000" in repr(ages)


def test_ages_are_measured_with_a_clock_that_goes_on_while_the_machine_sleeps() -> None:
    now = age_clock(SYSTEM_CLOCK)
    before = time.monotonic()
    assert now() >= before
    assert now() <= now()
