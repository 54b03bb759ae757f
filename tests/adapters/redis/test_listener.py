from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from cachebus import CacheConnectionError
from cachebus.messages import CacheConfigurationError, CacheError
from cachebus.testing.processes import free_port
from cachebus.testing.servers import Server, redis_command, run_redis, run_redis_cluster, run_sentinel

from ...certificates import Certificates
from .conftest import opened

FAST = "connect_timeout=0.5&health_check_interval=0.3"


async def call_server(server: Server, *words: str) -> bytes:
    return await anyio.to_thread.run_sync(lambda: redis_command(server, *words))


class Ear:
    """Collects messages; `await next()` waits for one."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[bytes] = asyncio.Queue()
        self._failures: asyncio.Queue[CacheError] = asyncio.Queue()
        self.times_up = 0
        self._up = asyncio.Event()

    def heard(self, payload: bytes) -> None:
        self._heard.put_nowait(payload)

    def subscribed(self) -> None:
        self.times_up += 1
        self._up.set()

    def failed(self, error: CacheError) -> None:
        self._failures.put_nowait(error)

    async def next(self) -> bytes:
        async with asyncio.timeout(30):
            return await self._heard.get()

    async def failure(self) -> CacheError:
        async with asyncio.timeout(30):
            return await self._failures.get()

    async def until_up(self) -> None:
        """Wait until the channel is subscribed, at first or after a reconnection."""
        async with asyncio.timeout(30):
            await self._up.wait()
        self._up.clear()

    @property
    def is_empty(self) -> bool:
        return self._heard.empty()


@asynccontextmanager
async def listening(url: str, channel: str = "a", ear: Ear | None = None) -> AsyncGenerator[Ear]:
    """Subscribe to a channel, and yield its `Ear`."""
    ear = ear or Ear()
    async with opened(url) as store:
        subscription = store.subscribe(channel, ear.heard, ear.subscribed, ear.failed)
        try:
            await ear.until_up()
            yield ear
        finally:
            await subscription.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_what_is_published_after_it_is_up_is_heard_at_the_channel_and_at_no_other(server: Server) -> None:
    async with listening(server.url) as one, listening(server.url) as two, listening(server.url, "b") as other:
        for payload in ("1", "2"):
            await call_server(server, "PUBLISH", "a", payload)
        assert [await one.next(), await one.next()] == [b"1", b"2"]
        assert [await two.next(), await two.next()] == [b"1", b"2"]
        await call_server(server, "PUBLISH", "b", "3")
        assert await other.next() == b"3"
        assert one.is_empty
        assert one.times_up == 1


async def test_a_subscription_is_one_connection_and_a_closed_one_none(server: Server) -> None:
    async def connections() -> int:
        return (await call_server(server, "CLIENT", "LIST")).count(b"id=")

    async with opened(server.url) as store:
        before = await connections()
        ear = Ear()
        subscription = store.subscribe("left", ear.heard, ear.subscribed, ear.failed)
        assert repr(subscription) == "<ChannelSubscription to 'left', away>"
        await ear.until_up()
        assert repr(subscription) == "<ChannelSubscription to 'left', up>"
        assert await connections() == before + 1
        await subscription.close()
        await subscription.close()
        assert repr(subscription) == "<ChannelSubscription to 'left', closed>"

        async def is_left() -> bool:
            return b"left" not in await call_server(server, "PUBSUB", "CHANNELS") and await connections() == before

        await until(is_left)
        await call_server(server, "PUBLISH", "left", "1")
        assert ear.is_empty


async def test_a_server_that_was_killed_is_listened_to_again_and_the_gap_is_told() -> None:
    with run_redis() as server:
        async with listening(f"{server.url}?{FAST}") as ear:
            await anyio.to_thread.run_sync(server.kill)
            await anyio.to_thread.run_sync(server.start)
            await ear.until_up()
            await call_server(server, "PUBLISH", "a", "after")
            assert await ear.next() == b"after"
            assert ear.times_up == 2


async def test_a_server_that_falls_silent_is_left_and_the_gap_is_told() -> None:
    with run_redis() as server:
        async with opened(f"{server.url}?{FAST}") as store:
            ear = Ear()
            subscription = store.subscribe("a", ear.heard, ear.subscribed, ear.failed)
            await ear.until_up()
            await anyio.to_thread.run_sync(server.pause)
            try:
                with anyio.fail_after(30):
                    while subscription.is_up:
                        await asyncio.sleep(0.01)
            finally:
                await anyio.to_thread.run_sync(server.resume)
            await ear.until_up()
            await subscription.close()


async def test_that_a_server_is_away_is_told_and_the_subscription_goes_on_trying() -> None:
    with run_redis() as server:
        async with opened(f"{server.url}?{FAST}") as store:
            await anyio.to_thread.run_sync(server.kill)
            ear = Ear()
            subscription = store.subscribe("a", ear.heard, ear.subscribed, ear.failed)
            for _ in range(2):
                assert isinstance(await ear.failure(), CacheConnectionError)
            await anyio.to_thread.run_sync(server.start)
            await ear.until_up()
            await call_server(server, "PUBLISH", "a", "1")
            assert await ear.next() == b"1"
            await subscription.close()


async def test_a_channel_that_the_user_may_not_have_is_refused_and_is_asked_for_once() -> None:
    with run_redis() as server:
        await call_server(server, "ACL", "SETUSER", "me", "on", ">pw", "+@all", "~*", "resetchannels", "&mine#*")
        url = f"redis://me:pw@127.0.0.1:{server.port}"
        async with listening(url, "mine#1") as mine, opened(url) as store:
            ear = Ear()
            refused = store.subscribe("yours#1", ear.heard, ear.subscribed, ear.failed)
            error = await ear.failure()
            assert isinstance(error, CacheConfigurationError)
            assert "lacks a required permission" in str(error)

            async def is_over() -> bool:
                return repr(refused) == "<ChannelSubscription to 'yours#1', closed>"

            await until(is_over)
            await call_server(server, "PUBLISH", "mine#1", "1")
            assert await mine.next() == b"1"
            await call_server(server, "ACL", "SETUSER", "me", "&yours#*")
            async with listening(url, "yours#1") as allowed:
                await call_server(server, "PUBLISH", "yours#1", "2")
                assert await allowed.next() == b"2"


async def test_a_function_that_fails_does_no_harm_to_the_connection(server: Server) -> None:
    class Careless(Ear):
        def heard(self, payload: bytes) -> None:
            super().heard(payload)
            raise RuntimeError("mine")

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    async with listening(server.url, ear=Careless()) as ear:
        for payload in ("1", "2"):
            await call_server(server, "PUBLISH", "a", payload)
        assert [await ear.next(), await ear.next()] == [b"1", b"2"]
        assert len(reported) == 2
        assert ear.times_up == 1


async def test_closing_does_not_wait_for_a_silent_server() -> None:
    with run_redis() as server:
        async with opened(f"{server.url}?connect_timeout=100&health_check_interval=none") as store:
            await anyio.to_thread.run_sync(server.pause)
            try:
                ear = Ear()
                subscription = store.subscribe("a", ear.heard, ear.subscribed, ear.failed)
                await asyncio.sleep(0)
                with anyio.fail_after(30):
                    await subscription.close()
                assert ear.times_up == 0
            finally:
                await anyio.to_thread.run_sync(server.resume)


async def test_in_a_cluster_any_server_hears_what_any_server_is_told() -> None:
    with run_redis_cluster() as servers:
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in servers)
        async with listening(f"redis+cluster://{hosts}?{FAST}") as ear:
            for number, server in enumerate(servers):
                await call_server(server, "PUBLISH", "a", str(number))
                assert await ear.next() == str(number).encode()
            heard_by = [each for each in servers if b"\na\r" in await call_server(each, "PUBSUB", "CHANNELS")]
            assert len(heard_by) == 1
            await anyio.to_thread.run_sync(heard_by[0].kill)
            await ear.until_up()
            left = next(each for each in servers if each is not heard_by[0])
            await call_server(left, "PUBLISH", "a", "again")
            assert await ear.next() == b"again"


async def test_it_listens_over_tls(tmp_path: Any) -> None:
    certificates, port = await anyio.to_thread.run_sync(Certificates, tmp_path), free_port()
    options: tuple[str, ...] = (
        "--tls-port",
        str(port),
        "--tls-ca-cert-file",
        str(certificates.ca),
        "--tls-auth-clients",
        "no",
    )
    options += ("--tls-cert-file", str(certificates.server), "--tls-key-file", str(certificates.key("server")))
    with run_redis(*options) as server:
        async with listening(f"rediss://127.0.0.1:{port}?tls_ca_file={certificates.ca}") as ear:
            await call_server(server, "PUBLISH", "a", "1")
            assert await ear.next() == b"1"


async def test_it_follows_the_master_that_the_sentinels_name() -> None:
    with (
        run_redis() as master,
        run_redis("--replicaof", "127.0.0.1", str(master.port)) as replica,
        run_sentinel(master, name="shop") as sentinel,
    ):

        async def is_known() -> bool:
            return b"slaves=1" in await call_server(sentinel, "INFO", "sentinel")

        await until(is_known)
        async with listening(f"redis+sentinel://127.0.0.1:{sentinel.port}/shop/0?{FAST}") as ear:
            await call_server(master, "PUBLISH", "a", "1")
            assert await ear.next() == b"1"
            await anyio.to_thread.run_sync(master.kill)
            await ear.until_up()
            await call_server(replica, "PUBLISH", "a", "2")
            assert await ear.next() == b"2"
