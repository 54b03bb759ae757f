from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from cachebus import CacheClosed, CacheConnectionError
from cachebus.adapters.redis_listener import RedisListener
from cachebus.messages import CacheConfigurationError
from cachebus.testing.processes import free_port
from cachebus.testing.servers import Server, redis_command, run_redis, run_redis_cluster, run_sentinel
from tests.certificates import Certificates

from .conftest import opened

FAST = "connect_timeout=0.5&health_check_interval=0.3"


async def tell(server: Server, *words: str) -> bytes:
    return await anyio.to_thread.run_sync(lambda: redis_command(server, *words))


@asynccontextmanager
async def listening(url: str) -> AsyncGenerator[RedisListener]:
    async with opened(url) as store:
        listener = store.listener()
        try:
            yield listener
        finally:
            await listener.close()


class Ear:
    """Collects what it hears; `await next()` waits for one thing."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[bytes] = asyncio.Queue()
        self.missed_times = 0
        self._missed = asyncio.Event()

    def heard(self, payload: bytes) -> None:
        self._heard.put_nowait(payload)

    def missed(self) -> None:
        self.missed_times += 1
        self._missed.set()

    async def next(self) -> bytes:
        async with asyncio.timeout(30):
            return await self._heard.get()

    async def until_missed(self) -> None:
        async with asyncio.timeout(30):
            await self._missed.wait()
        self._missed.clear()

    @property
    def is_empty(self) -> bool:
        return self._heard.empty()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_what_is_published_after_ready_is_heard_by_everybody_at_the_channel_and_nobody_else(
    server: Server,
) -> None:
    async with listening(server.url) as listener:
        one, two, other = Ear(), Ear(), Ear()
        places = [
            listener.subscribe("a", one.heard),
            listener.subscribe(b"a", two.heard),
            listener.subscribe("b", other.heard),
        ]
        for place in places:
            await place.ready()
        for payload in ("1", "2"):
            await tell(server, "PUBLISH", "a", payload)
        assert [await one.next(), await one.next()] == [b"1", b"2"]
        assert [await two.next(), await two.next()] == [b"1", b"2"]
        await tell(server, "PUBLISH", "b", "3")
        assert await other.next() == b"3"
        assert one.is_empty
        assert one.missed_times == 0


async def test_the_connection_is_made_by_the_first_who_listens_and_is_one_for_all(server: Server) -> None:
    async def connections() -> int:
        return (await tell(server, "CLIENT", "LIST")).count(b"id=")

    async with listening(server.url) as listener:
        before = await connections()
        assert repr(listener) == "<RedisListener idle, 0 channels>"
        places = [listener.subscribe(f"c{number}", Ear().heard) for number in range(50)]
        await asyncio.gather(*(place.ready() for place in places))
        assert await connections() == before + 1
        assert repr(listener) == "<RedisListener up, 50 channels>"


async def test_a_channel_that_everybody_has_left_is_left(server: Server) -> None:
    async with listening(server.url) as listener:
        one, two = Ear(), Ear()
        first, second = listener.subscribe("left", one.heard), listener.subscribe("left", two.heard)
        await first.ready()
        await second.ready()
        first.close()
        first.close()
        await tell(server, "PUBLISH", "left", "1")
        assert await two.next() == b"1"
        assert one.is_empty
        second.close()

        async def is_left() -> bool:
            return b"left" not in await tell(server, "PUBSUB", "CHANNELS")

        await until(is_left)
        with pytest.raises(CacheClosed):
            await second.ready()
        # Left and entered again before the server could say anything.
        hasty = listener.subscribe("left", one.heard)
        hasty.close()
        again = listener.subscribe("left", one.heard)
        await again.ready()
        await tell(server, "PUBLISH", "left", "2")
        assert await one.next() == b"2"


async def test_a_server_that_was_killed_is_listened_to_again_and_the_gap_is_told() -> None:
    with run_redis() as server:
        async with listening(f"{server.url}?{FAST}") as listener:
            ear = Ear()
            await listener.subscribe("a", ear.heard, ear.missed).ready()
            await anyio.to_thread.run_sync(server.kill)
            await anyio.to_thread.run_sync(server.start)
            await ear.until_missed()
            await tell(server, "PUBLISH", "a", "after")
            assert await ear.next() == b"after"
            assert ear.missed_times == 1


async def test_a_server_that_falls_silent_is_left_and_the_gap_is_told() -> None:
    with run_redis() as server:
        async with listening(f"{server.url}?{FAST}") as listener:
            ear = Ear()
            await listener.subscribe("a", ear.heard, ear.missed).ready()
            await anyio.to_thread.run_sync(server.pause)
            try:
                with anyio.fail_after(30):
                    while "up" in repr(listener):
                        await asyncio.sleep(0.01)
            finally:
                await anyio.to_thread.run_sync(server.resume)
            await ear.until_missed()


async def test_who_waits_for_a_server_that_is_away_is_told_and_the_listener_goes_on_trying() -> None:
    with run_redis() as server:
        async with listening(f"{server.url}?{FAST}") as listener:
            await anyio.to_thread.run_sync(server.kill)
            ear = Ear()
            place = listener.subscribe("a", ear.heard, ear.missed)
            with pytest.raises(CacheConnectionError):
                await place.ready()
            await anyio.to_thread.run_sync(server.start)
            with anyio.fail_after(30):
                while True:
                    try:
                        await place.ready()
                        break
                    except CacheConnectionError:
                        pass
            await tell(server, "PUBLISH", "a", "1")
            assert await ear.next() == b"1"


async def test_a_channel_that_the_user_may_not_have_is_refused_and_the_others_go_on() -> None:
    with run_redis() as server:
        await tell(server, "ACL", "SETUSER", "me", "on", ">pw", "+@all", "~*", "resetchannels", "&mine#*")
        async with listening(f"redis://me:pw@127.0.0.1:{server.port}") as listener:
            ear = Ear()
            mine = listener.subscribe("mine#1", ear.heard, ear.missed)
            await mine.ready()
            yours = listener.subscribe("yours#1", ear.heard)
            with pytest.raises(CacheConfigurationError, match="may not"):
                await yours.ready()
            with pytest.raises(CacheConfigurationError, match="may not"):
                await yours.ready()
            await ear.until_missed()
            await tell(server, "PUBLISH", "mine#1", "1")
            assert await ear.next() == b"1"
            await tell(server, "ACL", "SETUSER", "me", "&yours#*")
            second = Ear()
            await listener.subscribe("yours#1", second.heard).ready()
            await yours.ready()
            await tell(server, "PUBLISH", "yours#1", "2")
            assert [await ear.next(), await second.next()] == [b"2", b"2"], "whoever was refused before hears it too"


async def test_a_listener_that_fails_harms_no_other(server: Server) -> None:
    async with listening(server.url) as listener:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        ear = Ear()

        def fail(payload: bytes) -> None:
            raise RuntimeError("mine")

        await listener.subscribe("a", fail).ready()
        await listener.subscribe("a", ear.heard, ear.missed).ready()
        for payload in ("1", "2"):
            await tell(server, "PUBLISH", "a", payload)
        assert [await ear.next(), await ear.next()] == [b"1", b"2"]
        assert len(told) == 2
        assert ear.missed_times == 0


async def test_a_closed_listener_lets_nobody_wait() -> None:
    with run_redis() as server:
        async with opened(f"{server.url}?{FAST}") as store:
            listener = store.listener()
            await anyio.to_thread.run_sync(server.pause)
            try:
                waiting = asyncio.create_task(listener.subscribe("a", Ear().heard).ready())
                await asyncio.sleep(0)
                await listener.close()
                await listener.close()
                with pytest.raises(CacheClosed):
                    await waiting
                with pytest.raises(CacheClosed):
                    listener.subscribe("a", Ear().heard)
            finally:
                await anyio.to_thread.run_sync(server.resume)


async def test_in_a_cluster_any_server_hears_what_any_server_is_told() -> None:
    with run_redis_cluster() as servers:
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in servers)
        async with listening(f"redis+cluster://{hosts}?{FAST}") as listener:
            ear = Ear()
            await listener.subscribe("a", ear.heard, ear.missed).ready()
            for number, server in enumerate(servers):
                await tell(server, "PUBLISH", "a", str(number))
                assert await ear.next() == str(number).encode()
            heard_by = [each for each in servers if b"\na\r" in await tell(each, "PUBSUB", "CHANNELS")]
            assert len(heard_by) == 1
            await anyio.to_thread.run_sync(heard_by[0].kill)
            await ear.until_missed()
            left = next(each for each in servers if each is not heard_by[0])
            await tell(left, "PUBLISH", "a", "again")
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
        async with listening(f"rediss://127.0.0.1:{port}?tls_ca_file={certificates.ca}") as listener:
            ear = Ear()
            await listener.subscribe("a", ear.heard).ready()
            await tell(server, "PUBLISH", "a", "1")
            assert await ear.next() == b"1"


async def test_it_follows_the_master_that_the_sentinels_name() -> None:
    with (
        run_redis() as master,
        run_redis("--replicaof", "127.0.0.1", str(master.port)) as replica,
        run_sentinel(master, name="shop") as sentinel,
    ):

        async def is_known() -> bool:
            return b"slaves=1" in await tell(sentinel, "INFO", "sentinel")

        await until(is_known)
        async with listening(f"redis+sentinel://127.0.0.1:{sentinel.port}/shop/0?{FAST}") as listener:
            ear = Ear()
            await listener.subscribe("a", ear.heard, ear.missed).ready()
            await tell(master, "PUBLISH", "a", "1")
            assert await ear.next() == b"1"
            await anyio.to_thread.run_sync(master.kill)
            await ear.until_missed()
            await tell(replica, "PUBLISH", "a", "2")
            assert await ear.next() == b"2"
