from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import anyio
import pytest

from cachebus import CacheConfigurationError, CacheConnectionError, open_cache, open_sync_cache
from cachebus.adapters.memcached.server import Connector
from cachebus.adapters.memcached.server import Server as Server_
from cachebus.adapters.memcached.store import Endpoint, MemcachedStore
from cachebus.bus import SYSTEM_CLOCK
from cachebus.messages import Failed, Found, Get, Set
from cachebus.node.stores import build_store
from cachebus.settings import backend_from_url
from cachebus.settings.backends import MemcachedSettings
from cachebus.testing.processes import ServerProcess
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import Server, find_binary, run_memcached

from ...certificates import Certificates
from ...lateness import within
from .conftest import one, sync


@asynccontextmanager
async def at(url: str) -> AsyncGenerator[Any]:
    """Open a store at a URL."""
    store: Any = build_store(backend_from_url(url), namespace=f"t{uuid4().hex}", clock=SYSTEM_CLOCK)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


# Options


def test_every_option_of_a_memcached_url_is_read() -> None:
    options = "name=hot&default=true&default_ttl=5&timeout=0.25&connect_timeout=0.5&max_connections=7&chunked=true"
    files = "tls=true&tls_ca_file=a&tls_cert_file=b&tls_key_file=c"
    assert backend_from_url(f"memcached://host1:11212,[::1]?{options}&{files}") == MemcachedSettings(
        name="hot",
        default=True,
        default_ttl=5.0,
        hosts=("host1:11212", "[::1]"),
        timeout=0.25,
        connect_timeout=0.5,
        max_connections=7,
        chunked=True,
        tls=True,
        tls_ca_file="a",
        tls_cert_file="b",
        tls_key_file="c",
    )
    assert backend_from_url("memcached://") == MemcachedSettings()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memcached://host:99999", "expected a host as name"),
        ("memcached://host/0", "has no path"),
        ("memcached://user:hunter2@host", "does not support a user or a password"),
        ("memcached://a,b,a", "listed twice"),
        ("memcached://a?timeout=0", "timeout: expected seconds above 0"),
        ("memcached://a?connect_timeout=none", "connect_timeout: expected seconds above 0"),
        ("memcached://a?max_connections=0", "max_connections: expected a whole number, 1 or more"),
        ("memcached://a?chunked=perhaps", "chunked: expected true or false"),
        ("memcached://a?tls_ca_file=x", "require tls"),
        ("memcached://a?tls=1&tls_key_file=x", "requires tls_cert_file"),
        ("memcached://a?window=3", "unknown option"),
    ],
)
def test_a_url_that_means_nothing_is_refused(url: str, said: str) -> None:
    with pytest.raises(CacheConfigurationError) as refused:
        backend_from_url(url)
    assert said in str(refused.value)
    assert "hunter2" not in str(refused.value)


async def test_the_default_time_to_live_is_that_of_the_option(server: Server) -> None:
    async with at(f"{server.url}?default_ttl=100") as store:
        await one(store, Set("a", b"1"))
        assert 98 < (await one(store, Get("a"))).ttl <= 100


async def test_chunked_is_that_of_the_option(server: Server) -> None:
    async with at(f"{server.url}?chunked=true") as whole, at(server.url) as small:
        assert not isinstance(await one(whole, Set("a", bytes(2**21))), Failed)
        assert isinstance(await one(small, Set("a", bytes(2**21))), Failed)


async def test_timeouts_are_those_of_the_options(server: Server) -> None:
    with Proxy.before(server) as proxy:
        async with at(f"{proxy.url(server.url)}?timeout=0.8&connect_timeout=0.4") as store:
            await sync(proxy.switch, "half_open")
            started = time.monotonic()
            reply = await one(store, Get("a"))
            assert isinstance(reply, Failed)
            assert "within 0.8 s" in reply.detail
            assert 0.75 < time.monotonic() - started < within(0.8)
            started = time.monotonic()
            with pytest.raises(CacheConnectionError, match=r"within 0\.4 s"):
                await store.execute([Get("a")])
            assert 0.35 < time.monotonic() - started < within(0.4)


