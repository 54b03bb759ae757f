from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from cachebus import CacheConnectionError, CacheError, CacheTimeoutError, CircuitOpen, Overloaded
from cachebus.adapters.redis.connect import RedisPool
from cachebus.bus import SYSTEM_CLOCK
from cachebus.messages import (
    CacheBackendError,
    CacheConfigurationError,
    Delete,
    DeletePattern,
    Failed,
    Found,
    Get,
    Increment,
    Scan,
    Set,
)
from cachebus.node.stores import build_store
from cachebus.settings import backend_from_url
from cachebus.testing.processes import free_port
from cachebus.testing.servers import redis_command, run_redis

from ...faults.scene import guarded
from ...lateness import within
from .conftest import one, opened


async def sync(function: Any, *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments)


async def test_a_server_killed_under_fifty_callers_is_used_again_when_it_is_back() -> None:
    with run_redis() as server:
        url = f"{server.url}?connect_timeout=0.5&health_check_interval=0.5"
        async with opened(url) as store:
            stop = asyncio.Event()
            errors: set[type[BaseException]] = set()
            wrong: list[Any] = []
            slowest = 0.0

            async def call(number: int) -> None:
                nonlocal slowest
                key = f"k{number}"
                while not stop.is_set():
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
                    await asyncio.sleep(0.001)

            async with asyncio.TaskGroup() as group:
                for number in range(50):
                    group.create_task(call(number))
                for _ in range(3):
                    await asyncio.sleep(0.1)
                    await sync(server.kill)
                    await asyncio.sleep(0.1)
                    await sync(server.start)
                    back = time.monotonic()
                    while True:
                        try:
                            if not isinstance(await one(store, Set("sign", b"of life")), Failed):
                                break
                            assert time.monotonic() - back < within(2.0)
                        except CacheError:
                            assert time.monotonic() - back < within(2.0)
                            await asyncio.sleep(0.01)
                stop.set()
        assert wrong == []
        assert errors <= {CacheConnectionError}
        assert slowest < within(1.0)


async def test_what_was_in_flight_says_whether_it_may_have_been_done() -> None:
    with run_redis() as server:
        async with opened(f"{server.url}?health_check_interval=none") as store:
            await one(store, Set("a", 1))
            await sync(server.pause)
            asked = asyncio.create_task(store.execute([Get("a"), Increment("n"), Set("a", 2), Delete("a")]))
            await asyncio.sleep(0.05)
            await sync(server.kill)
            get, increment, write, delete = await asked
            for reply in (get, increment, write, delete):
                assert isinstance(reply.error(), CacheConnectionError)
            assert "not known" in increment.detail
            assert "not known" in write.detail
            assert "not known" not in get.detail
            assert "not known" not in delete.detail
            await sync(server.start)
            assert isinstance(await one(store, Get("a")), object)


async def test_a_paused_server_costs_nobody_more_than_the_deadline() -> None:
    with run_redis() as server:
        async with guarded(f"{server.url}?health_check_interval=none", timeout=0.3) as cache:
            await cache.set("a", 1)
            await sync(server.pause)
            started = time.monotonic()
            results = await asyncio.gather(*(cache.get(f"k{n}") for n in range(500)), return_exceptions=True)
            assert time.monotonic() - started < 3.0
            assert all(isinstance(each, CacheTimeoutError | Overloaded | CircuitOpen) for each in results)
            await sync(server.resume)
        async with guarded(server.url) as cache:
            assert await cache.get("a") == 1


async def test_a_server_that_falls_silent_is_given_up() -> None:
    with run_redis() as server:
        async with opened(f"{server.url}?health_check_interval=0.1&connect_timeout=0.2") as store:
            await sync(server.pause)
            started = time.monotonic()
            reply = await one(store, Get("a"))
            assert isinstance(reply.error(), CacheConnectionError)
            assert time.monotonic() - started < 3.0
            with pytest.raises(CacheConnectionError, match=r"within 0\.2 s"):
                await store.execute([Get("a")])
            await sync(server.resume)
            assert not isinstance(await one(store, Get("a")), Failed)


async def test_an_unreachable_server_is_said_at_opening() -> None:
    with pytest.raises(CacheConnectionError, match="cannot be reached"):
        async with guarded(f"redis://127.0.0.1:{free_port()}"):
            pass
    with pytest.raises(CacheConnectionError, match="cannot be reached"):
        async with guarded("unix:///no/such/socket"):
            pass


