from __future__ import annotations

import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from cachebus import CacheConfigurationError, CacheConnectionError, CacheError, open_cache
from cachebus.adapters.memcached.store import Endpoint
from cachebus.messages import (
    BackendConnected,
    BackendDisconnected,
    CacheBackendError,
    Clear,
    CompareAndSet,
    Delete,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Missing,
    Set,
    SetMany,
    Stored,
    StoredMany,
)
from cachebus.testing.processes import free_port
from cachebus.testing.proxy import Mode, Proxy
from cachebus.testing.servers import run_memcached

from ...lateness import within
from .conftest import one, opened, sync


async def test_a_server_killed_under_fifty_callers_is_used_again_when_it_is_back() -> None:
    with run_memcached() as server:
        async with opened(server, timeout=0.5, connect_timeout=0.5) as store:
            errors: set[type[BaseException]] = set()
            wrong: list[Any] = []
            slowest = 0.0
            done = False

            async def call(number: int) -> None:
                nonlocal slowest
                key = f"k{number}"
                while not done:
                    started = time.monotonic()
                    try:
                        for reply in await store.execute([Set(key, number), Get(key)]):
                            if isinstance(reply, Failed):
                                raise reply.error()
                            if isinstance(reply, Found) and reply.value != number:
                                wrong.append((key, reply))
                    except CacheError as error:
                        errors.add(type(error))
                    slowest = max(slowest, time.monotonic() - started)
                    await anyio.sleep(0.001)

            async with anyio.create_task_group() as tasks:
                for number in range(50):
                    tasks.start_soon(call, number)
                for _ in range(3):
                    await anyio.sleep(0.1)
                    await sync(server.kill)
                    await anyio.sleep(0.1)
                    await sync(server.start)
                    back = time.monotonic()
                    while True:
                        try:
                            if isinstance(await one(store, Set("sign", b"of life")), Stored):
                                break
                        except CacheError:
                            await anyio.sleep(0.01)
                        assert time.monotonic() - back < within(2.0)
                done = True
        assert wrong == []
        assert errors <= {CacheConnectionError}
        assert slowest < 5.0  # Each wait takes up to 0.5 s; the rest is allowance for a busy machine.


async def test_a_version_from_before_a_restart_fits_nothing_after_it() -> None:
    with run_memcached() as server:
        async with opened(server) as store:
            before = await one(store, Set("a", b"1"))
            await anyio.sleep(1.1)  # Versions start at the second in which the server started.
            await sync(server.restart)
            with anyio.fail_after(30):
                while not isinstance(await one(store, Get("a")), Missing):  # Or an error for the lost connection.
                    await anyio.sleep(0.001)
            after = await one(store, Set("a", b"2"))
            assert after.version > before.version
            assert (await one(store, CompareAndSet("a", b"3", before.version))).version == after.version
            assert (await one(store, Get("a"))).value == b"2"


async def test_what_was_in_flight_says_whether_it_may_have_been_done() -> None:
    with run_memcached() as server:
        async with opened(server, timeout=0.2) as store:
            await one(store, Set("a", 1))
            await sync(server.pause)
            await anyio.sleep(0.05)  # The signal stops the server's threads one at a time.
            get, write, delete, increment = await store.execute([Get("a"), Set("a", 2), Delete("a"), Increment("n")])
            for reply in (get, write, delete, increment):
                assert isinstance(reply, Failed)
                assert isinstance(reply.error(), CacheConnectionError)
            assert isinstance(write, Failed)
            assert "not known" in write.detail
            for reply in (get, delete, increment):
                assert isinstance(reply, Failed)
                assert "not known" not in reply.detail
            await sync(server.resume)
            assert isinstance(await one(store, Set("a", 3)), Stored)


async def test_an_increment_whose_write_is_lost_is_in_doubt_and_never_done_twice() -> None:
    with run_memcached() as server, Proxy.before(server) as proxy:
        async with opened(proxy, timeout=0.3) as store:
            await one(store, Set("n", 5))
            doubtful = 0
            for _ in range(20):
                counted = (await one(store, Get("n"))).value
                await sync(proxy.switch, "lose_reply")
                told = await one(store, Increment("n"))
                await sync(proxy.switch, "pass")
                assert isinstance(told, Failed)
                doubtful += "not known" in told.detail
                after = await first_value(store, "n")
                assert after in (counted, counted + 1)
            assert doubtful <= 20