async def test_no_more_threads_look_a_name_up_than_there_may_be_connections(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, real = threading.Event(), socket.getaddrinfo

    def slow(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "slow.example":
            answered.wait(30)
            host = "127.0.0.1"
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    connector = Connector(clock=SYSTEM_CLOCK, connect_timeout=20.0, most=2)
    kept = Server_(Endpoint("slow.example", server.port), connector, in_background=False)
    try:
        for _ in range(2):
            with anyio.move_on_after(0.05):
                await kept.connect()
        with pytest.raises(CacheConnectionError, match="2 threads are already resolving"):
            await kept.connect()
    finally:
        answered.set()
    with anyio.fail_after(30):
        while kept._lookups:
            await anyio.sleep(0.001)
        await kept.connect()
    await kept.close()


async def test_max_connections_is_that_of_the_option() -> None:
    store: Any = build_store(backend_from_url("memcached://a?max_connections=7"), namespace="n", clock=SYSTEM_CLOCK)
    assert store._connector.most == 7


# Connecting to a server


async def test_a_cache_over_memcached_does_what_a_cache_does(server: Server) -> None:
    async with open_cache(server.url, namespace=f"n{uuid4().hex}") as cache:
        await cache.set("a", {"b": [1, 2.5, None]}, ttl=60)
        assert await cache.get("a") == {"b": [1, 2.5, None]}
        assert await cache.increment("n", 5) == 5
        assert await cache.ttl("a") == pytest.approx(60, abs=5.0)
        assert await cache.add("a", 1) is False
        found = await cache.lookup("a")
        assert isinstance(found, Found)
        assert await cache.compare_and_set("a", 2, version=found.version)
        await cache.clear()
        assert await cache.get("a") is None


def test_a_synchronous_cache_uses_memcached_from_threads(server: Server) -> None:
    with open_sync_cache(server.url, namespace="sync") as cache:
        cache.set("a", {"b": 1})
        assert cache.get("a") == {"b": 1}


async def test_two_servers_share_the_keys(server: Server) -> None:
    with run_memcached() as other:
        url = f"memcached://127.0.0.1:{server.port},127.0.0.1:{other.port}"
        async with at(url) as store, at(f"{url}?timeout=0.9") as same, at(other.url) as alone:
            for number in range(100):
                await one(store, Set(f"k{number}", number))
                assert (await one(same, Get(f"k{number}"))).__class__.__name__ == "Missing"
            shares = [store._server(f"k{number}") for number in range(100)]
            assert 25 < sum(each.endswith(f":{other.port}") for each in shares) < 75
            assert shares == [same._server(f"k{number}") for number in range(100)]
            assert {alone._server(f"k{number}") for number in range(100)} == {f"127.0.0.1:{other.port}"}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


async def test_tls_checks_the_server_and_shows_who_we_are(server: Server, certificates: Certificates) -> None:
    binary = find_binary("memcached")
    if binary is None:
        pytest.fail("this test needs memcached on the PATH")
    extended = f"ssl_chain_cert={certificates.server},ssl_key={certificates.key('server')}"
    extended += f",ssl_ca_cert={certificates.ca},ssl_verify_mode=2"
    secure = ServerProcess(
        "memcached",
        lambda port, _: [binary, "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "root", "-Z", "-o", extended],
        lambda connection: True,
    )
    await sync(secure.start)
    try:
        ours = f"tls_cert_file={certificates.client}&tls_key_file={certificates.key('client')}"
        there = f"127.0.0.1:{secure.port}?tls=true"
        async with at(f"memcached://{there}&tls_ca_file={certificates.ca}&{ours}") as store:
            await one(store, Set("a", bytes(1_000_000)))
            assert len((await one(store, Get("a"))).value) == 1_000_000
        for url, said in (
            (f"memcached://{there}&{ours}", "certificate"),
            (f"memcached://{there}&tls_ca_file={certificates.stranger}&{ours}", "certificate"),
            (f"memcached://localhost:{secure.port}?tls=1&tls_ca_file={certificates.ca}&{ours}", "certificate|Hostname"),
            (f"memcached://{there}&tls_ca_file={certificates.ca}", ""),
            (f"{server.url}?tls=true&tls_ca_file={certificates.ca}", ""),
            (f"memcached://127.0.0.1:{secure.port}", ""),
            ("memcached://127.0.0.1?tls=true&tls_ca_file=/no/such/file", "/no/such/file"),
        ):
            started = time.monotonic()
            with pytest.raises((CacheConfigurationError, CacheConnectionError), match=said or "."):
                async with at(url):
                    pass
            assert time.monotonic() - started < within(1.0)
    finally:
        await sync(secure.stop)


async def test_a_server_without_cas_is_refused() -> None:
    with run_memcached("-C") as server, pytest.raises(CacheConfigurationError, match="without CAS"):
        async with at(server.url):
            pass


async def test_opening_that_is_broken_off_leaves_no_connection(server: Server) -> None:
    with Proxy.before(server) as proxy, Proxy.before(server) as silent:
        await sync(silent.switch, "half_open")
        places = [Endpoint(proxy.host, proxy.port), Endpoint(silent.host, silent.port)]
        store = MemcachedStore(places, namespace="broken", connect_timeout=20.0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.open)
            with anyio.fail_after(30):
                while proxy.connections == 0:
                    await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
        with anyio.fail_after(30):
            while proxy.open_connections:
                await anyio.sleep(0.001)
