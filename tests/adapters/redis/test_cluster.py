"""The Redis store on a real Redis Cluster: slots that move during requests, and servers that stop and restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from cachebus import CacheConnectionError, CacheError, open_cache
from cachebus.adapters.redis.cluster.router import SlotQueues
from cachebus.adapters.redis.cluster.store import RedisClusterStore
from cachebus.adapters.redis.cluster.topology import SlotMap, read_redirection, read_slots
from cachebus.adapters.redis.commands import slot_of, tag_of
from cachebus.adapters.redis.connect import Endpoint
from cachebus.messages import (
    Admit,
    BadMessage,
    CacheConfigurationError,
    Clear,
    Delete,
    DeleteMany,
    DeletePattern,
    Failed,
    Found,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    Incremented,
    InvalidateTags,
    Loading,
    Missing,
    Released,
    ReleaseLease,
    Renewed,
    RenewLease,
    Scan,
    Set,
    SetMany,
    Stored,
    Touch,
)
from cachebus.settings import backend_from_url
from cachebus.settings.backends import RedisSettings
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import Server, redis_command, run_redis, run_redis_cluster
from cachebus.testing.suite.base import granted

from ...faults.scene import guarded
from ...lateness import within
from .conftest import one, opened, submitted
from .test_access import documented_rights


async def sync(function: Any, *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(function, *arguments)


def call_server(server: Server, *words: str) -> bytes:
    return redis_command(server, *words)


def name_of(server: Server) -> str:
    return call_server(server, "CLUSTER", "MYID").split()[-1].decode()


def url_of(servers: Sequence[Server]) -> str:
    return "redis+cluster://" + ",".join(f"{each.host}:{each.port}" for each in servers)


def owner_of(servers: Sequence[Server], slot: int) -> Server:
    """Return the server that reports that it owns a slot."""
    for line in call_server(servers[0], "CLUSTER", "NODES").decode().splitlines():
        words = line.split()
        if len(words) < 9 or "master" not in words[2]:
            continue
        port = int(words[1].split("@")[0].rpartition(":")[2])
        for span in words[8:]:
            first, _, last = span.partition("-")
            if not span.startswith("[") and int(first) <= slot <= int(last or first):
                return next(each for each in servers if each.port == port)
    raise AssertionError(f"nobody has slot {slot}")


class Move:
    """Migration of one slot to another server, in the steps of `redis-cli --cluster reshard`."""

    def __init__(self, servers: Sequence[Server], slot: int) -> None:
        self.servers = servers
        self.slot = slot
        self.source = owner_of(servers, slot)
        self.target = next(each for each in servers if each is not self.source)

    def begin(self) -> None:
        call_server(self.target, "CLUSTER", "SETSLOT", str(self.slot), "IMPORTING", name_of(self.source))
        call_server(self.source, "CLUSTER", "SETSLOT", str(self.slot), "MIGRATING", name_of(self.target))

    def carry(self, most: int = 1_000_000) -> int:
        """Move up to `most` keys, and return how many were moved."""
        answer = call_server(self.source, "CLUSTER", "GETKEYSINSLOT", str(self.slot), str(most)).split(b"\r\n")
        keys = [line.decode() for line in answer[2::2]]
        for key in keys:
            call_server(self.source, "MIGRATE", self.target.host, str(self.target.port), key, "0", "5000")
        return len(keys)

    def end(self) -> None:
        while self.carry():
            pass
        for server in (self.target, self.source, *self.servers):
            call_server(server, "CLUSTER", "SETSLOT", str(self.slot), "NODE", name_of(self.target))

    def all(self) -> None:
        self.begin()
        while self.carry(3):
            pass
        self.end()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sequence[Server]]:
    with run_redis_cluster() as servers:
        yield servers


@pytest.fixture
async def store(cluster: Sequence[Server]) -> AsyncIterator[Any]:
    async with opened(url_of(cluster)) as made:
        await one(made, Clear())
        yield made


# Slots


@given(st.text("abc{}:é", max_size=12) | st.text())
def test_a_slot_is_that_of_the_key_or_of_its_hash_tag(key: str) -> None:
    if not any("\ud800" <= each <= "\udfff" for each in key):
        assert slot_of(key) == key_slot(key.encode())


async def test_a_slot_is_what_the_server_says_it_is(cluster: Sequence[Server]) -> None:
    for key in ("a", "tests:a", "tests:{user1}:name", "{}", "a{}b", "a{b", "{{x}}", "é\N{SNAKE}", "\r\n"):
        answer = await sync(call_server, cluster[0], "CLUSTER", "KEYSLOT", key)
        assert int(answer.strip(b":\r\n")) == slot_of(key)


def test_a_redirection_without_a_host_leads_to_where_we_asked() -> None:
    asked = Endpoint("10.0.0.1", 1)
    assert read_redirection("MOVED 7 10.0.0.2:6381", asked) == (7, Endpoint("10.0.0.2", 6381))
    assert read_redirection("ASK 7 :6381", asked) == (7, Endpoint("10.0.0.1", 6381))
    assert read_redirection("MOVED 7 fe80::1:6381", asked) == (7, Endpoint("fe80::1", 6381))
    assert read_slots([[0, 1, [None, 5, b"id"], [b"replica", 6, b"id"]], [2, 2, [b"?", 7, b"id"]]], asked) == {
        0: Endpoint("10.0.0.1", 5),
        1: Endpoint("10.0.0.1", 5),
        2: Endpoint("10.0.0.1", 7),
    }


def test_a_map_says_what_has_changed_hands() -> None:
    a, b = Endpoint("a"), Endpoint("b")
    slots = SlotMap()
    assert slots.replace({1: a, 2: a}) == [1, 2]
    version = slots.version
    assert not slots.move(1, a)
    assert slots.version == version
    assert slots.move(1, b)
    assert slots.replace({1: b, 2: b}) == [2]
    assert slots.endpoints() == [b]
    with pytest.raises(CacheConnectionError, match="slot 3"):
        slots.owner(3)


def test_a_slot_is_held_until_nothing_is_under_way_in_it() -> None:
    traffic = SlotQueues()
    traffic.hold(1)
    assert not traffic.is_held([1]), "no command is in flight that could be overtaken"
    traffic.begin(1, "first")
    traffic.begin(1, "second")
    traffic.hold(1)
    assert traffic.is_held([0, 1])
    assert traffic.is_newest(1, "second")
    assert not traffic.is_newest(1, "first")
    traffic.end(1)
    assert traffic.is_held([1])
    traffic.end(1)
    assert not traffic.is_held([1])
    assert traffic.idle


# Settings


def test_the_url_of_a_cluster_names_servers() -> None:
    assert backend_from_url("redis+cluster://a:7000,b?window=3&max_connections=4") == RedisSettings(
        topology="cluster", hosts=("a:7000", "b"), window=3, max_connections=4
    )
    with pytest.raises(CacheConfigurationError, match="only database 0"):
        backend_from_url("redis+cluster://a/3")


async def test_every_server_is_found_from_one(cluster: Sequence[Server]) -> None:
    async with opened(url_of(cluster[1:2])) as store:
        assert isinstance(store, RedisClusterStore)
        await one(store, SetMany({f"k{n}": n for n in range(300)}))
        for server in cluster:
            assert int((await sync(call_server, server, "DBSIZE")).strip(b":\r\n")) > 50
        assert len((await one(store, GetMany(tuple(f"k{n}" for n in range(300))))).entries) == 300


async def test_the_wrong_topology_is_said_in_words(cluster: Sequence[Server]) -> None:
    async with opened(cluster[0].url) as single:
        errors = [
            reply.error()
            for reply in await single.execute([Set(f"k{n}", n) for n in range(9)])
            if isinstance(reply, Failed)
        ]
        assert errors
        assert {type(error) for error in errors} == {CacheConfigurationError}
        assert "redis+cluster://" in str(errors[0])
    with run_redis() as alone:
        with pytest.raises(CacheConfigurationError, match="not part of a cluster"):
            async with opened(url_of([alone])):
                pass
        dead = url_of([alone])
    with pytest.raises(CacheConnectionError, match="no server of the cluster"):
        async with opened(dead):
            pass


async def test_a_user_of_a_cluster_needs_no_more_rights_than_documented(cluster: Sequence[Server]) -> None:
    keys, ours, scripts, others = documented_rights()
    commands = (*ours, *scripts, *(each for each in others if each.startswith(("cluster|", "ask"))))
    rights = [*keys, *(f"+{each}" for each in commands)]
    for server in cluster:
        await sync(call_server, server, "ACL", "SETUSER", "least", "on", ">pw", *rights)
    url = url_of(cluster).replace("://", "://least:pw@")
    async with opened(url) as store:
        move = Move(cluster, slot_of("tests:r"))
        await sync(move.begin)
        replies = await store.execute(
            [Set("r", 1), Get("r"), SetMany({f"k{n}": n for n in range(50)}), Increment("n"), Admit("a", 1, 9.0, 1)]
        )
        assert [reply for reply in replies if isinstance(reply, Failed)] == []
        await sync(move.end)
        replies = await store.execute([Get("r"), Scan(), DeletePattern("k*"), GetOrLease("l", "p", "t", 9.0)])
        assert [reply for reply in replies if isinstance(reply, Failed)] == []
        replies = await store.execute([Set("t", 1, 9.0, ("x",)), Touch("r", 9.0)])
        assert [reply for reply in replies if isinstance(reply, Failed)] == []
        replies = await store.execute([Touch("t", 99.0), InvalidateTags(("x",)), Get("r"), Clear()])
        assert [reply for reply in replies if isinstance(reply, Failed)] == []


async def test_no_server_gets_more_connections_than_allowed(cluster: Sequence[Server]) -> None:
    async with open_cache(f"{url_of(cluster)}?max_connections=2") as cache:

        async def use(number: int) -> None:
            await cache.set(f"k{number}", number)
            assert await cache.get(f"k{number}") == number
            if number % 100 == 0:
                await cache.delete_pattern(f"k{number}*")

        await asyncio.gather(*(use(number) for number in range(1000)))
        for server in cluster:
            clients = (await sync(call_server, server, "CLIENT", "LIST", "TYPE", "normal")).splitlines()
            assert 1 <= sum(b"cmd=client" not in line for line in clients if line.startswith(b"id=")) <= 2


async def test_a_scan_goes_over_every_server(store: Any, cluster: Sequence[Server]) -> None:
    keys = {f"k{number}" for number in range(3000)}
    await one(store, SetMany(dict.fromkeys(keys, 1)))
    found: set[str] = set()
    servers: set[str] = set()
    cursor = ""
    while True:
        page = await one(store, Scan("k*", cursor))
        found.update(page.keys)
        if not (cursor := page.cursor):
            break
        servers.add(cursor.partition("@")[2])
    assert found == keys
    assert len(servers) == 3
    for cursor in ("0", "x@y", "@", "0@nobody:1"):
        assert isinstance((await one(store, Scan("*", cursor))).error(), BadMessage | CacheConnectionError)


async def test_scripts_that_a_server_forgot_are_sent_again(store: Any, cluster: Sequence[Server]) -> None:
    for server in cluster:
        await sync(call_server, server, "SCRIPT", "FLUSH")
    assert all(isinstance(each, Stored) for each in await store.execute([Set(f"k{n}", n) for n in range(50)]))
    assert await one(store, Increment("n", 5)) == Incremented(5)


@pytest.mark.parametrize("last", [Delete("k"), Set("k", "new")])
async def test_what_a_server_forgot_how_to_write_is_not_written_after_what_came_later(
    store: Any, cluster: Sequence[Server], last: Any
) -> None:
    await store.execute([Set(f"k{n}", n) for n in range(50)])
    await one(store, Delete("k"))
    for server in cluster:
        await sync(call_server, server, "SCRIPT", "FLUSH")
    replies = await submitted(store, Set("k", "old"), Get("k"), last)
    assert not isinstance(replies[2], Failed)
    found = await one(store, Get("k"))
    assert (found.value if isinstance(found, Found) else None) == getattr(last, "value", None)


# Leases

BRACES = ("a", "{t}a", "a{t}", "{", "}", "{}", "{}a", "a}b", "a{b", "}{", "{{x}}", "é{é", "a:b{c:d")


def test_every_slot_has_a_tag() -> None:
    for slot in range(16384):
        tag = tag_of(slot)
        assert (len(tag), b"}" in tag) == (2, False)
        assert key_slot(b"ns#lease:{%b}:k" % tag) == slot


@pytest.mark.parametrize("key", BRACES)
@pytest.mark.parametrize("namespace", ["tests", "a{b", "{a}b"])
async def test_whatever_the_key_its_leases_are_in_its_slot(cluster: Sequence[Server], key: str, namespace: str) -> None:
    async with opened(url_of(cluster), namespace=namespace) as store:
        await one(store, Delete(key))
        t1 = await granted(store, GetOrLease(key, "p", "t1", 9.0))
        assert await one(store, RenewLease(key, t1, 9.0)) == Renewed(9.0)
        assert isinstance(await one(store, Set(key, b"1", lease=t1)), Stored)
        t2 = await granted(store, GetOrLease(key, "p", "t2", 9.0, refresh=True))
        assert isinstance(await one(store, GetOrLease(key, "p", "t3", 9.0, refresh=True)), Found)
        assert isinstance(await one(store, Set(key, b"2", lease=t2)), Stored)
        t3 = await granted(store, GetOrLease(key, "p", "t3", 9.0, refresh=True))
        assert await one(store, ReleaseLease(key, t3)) == Released()
        assert (await one(store, Get(key))).value == b"2"


async def test_a_key_can_be_leased_while_its_slot_moves(store: Any, cluster: Sequence[Server]) -> None:
    move = Move(cluster, slot_of("tests:{l}"))
    t1 = await granted(store, GetOrLease("{l}1", "p", "t1", 9.0))
    await sync(move.begin)
    t2 = await granted(store, GetOrLease("{l}2", "p", "t2", 9.0))
    assert isinstance(await one(store, GetOrLease("{l}1", "q", "t3", 9.0)), Loading)
    late = await one(store, Set("{l}2", b"2", lease=t2))
    assert isinstance(late, Failed)
    assert late.error().transient
    await sync(move.end)
    assert isinstance(await one(store, Set("{l}1", b"1", lease=t1)), Stored)
    assert isinstance(await one(store, Set("{l}2", b"2", lease=t2)), Stored)


# Slots that move


async def test_what_has_moved_is_followed_and_the_new_way_is_learned(store: Any, cluster: Sequence[Server]) -> None:
    move = Move(cluster, slot_of("tests:a"))
    await one(store, Set("a", b"1"))
    await sync(move.all)
    assert (await one(store, Get("a"))).value == b"1"
    await sync(call_server, move.source, "CONFIG", "RESETSTAT")
    assert (await one(store, Get("a"))).value == b"1"
    assert b"cmdstat_mget" not in await sync(call_server, move.source, "INFO", "commandstats")


async def test_a_slot_between_two_servers_answers_for_every_key(store: Any, cluster: Sequence[Server]) -> None:
    names = [f"{{t}}{number}" for number in range(20)]
    move = Move(cluster, slot_of("tests:{t}"))
    await one(store, SetMany({name: name for name in names}))
    await sync(move.begin)
    assert await sync(move.carry, 10) == 10
    found = await one(store, GetMany((*names, "{t}none")))
    assert {key: each.value for key, each in found.entries.items()} == {name: name for name in names}
    replies = await store.execute([Get(name) for name in names] + [Set(name, name * 2) for name in names])
    assert [each.value for each in replies[:20]] == names
    assert all(isinstance(each, Stored) for each in replies[20:])
    assert (await one(store, DeleteMany((*names[:15], "{t}none")))).count == 15
    assert await one(store, Increment("{t}new", 3)) == Incremented(3)
    await sync(move.end)
    assert await one(store, Increment("{t}new", 1)) == Incremented(4)
    assert [(await one(store, Get(name))).value for name in names[15:]] == [name * 2 for name in names[15:]]
    assert isinstance(await one(store, Get(names[0])), Missing)


async def test_one_key_written_several_times_is_one_command_also_while_its_slot_moves(
    store: Any, cluster: Sequence[Server]
) -> None:
    move = Move(cluster, slot_of("tests:{w}"))
    await sync(move.begin)
    replies = await store.execute([Set("{w}a", 1), Set("{w}a", 2), Get("{w}a"), Get("{w}a")])
    assert [type(each) for each in replies] == [Stored, Stored, Found, Found]
    assert replies[3].value == 2
    await sync(move.end)
    assert (await one(store, Get("{w}a"))).value == 2


async def test_a_command_on_several_keys_is_taken_apart_only_if_nothing_came_after_it(
    store: Any, cluster: Sequence[Server]
) -> None:
    move = Move(cluster, slot_of("tests:{u}"))
    await one(store, SetMany({"{u}a": 1, "{u}b": 2}))
    await sync(move.begin)
    await sync(move.carry, 1)
    # The read of the slot follows the writes, so the writes fail instead of being done late.
    written, read = await store.execute([SetMany({"{u}a": 3, "{u}b": 4}), GetMany(("{u}a", "{u}b"))])
    assert isinstance(written.error(), CacheConnectionError)
    assert {key: each.value for key, each in read.entries.items()} == {"{u}a": 1, "{u}b": 2}
    again = await store.execute([SetMany({"{u}a": 3, "{u}b": 4}), GetMany(("{u}a", "{u}b"))])
    assert {key: each.value for key, each in again[1].entries.items()} == {"{u}a": 3, "{u}b": 4}
    await sync(move.end)


@pytest.mark.parametrize("tagged", [False, True])
async def test_slots_move_under_callers_and_each_key_keeps_its_order_and_its_values(
    cluster: Sequence[Server], tagged: bool
) -> None:
    async with opened(url_of(cluster)) as store:
        await one(store, Clear())
        stop = asyncio.Event()
        wrong: list[Any] = []
        errors: set[str] = set()
        counted = 0

        async def call(number: int) -> None:
            nonlocal counted
            key, counter = (
                (f"{{m{number % 4}}}:{number}", f"{{m{number % 4}}}:n{number}")
                if tagged
                else (
                    f"m{number}",
                    f"n{number}",
                )
            )
            turn = highest = 0
            while not stop.is_set():
                turn += 1
                # Submitted without waiting, so the store must keep the order.
                batches = [
                    [Set(key, [number, turn, 0]), Increment(counter)],
                    [Get(key), Increment(counter)],
                    [Set(key, [number, turn, 1]), Increment(counter), Get(key)],
                ]
                loop = asyncio.get_running_loop()
                futures: list[asyncio.Future[Any]] = []
                for batch in batches:
                    future: asyncio.Future[Any] = loop.create_future()
                    await store.submit(batch, future.set_result)
                    futures.append(future)
                replies = [reply for future in futures for reply in await future]
                for reply in replies:
                    if isinstance(reply, Failed):
                        errors.add(str(reply.error()))
                counts = [reply.value for reply in replies if isinstance(reply, Incremented)]
                if counts != sorted(set(counts)) or (counts and counts[0] <= highest):
                    wrong.append((counter, highest, counts))
                highest = max([highest, *counts])
                counted += len(counts)
                if not any(isinstance(reply, Failed) for reply in replies):
                    seen = [replies[2].value, replies[6].value]
                    if seen != [[number, turn, 0], [number, turn, 1]]:
                        wrong.append((key, turn, seen))

        async with asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(call(number))
            for number in range(8):
                slot = slot_of(f"tests:{{m{number % 4}}}" if tagged else f"tests:m{number}")
                await sync(Move(cluster, slot).all)
                if not tagged:
                    await sync(Move(cluster, slot_of(f"tests:n{number}")).all)
            stop.set()
        assert wrong == []
        # Only the first command with several keys in a moving slot may be rejected.
        assert errors <= ({"backend 'redis': the cluster is moving these keys (TRYAGAIN)"} if tagged else set())
        assert counted > 100
        # Every increment was done exactly once.
        for number in range(40):
            counter = f"{{m{number % 4}}}:n{number}" if tagged else f"n{number}"
            found = await one(store, Get(counter))
            assert isinstance(found, Found)


async def test_what_is_sent_after_a_redirection_does_not_overtake_what_was_sent_before_it() -> None:
    with run_redis_cluster() as servers:
        move = Move(servers, slot_of("tests:a"))
        with Proxy.before(move.source) as proxy:
            # The server announces the proxy's port, so that its replies can be delayed.
            await sync(call_server, move.source, "CONFIG", "SET", "cluster-announce-port", str(proxy.port))
            async with opened(url_of([move.source])) as store:
                await one(store, Set("a", 0))
                assert proxy.connections == 1
                await sync(move.all)
                proxy.switch("latency", seconds=0.1)
                loop = asyncio.get_running_loop()
                first, second, third = (loop.create_future() for _ in range(3))
                await store.submit([Set("a", 1)], first.set_result)
                await asyncio.sleep(0.1)
                await store.submit([Set("a", 2)], second.set_result)
                assert isinstance((await first)[0], Stored)
                assert not second.done(), "it is still on its way to the old server"
                await store.submit([Set("a", 3)], third.set_result)
                await asyncio.gather(second, third)
                assert (await one(store, Get("a"))).value == 3


# Servers that stop


async def test_a_killed_server_takes_only_its_own_keys_and_brings_them_back() -> None:
    with run_redis_cluster(3, "--cluster-node-timeout", "15000") as servers:
        async with opened(f"{url_of(servers)}?connect_timeout=0.5") as store:
            await sync(servers[0].kill)
            started = time.monotonic()
            replies = await store.execute([Get(f"k{number}") for number in range(60)])
            assert time.monotonic() - started < within(0.5)
            failed = [reply.error() for reply in replies if isinstance(reply, Failed)]
            assert 5 < len(failed) < 40
            assert {type(each) for each in failed} == {CacheConnectionError}
            assert all(isinstance(each, Missing | Failed) for each in replies)
            await sync(servers[0].start)
            with anyio.fail_after(30):
                # A restarted server rejects requests for two seconds, until the others have updated its state.
                while b"cluster_state:ok" not in await sync(call_server, servers[0], "CLUSTER", "INFO"):
                    await asyncio.sleep(0.02)
            back = time.monotonic()
            while any(isinstance(each, Failed) for each in await store.execute([Set(f"k{n}", n) for n in range(60)])):
                assert time.monotonic() - back < within(2.0)
                await asyncio.sleep(0.01)
            assert [each.value for each in await store.execute([Get(f"k{n}") for n in range(60)])] == list(range(60))


async def test_a_silent_server_costs_the_others_nothing_once_it_is_known() -> None:
    with run_redis_cluster(3, "--cluster-node-timeout", "15000") as servers:
        async with opened(f"{url_of(servers)}?connect_timeout=0.5&health_check_interval=0.1") as store:
            keys = [f"k{n}" for n in range(60)]
            await one(store, SetMany(dict.fromkeys(keys, 1)))
            await sync(servers[0].pause)
            try:
                first = await store.execute([Get(key) for key in keys])
                lost = {key for key, reply in zip(keys, first, strict=True) if isinstance(reply, Failed)}
                assert 5 < len(lost) < 40
                await store.execute([Get(key) for key in keys])
                for _ in range(10):
                    started = time.monotonic()
                    replies = await store.execute([Get(key) for key in keys])
                    assert time.monotonic() - started < within(0.2)
                    assert {key for key, reply in zip(keys, replies, strict=True) if isinstance(reply, Failed)} == lost
            finally:
                await sync(servers[0].resume)
            with anyio.fail_after(within(2.0)):
                while any(isinstance(each, Failed) for each in await store.execute([Get(key) for key in keys])):
                    await asyncio.sleep(0.01)


def _with_replica(stack: ExitStack) -> tuple[Sequence[Server], Server]:
    options = ("--cluster-node-timeout", "500", "--cluster-replica-validity-factor", "0")
    servers = stack.enter_context(run_redis_cluster(3, *options))
    replica = stack.enter_context(run_redis("--cluster-enabled", "yes", *options))
    inner = call_server(servers[0], "CONFIG", "GET", "cluster-port").split()[-1].decode()
    call_server(replica, "CLUSTER", "MEET", servers[0].host, str(servers[0].port), inner)
    limit = time.monotonic() + 30
    while b"cluster_known_nodes:4" not in call_server(replica, "CLUSTER", "INFO"):
        assert time.monotonic() < limit
        time.sleep(0.02)
    while True:
        try:
            call_server(replica, "CLUSTER", "REPLICATE", name_of(servers[0]))
            break
        except RuntimeError:
            assert time.monotonic() < limit
            time.sleep(0.02)
    while b"master_link_status:up" not in call_server(replica, "INFO", "replication"):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return servers, replica


async def test_a_replica_takes_over_from_a_killed_server() -> None:
    with ExitStack() as stack:
        servers, replica = await sync(_with_replica, stack)
        async with opened(f"{url_of(servers)}?connect_timeout=0.5") as store:
            stored = await store.execute([Set(f"k{n}", n) for n in range(60)])
            assert all(isinstance(each, Stored) for each in stored)
            for server in servers[:1]:
                await sync(call_server, server, "WAIT", "1", "5000")
            with anyio.fail_after(30):
                while int((await sync(call_server, replica, "DBSIZE")).strip(b":\r\n")) != int(
                    (await sync(call_server, servers[0], "DBSIZE")).strip(b":\r\n")
                ):
                    await asyncio.sleep(0.01)
            await sync(servers[0].kill)
            with anyio.fail_after(30):
                while True:
                    replies = await store.execute([Get(f"k{n}") for n in range(60)])
                    assert all(isinstance(each, Found | Failed) for each in replies)
                    if not any(isinstance(each, Failed) for each in replies):
                        break
                    await asyncio.sleep(0.02)
            assert [each.value for each in replies] == list(range(60))
            assert await one(store, DeletePattern("k*")) is not None
            assert await one(store, Delete("k1")) is not None


async def test_a_cluster_whose_servers_are_all_gone_says_so_in_time() -> None:
    with run_redis_cluster() as servers:
        async with guarded(f"{url_of(servers)}?connect_timeout=0.3") as cache:
            await cache.set("a", 1)
            for server in servers:
                await sync(server.kill)
            started = time.monotonic()
            results = await asyncio.gather(*(cache.get(f"k{n}") for n in range(50)), return_exceptions=True)
            assert time.monotonic() - started < within(1.0)
            assert all(isinstance(each, CacheError) for each in results)
