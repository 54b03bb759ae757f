from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from pydantic import SecretStr

from cachebus import CacheConnectionError, CacheError, open_cache, open_sync_cache
from cachebus.adapters.redis.store import RedisStore
from cachebus.messages import (
    Add,
    Admit,
    CacheConfigurationError,
    Clear,
    Delete,
    DeleteMany,
    DeletePattern,
    Exists,
    Failed,
    Found,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    InvalidateTags,
    LoadMetadata,
    ReleaseLease,
    RenewLease,
    Scan,
    Set,
    SetMany,
    Stored,
    Touch,
)
from cachebus.settings import backend_from_url, load_settings
from cachebus.settings.backends import RedisSettings, host_and_port
from cachebus.settings.urls import parse_url
from cachebus.testing.processes import free_port
from cachebus.testing.servers import Server, redis_command, run_redis, run_redis_cluster, run_sentinel
from cachebus.testing.suite.base import granted

from ...certificates import Certificates
from ...house.paths import ROOT
from ...lateness import within
from .conftest import one, opened

SECRET = "p@hunter2:w/rd?#%é"
ESCAPED = "p%40hunter2%3Aw%2Frd%3F%23%25%C3%A9"


async def sync(function: Any, *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments)


# Passwords


async def test_a_password_with_every_awkward_character_is_understood() -> None:
    with run_redis(password=SECRET) as server:
        async with opened(f"redis://:{ESCAPED}@127.0.0.1:{server.port}") as store:
            assert await one(store, Set("a", 1))


async def test_a_user_with_a_password_is_understood() -> None:
    with run_redis(user="writer", password=SECRET) as server:
        async with opened(f"redis://writer:{ESCAPED}@127.0.0.1:{server.port}") as store:
            assert isinstance(await one(store, Set("a", 1)), object)


@pytest.mark.parametrize("credentials", ["", ":wrong%20secret@", "nobody:wrong%20secret@"])
async def test_a_wrong_password_is_a_permanent_error_that_does_not_show_it(credentials: str) -> None:
    with run_redis(password="right secret") as server:
        with pytest.raises(CacheConfigurationError, match="password") as refused:
            async with opened(f"redis://{credentials}127.0.0.1:{server.port}"):
                pass
        for shown in (str(refused.value), repr(refused.value), repr(refused.value.__cause__)):
            assert "secret" not in shown


async def test_a_user_who_may_not_write_is_told_so(server: Server) -> None:
    await sync(redis_command, server, "ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read", "+@connection", "+time")
    async with opened(f"redis://reader:pw@127.0.0.1:{server.port}") as store:
        assert not isinstance(await one(store, Get("a")), Failed)
        error = (await one(store, Set("a", 1))).error()
        assert isinstance(error, CacheConfigurationError)
        assert "NOPERM" in str(error)


def documented_rights() -> list[list[str]]:
    """Return the documented ACL rules for the namespace `tests`: keys, store commands, script commands, others."""
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    rights = page.partition("### Rights")[2].partition("###")[0]
    words = re.findall(r"`([^`]+)`", rights)
    keys = [each.replace("<namespace>", "tests") for each in words if each.startswith("~")]
    ours, scripts, *others = [each for each in words if not each.startswith(("~", "&"))]
    return [keys, ours.split(), scripts.split(), others]


async def test_a_user_needs_no_more_rights_than_documented(server: Server) -> None:
    keys, ours, scripts, _ = documented_rights()
    rights = [*keys, *(f"+{each}" for each in (*ours, *scripts))]
    await sync(redis_command, server, "ACL", "SETUSER", "least", "on", ">pw", *rights)
    async with opened(f"redis://least:pw@127.0.0.1:{server.port}?health_check_interval=0.05") as store:
        assert isinstance(await one(store, Set("a", 1)), Stored)
        t1 = await granted(store, GetOrLease("a", "p", "t1", 9.0, refresh=True))
        t2 = await granted(store, GetOrLease("l", "p", "t2", 9.0))
        t4 = await granted(store, GetOrLease("m", "p", "t4", 9.0, tags=("x",)))
        replies = await store.execute(
            [
                *(Set("a", 1), Set("a", 2, ttl=9.0), Get("a"), GetMany(("a", "b")), SetMany({"c": 1}), Add("d", 1)),
                *(Exists("a"), Touch("a", ttl=9.0), Touch("a", ttl=None), Increment("n", ttl=9.0), Increment("n")),
                *(RenewLease("a", t1, 9.0), ReleaseLease("a", t1), RenewLease("l", t2, 9.0)),
                *(Set("l", 1, 0.001, lease=t2, metadata=LoadMetadata(0.0, 9.0)), GetOrLease("l", "p", "t3", 9.0)),
                *(ReleaseLease("l", "t3"), Exists("l"), Admit("calls", 5, 1.0, 5)),
                *(
                    Set("t", 1, 9.0, ("x",)),
                    Get("t"),
                    Exists("t"),
                    Touch("t", ttl=99.0),
                    Touch("t", ttl=None),
                    Increment("t"),
                ),
                Set("m", 1, tags=("x", "y"), lease=t4),
                *(InvalidateTags(("x", "z")), GetMany(("t", "m"))),
                *(Delete("a"), DeleteMany(("c", "d")), Scan(), DeletePattern("x*"), Clear()),
            ]
        )
        assert [reply for reply in replies if isinstance(reply, Failed)] == []
        await sync(redis_command, server, "SCRIPT", "FLUSH")
        assert not isinstance(await one(store, Set("a", 1)), Failed)


