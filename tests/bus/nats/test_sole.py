"""Sole addresses: claims, refusals and takeovers."""

from __future__ import annotations

import asyncio
import json
import os

import anyio
import pytest

from cachebus.actors import Supervisor
from cachebus.bus import Address
from cachebus.bus.address import Subjects
from cachebus.bus.nats.bus import NatsBus
from cachebus.messages import AddressInUse, Found, Get, NoSuchActor
from cachebus.testing.servers import Server

from .actors import Answering
from .conftest import Connect, StartWorker, options

pytestmark = pytest.mark.anyio
PLACE = Address("test.place")
T = 20.0


async def reached(bus: NatsBus) -> bool:
    """Return `True` if a process serves the address."""
    try:
        return await bus.request(PLACE, Get("k"), T) == Found("k")
    except NoSuchActor:
        return False


async def test_a_second_start_is_refused_with_the_name_of_the_holder(
    connect: Connect, start_worker: StartWorker
) -> None:
    worker = await start_worker("answering", PLACE, "sole")
    bus = await connect()
    async with Supervisor(bus) as supervisor:
        with pytest.raises(AddressInUse, match=rf"already served by process {worker.process.pid} on "):
            await supervisor.start(PLACE, Answering, visibility="sole")
        # The refused claim has no effect: the holder still serves the address.
        assert await bus.request(PLACE, Get("pid"), T) == Found(worker.process.pid)


async def test_of_many_who_claim_at_once_one_gets_it(connect: Connect) -> None:
    buses = [await connect() for _ in range(6)]
    results = await asyncio.gather(*(bus.claim(PLACE, "sole") for bus in buses), return_exceptions=True)
    refused = [each for each in results if each is not None]
    assert len(refused) == 5
    assert all(isinstance(each, AddressInUse) and f"process {os.getpid()}" in str(each) for each in refused)


async def test_what_was_given_back_may_be_taken_by_another(connect: Connect, start_worker: StartWorker) -> None:
    first, other = await connect(), await connect()
    async with Supervisor(first) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="sole")
        await supervisor.stop(PLACE)
        async with Supervisor(other) as next_one:
            await next_one.start(PLACE, Answering, visibility="sole")
            assert await first.request(PLACE, Get("pid"), T) == Found(os.getpid())
            assert other.counters.requests_served == 1


async def test_a_killed_holder_is_followed_by_the_next(connect: Connect, start_worker: StartWorker) -> None:
    first = await start_worker("answering", PLACE, "sole")
    await anyio.to_thread.run_sync(first.kill)
    second = await start_worker("answering", PLACE, "sole")
    bus = await connect()
    assert await bus.request(PLACE, Get("pid"), T) == Found(second.process.pid)


async def test_a_start_that_fails_gives_the_address_back(connect: Connect) -> None:
    class Failing(Answering):
        async def on_start(self) -> None:
            raise OSError("no")

    bus, other = await connect(), await connect()
    async with Supervisor(bus) as supervisor, Supervisor(other) as next_one:
        with pytest.raises(OSError, match="no"):
            await supervisor.start(PLACE, Failing, visibility="sole")
        await next_one.start(PLACE, Answering, visibility="sole")
        assert await bus.request(PLACE, Get("k"), T) == Found("k")


async def test_of_two_holders_whom_a_split_network_made_one_retires(
    own_server: Server, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        NatsBus(namespace, options(own_server)) as bus,
        NatsBus(namespace, options(own_server)) as other,
        Supervisor(bus) as supervisor,
    ):
        await supervisor.start(PLACE, Answering, visibility="sole")
        said = {"says": "again", "number": "0", "to": "", "who": "process 1 on elsewhere"}
        other.connection.write(Subjects(namespace).owner(PLACE), json.dumps(said).encode())
        with anyio.fail_after(T):
            while await reached(other):
                await asyncio.sleep(0)
        assert any("also served by process 1 on elsewhere" in each.message for each in caplog.records)


async def test_after_a_reconnect_a_holder_is_still_the_only_one(own_server: Server, namespace: str) -> None:
    async with NatsBus(namespace, options(own_server)) as bus, Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="sole")
        await anyio.to_thread.run_sync(own_server.restart)
        with anyio.fail_after(T):
            while not bus.counters.reconnects:
                await asyncio.sleep(0.01)
        async with NatsBus(namespace, options(own_server)) as other, Supervisor(other) as second:
            with pytest.raises(AddressInUse):
                await second.start(PLACE, Answering, visibility="sole")
            assert await other.request(PLACE, Get("k"), T) == Found("k")


@pytest.mark.parametrize("junk", [b"", b"\xff", b"[]", b"{}", b'"x"', b"[" * 10_000])
async def test_junk_on_the_owner_subject_claims_nothing(connect: Connect, namespace: str, junk: bytes) -> None:
    bus, other = await connect(), await connect()
    async with Supervisor(bus) as supervisor:
        await supervisor.start(PLACE, Answering, visibility="sole")
        other.connection.write(Subjects(namespace).owner(PLACE), junk)
        await other.connection.flush()
        assert await other.request(PLACE, Get("k"), T) == Found("k")