async def test_those_who_wait_for_one_connection_wait_for_one_attempt() -> None:
    with impostor(b"") as url:
        settings: Any = backend_from_url(url)
        store: Any = build_store(settings, namespace="n", clock=SYSTEM_CLOCK)
        pool = RedisPool(store._connect, 2)
        started = time.monotonic()
        results = await asyncio.gather(*(pool.connect() for _ in range(10)), return_exceptions=True)
        assert time.monotonic() - started < 3.0
        assert {type(each) for each in results} == {CacheConnectionError}
        with pytest.raises(CacheConnectionError):
            await pool.connect()  # A later call makes another attempt.


@contextmanager
def impostor(answer: bytes, *, unasked: bool = False) -> Generator[str]:
    """Yield the URL of a fake server that sends `answer` to any request, or on connection if `unasked`."""
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
                if not unasked:
                    accepted.recv(1000)
                accepted.sendall(answer)
                if answer.startswith(b"-"):
                    accepted.shutdown(socket.SHUT_WR)  # A server closes the connection after it rejects it.
        for each in kept:
            each.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}?connect_timeout=0.2"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(30)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n"])
async def test_what_is_no_redis_is_said_within_the_time_to_connect(answer: bytes) -> None:
    with impostor(answer) as url:
        started = time.monotonic()
        with pytest.raises(CacheConnectionError):
            async with opened(url):
                pass
        assert time.monotonic() - started < 3.0


async def test_an_old_server_that_repeats_the_password_does_not_make_us_repeat_it() -> None:
    said = b"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `default`, `hunter2`\r\n"
    with impostor(said * 6) as url, pytest.raises(CacheConfigurationError, match="Redis 6") as refused:
        async with opened(url.replace("redis://", "redis://:hunter2@")):
            pass
    assert "hunter2" not in repr(refused.value) + str(refused.value)


@pytest.mark.parametrize("unasked", [False, True])
async def test_a_server_with_too_many_clients_may_have_fewer_later(unasked: bool) -> None:
    said = b"-ERR max number of clients reached\r\n"
    with impostor(said, unasked=unasked) as url, pytest.raises(CacheConnectionError, match="too many clients"):
        async with opened(url):
            pass


async def test_a_server_in_protected_mode_says_so_before_it_is_asked() -> None:
    said = b"-DENIED Redis is running in protected mode\r\n"
    with impostor(said, unasked=True) as url, pytest.raises(CacheConfigurationError, match="protected mode"):
        async with opened(url):
            pass


async def test_a_full_server_refuses_writes_and_answers_reads() -> None:
    with run_redis("--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server:
        async with opened(server.url) as store:
            await one(store, Set("a", b"here"))
            replies = [await one(store, Set(f"k{n}", bytes(500_000))) for n in range(12)]
            failed = [reply.error() for reply in replies if isinstance(reply, Failed)]
            assert failed
            assert {type(error) for error in failed} == {CacheBackendError}
            assert "OOM" in str(failed[0])
            assert (await one(store, Get("a"))).value == b"here"


async def test_a_read_only_replica_refuses_writes_and_is_left() -> None:
    with run_redis() as master, run_redis("--replicaof", f"127.0.0.1 {master.port}") as replica:
        async with opened(replica.url) as store:
            for request in (Set("a", 1), Increment("n")):
                error = (await one(store, request)).error()
                assert isinstance(error, CacheConnectionError)
                assert "READONLY" in str(error)
            await sync(redis_command, replica, "REPLICAOF", "NO", "ONE")
            assert not isinstance(await one(store, Set("a", 1)), Failed)


async def test_a_busy_server_is_a_transient_error() -> None:
    with run_redis("--busy-reply-threshold", "20") as server:
        async with opened(server.url) as store:
            endless = asyncio.create_task(sync(redis_command, server, "EVAL", "while true do end", "0"))
            await asyncio.sleep(0.2)
            error = (await one(store, Get("a"))).error()
            assert isinstance(error, CacheConnectionError)
            assert "BUSY" in str(error)
            await sync(redis_command, server, "SCRIPT", "KILL")
            await asyncio.gather(endless, return_exceptions=True)
            assert not isinstance(await one(store, Get("a")), Failed)


async def test_a_walk_over_a_lost_connection_fails_and_the_next_one_does_not() -> None:
    with run_redis() as server:
        async with opened(server.url) as store:
            assert (await one(store, DeletePattern("*"))).count == 0
            await sync(server.kill)
            assert isinstance((await one(store, DeletePattern("*"))).error(), CacheConnectionError)
            await sync(server.start)
            assert (await one(store, DeletePattern("*"))).count == 0
            assert (await one(store, Scan())).keys == ()