@pytest.mark.parametrize(
    "url", ["redis://user:hunter2@host/3", "redis+sentinel://host/name?sentinel_password=hunter2&password=hunter2"]
)
def test_a_password_is_in_no_repr(url: str) -> None:
    settings: Any = backend_from_url(url)
    store = RedisStore([], namespace="n")
    for shown in (repr(settings), str(settings), settings.model_dump_json(), repr(load_settings(url)), repr(store)):
        assert "hunter2" not in shown


# Connecting to a server


async def test_a_database_is_its_own(server: Server) -> None:
    async with opened(f"{server.url}/3") as three, opened(f"{server.url}/0") as zero:
        await one(three, Set("a", 1))
        await one(zero, Clear())
        assert isinstance(await one(three, Get("a")), Found)
    with pytest.raises(CacheConfigurationError, match="database"):
        async with opened(f"{server.url}/99"):
            pass


async def test_a_unix_socket_is_a_way_to_the_server(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with run_redis("--unixsocket", str(path), password="pw"):
        async with opened(f"unix://:pw@{path}?database=2") as store:
            await one(store, Set("a", 1))
            assert isinstance(await one(store, Get("a")), Found)


def test_a_synchronous_cache_uses_redis_from_threads(server: Server) -> None:
    with open_sync_cache(server.url, namespace="sync") as cache:
        cache.set("a", {"b": 1})
        assert cache.get("a") == {"b": 1}


def test_trio_is_refused_in_words(server: Server) -> None:
    async def main() -> None:
        async with open_cache(server.url):
            pass

    with pytest.raises(CacheError, match="asyncio"):
        trio.run(main)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


async def test_tls_checks_the_server_and_shows_who_we_are(certificates: Certificates) -> None:
    port = free_port()
    options: tuple[str, ...] = ("--tls-port", str(port), "--tls-ca-cert-file", str(certificates.ca))
    options += ("--tls-cert-file", str(certificates.server), "--tls-key-file", str(certificates.key("server")))
    with run_redis(*options) as plain:
        ours = f"tls_cert_file={certificates.client}&tls_key_file={certificates.key('client')}"
        async with opened(f"rediss://127.0.0.1:{port}?tls_ca_file={certificates.ca}&{ours}") as store:
            await one(store, Set("a", bytes(1_000_000)))
            assert len((await one(store, Get("a"))).value) == 1_000_000
        for url, said in (
            (f"rediss://127.0.0.1:{port}?{ours}", "certificate"),
            (f"rediss://127.0.0.1:{port}?tls_ca_file={certificates.stranger}&{ours}", "certificate"),
            (f"rediss://localhost:{port}?tls_ca_file={certificates.ca}&{ours}", "certificate|Hostname"),
            (f"rediss://127.0.0.1:{port}?tls_ca_file={certificates.ca}", ""),
            (f"rediss://127.0.0.1:{plain.port}?tls_ca_file={certificates.ca}", ""),
            (f"redis://127.0.0.1:{port}", ""),
            ("rediss://127.0.0.1?tls_ca_file=/no/such/file", "/no/such/file"),
        ):
            started = time.monotonic()
            with pytest.raises((CacheConfigurationError, CacheConnectionError), match=said or "."):
                async with opened(url):
                    pass
            assert time.monotonic() - started < within(1.0)


async def test_a_cluster_is_reached_over_tls(certificates: Certificates) -> None:
    port = free_port()
    options: tuple[str, ...] = (
        "--tls-cluster",
        "yes",
        "--tls-port",
        str(port),
        "--tls-ca-cert-file",
        str(certificates.ca),
        "--tls-auth-clients",
        "no",
    )
    options += ("--tls-cert-file", str(certificates.server), "--tls-key-file", str(certificates.key("server")))
    with run_redis_cluster(1, *options):
        url = f"redis+cluster://127.0.0.1:{port}?tls=true"
        async with opened(f"{url}&tls_ca_file={certificates.ca}") as store:
            assert not isinstance(await one(store, Set("a", 1)), Failed)
            assert (await one(store, Get("a"))).value == 1
        with pytest.raises(CacheConfigurationError, match="certificate"):
            async with opened(f"{url}&tls_ca_file={certificates.stranger}"):
                pass


async def test_sentinels_lead_to_the_master_and_to_the_next_one() -> None:
    with (
        run_redis() as master,
        run_redis("--replicaof", f"127.0.0.1 {master.port}") as replica,
        run_sentinel(master, name="shop") as sentinel,
    ):
        with anyio.fail_after(30):
            while b"slaves=1" not in await sync(redis_command, sentinel, "INFO", "sentinel"):
                await anyio.sleep(0.05)
        url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/shop/0"
        async with opened(url) as store:
            assert not isinstance(await one(store, Set("a", b"1")), Failed)
            assert b"tests:a" in await sync(redis_command, master, "KEYS", "*")
            with anyio.fail_after(30):
                while b"tests:a" not in await sync(redis_command, replica, "KEYS", "*"):
                    await anyio.sleep(0.02)
            await sync(master.kill)
            with anyio.fail_after(30):
                while True:
                    try:
                        if not isinstance(await one(store, Set("b", b"2")), Failed):
                            break
                    except CacheConnectionError:
                        pass
                    await anyio.sleep(0.05)
            assert (await one(store, Get("a"))).value == b"1"
            assert b"tests:b" in await sync(redis_command, replica, "KEYS", "*")
        with pytest.raises(CacheConnectionError, match="no sentinel knows the master of 'other'"):
            async with opened(url.replace("shop", "other")):
                pass


# URLs and settings


def test_every_option_of_a_redis_url_is_read() -> None:
    options = "name=hot&default=true&default_ttl=5&window=3&max_connections=7&connect_timeout=0.5"
    url = f"rediss://me:{ESCAPED}@[::1]:7000/4?{options}&health_check_interval=9&tls_ca_file=a&tls_cert_file=b&tls_key_file=c"
    assert backend_from_url(url) == RedisSettings(
        name="hot",
        default=True,
        default_ttl=5.0,
        hosts=("[::1]:7000",),
        user="me",
        password=SecretStr(SECRET),
        database=4,
        tls=True,
        tls_ca_file="a",
        tls_cert_file="b",
        tls_key_file="c",
        window=3,
        max_connections=7,
        connect_timeout=0.5,
        health_check_interval=9.0,
    )


def test_a_url_of_sentinels_names_hosts_and_service() -> None:
    assert backend_from_url("redis+sentinel://a,b:7/shop/2?sentinel_user=u&sentinel_password=p") == RedisSettings(
        topology="sentinel",
        hosts=("a", "b:7"),
        service="shop",
        database=2,
        sentinel_user="u",
        sentinel_password=SecretStr("p"),
    )


def test_the_url_of_a_socket_names_its_path() -> None:
    assert backend_from_url("unix:///run/redis.sock") == RedisSettings(socket="/run/redis.sock")
    assert backend_from_url("redis://") == RedisSettings()


def test_a_host_has_a_port_of_its_own_or_the_usual_one() -> None:
    assert host_and_port("a", 6379) == ("a", 6379)
    assert host_and_port("[::1]:7", 6379) == ("::1", 7)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://host:99999", "expected a host as name"),
        ("redis://ho st", "space"),
        ("redis://host/x", "expected a number as the database"),
        ("redis://host/1/2", "too many parts"),
        ("redis://a,b", "several hosts require the topology"),
        ("redis://:hunter2/x@host", ": as %3A"),
        ("redis://:hun:ter2@host", ": as %3A"),
        ("redis://:hunter2%zz@host", "write % as %25"),
        ("redis://user@host", "user: requires a password"),
        ("unix://host/path", "unix:///path"),
        ("redis+sentinel://host", "the name of the master"),
        ("redis://host/1?database=2", "given twice"),
        ("redis://host?window=0", "window: expected a whole number, 1 or more"),
        ("redis://host?tls_ca_file=x", "require tls"),
        ("rediss://host?tls_key_file=x", "requires tls_cert_file"),
        ("redis://host?sentinel_password=hunter2", "only with the topology sentinel"),
    ],
)
def test_a_url_that_means_nothing_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(CacheConfigurationError) as refused:
        backend_from_url(url)
    assert said in str(refused.value)
    assert "ter2" not in str(refused.value)


def test_a_namespace_with_a_colon_is_refused() -> None:
    with pytest.raises(CacheConfigurationError, match="colon"):
        RedisStore([], namespace="a:b")


def test_a_redis_url_is_of_the_type_redis() -> None:
    assert parse_url("redis://host")[0] == "redis"