async def first_value(store: Any, key: str) -> Any:
    """Return the value of a key as soon as the store answers again."""
    while True:
        try:
            found = await one(store, Get(key))
        except CacheError:
            continue
        if not isinstance(found, Failed):
            return found.value


async def test_a_silent_server_costs_nobody_more_than_the_timeout() -> None:
    with run_memcached() as server:
        async with opened(server, timeout=0.2, connect_timeout=0.2) as store:
            await one(store, Set("a", b"1"))
            await sync(server.pause)
            while True:  # The signal stops the server's threads one at a time.
                started = time.monotonic()
                reply = await one(store, Get("a"))
                if not isinstance(reply, Found):
                    break
            assert isinstance(reply.error(), CacheConnectionError)
            assert "within 0.2 s" in reply.detail
            assert 0.15 < time.monotonic() - started < within(0.2)
            started = time.monotonic()
            with pytest.raises(CacheConnectionError, match=r"within 0\.2 s"):
                await store.execute([Get("a")])
            assert time.monotonic() - started < 3.0
            await sync(server.resume)
            assert (await one(store, Get("a"))).value == b"1"


@pytest.mark.parametrize("mode", ["reset", "half_open", "trickle", "lose_reply", "garbage", "refuse", "latency"])
async def test_whatever_breaks_between_us_each_value_belongs_to_its_key(mode: Mode) -> None:
    with run_memcached() as server, Proxy.before(server) as proxy:
        async with opened(proxy, timeout=0.3, connect_timeout=0.3) as store:
            assert await one(store, SetMany({f"k{n}": f"value of k{n}" for n in range(50)})) == StoredMany(50)
            await sync(lambda: proxy.switch(mode, seconds=0.02))
            for start in range(8):
                began = time.monotonic()
                keys = [f"k{number}" for number in range(start, start + 10)]
                try:
                    replies = await store.execute([Get(key) for key in keys])
                except CacheError as error:
                    replies = [Failed.of(error)] * len(keys)
                assert time.monotonic() - began < within(0.6)
                for key, reply in zip(keys, replies, strict=True):
                    assert isinstance(reply, Failed) or (isinstance(reply, Found) and reply.value == f"value of {key}")
            await sync(proxy.switch, "pass")
            assert await first_value(store, "k7") == "value of k7"


async def test_a_batch_that_is_broken_off_costs_nobody_else_anything() -> None:
    with run_memcached() as server, Proxy.before(server) as proxy:
        async with opened(proxy) as store:
            await one(store, SetMany({f"k{n}": n for n in range(10)}))
            for turn in range(30):
                await sync(lambda: proxy.switch("latency", seconds=0.01))
                with anyio.move_on_after(0.005 if turn % 2 else 0.012):
                    await store.execute([Get(f"k{n}") for n in range(10)])
                await sync(proxy.switch, "pass")
                assert (await one(store, Get("k3"))).value == 3
            assert proxy.open_connections <= 2


async def test_an_unreachable_server_is_said_at_opening() -> None:
    with pytest.raises(CacheConnectionError, match="cannot be reached"):
        async with open_cache(f"memcached://127.0.0.1:{free_port()}", on_error="raise"):
            pass


@contextmanager
def impostor(answer: bytes) -> Generator[Endpoint]:
    """Yield a fake server that sends `answer` to any request; nothing if it is empty."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        kept: list[socket.socket] = []
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                break
            kept.append(accepted)
            if answer:
                accepted.recv(1000)
                accepted.sendall(answer)
        for each in kept:
            each.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield Endpoint("127.0.0.1", listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(30)


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"ERROR\r\n", b"END\r\n", b"STAT time x\r\nEND\r\n"]
)
async def test_what_is_no_memcached_is_said_within_the_time_to_connect(answer: bytes) -> None:
    with impostor(answer) as place:
        started = time.monotonic()
        with pytest.raises(CacheConnectionError):
            async with opened(place, connect_timeout=0.2):
                pass
        assert time.monotonic() - started < 3.0


@pytest.mark.parametrize("version", ["1.4.39", "1.5.22", "1.6.9"])
async def test_a_server_that_is_too_old_is_refused_with_both_versions(version: str) -> None:
    stats = f"STAT uptime 5\r\nSTAT time 1700000000\r\nSTAT version {version}\r\nEND\r\n"
    said = rf"is Memcached {version}; 1\.6\.10 is required"
    with impostor(stats.encode()) as place, pytest.raises(CacheConfigurationError, match=said):
        async with opened(place):
            pass


async def test_a_full_server_refuses_writes_and_answers_reads() -> None:
    with run_memcached("-m", "4", "-M") as server:
        async with opened(server) as store:
            await one(store, Set("a", b"here"))
            replies = [await one(store, Set(f"k{n}", bytes(500_000))) for n in range(30)]
            failed = [reply.error() for reply in replies if isinstance(reply, Failed)]
            assert failed
            assert {type(error) for error in failed} == {CacheBackendError}
            assert "out of memory" in str(failed[0])
            assert (await one(store, Get("a"))).value == b"here"


async def test_a_server_without_room_for_another_connection_says_so() -> None:
    with run_memcached("-c", "100") as server:
        hoarded = [socket.create_connection((server.host, server.port)) for _ in range(150)]
        try:
            with pytest.raises(CacheConnectionError):
                async with opened(server, connect_timeout=0.3):
                    pass
        finally:
            for each in hoarded:
                each.close()


async def test_a_dead_server_costs_its_own_keys_and_no_others() -> None:
    with run_memcached() as one_server, run_memcached() as other:
        async with opened(one_server, other, timeout=0.3, connect_timeout=0.3) as store:
            keys = [f"k{number}" for number in range(100)]
            await one(store, SetMany({key: key for key in keys}))
            theirs = {key for key in keys if store._server(key).endswith(f":{other.port}")}
            assert 20 < len(theirs) < 80
            for harm, heal in ((other.kill, other.start), (other.pause, other.resume)):
                await sync(harm)
                await store.execute([Get(key) for key in keys])  # The store detects the lost connection.
                started = time.monotonic()
                for _ in range(20):
                    replies = await store.execute([Get(key) for key in keys])
                    for key, reply in zip(keys, replies, strict=True):
                        if key in theirs:
                            assert isinstance(reply, Failed)
                        else:
                            assert isinstance(reply, Found)
                # No batch waits for the unresponsive server: that would take 20 times 0.3 s.
                assert time.monotonic() - started < 5.0
                mine = tuple(key for key in keys if key not in theirs)
                assert len((await one(store, GetMany(mine))).entries) == len(mine)
                assert isinstance(await one(store, GetMany(tuple(keys))), Failed)
                assert isinstance(await one(store, Clear()), Failed)
                await sync(heal)
                back = time.monotonic()
                while isinstance(await one(store, GetMany(tuple(keys))), Failed):
                    assert time.monotonic() - back < within(2.0)
                    await anyio.sleep(0.01)
                await one(store, SetMany({key: key for key in keys}))
                assert isinstance(await one(store, GetMany(tuple(keys))), FoundMany)


async def test_one_of_two_servers_may_be_down_at_opening() -> None:
    with run_memcached() as server:
        dead = Endpoint("127.0.0.1", free_port())
        async with opened(server, dead, connect_timeout=0.3) as store:
            kinds = {type(await one(store, Get(f"k{number}"))) for number in range(50)}
            assert kinds == {Missing, Failed}


async def test_losing_and_finding_a_server_are_events() -> None:
    with run_memcached() as server:
        async with (
            open_cache(f"memcached://127.0.0.1:{server.port}?timeout=0.3", on_error="raise") as cache,
            cache.events(BackendConnected, BackendDisconnected) as events,
        ):
            await cache.set("a", 1)
            await sync(server.kill)
            with pytest.raises(CacheError):
                await cache.get("a")
            await sync(server.start)
            with anyio.fail_after(30):
                while True:
                    try:
                        await cache.set("a", 2)
                        break
                    except CacheError:
                        await anyio.sleep(0.05)
                told = [type(await anext(events)) for _ in range(2)]
            assert told == [BackendDisconnected, BackendConnected]
