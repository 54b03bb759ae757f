from __future__ import annotations

from typing import Any

import anyio
import pytest

from cachebus.adapters.redis.connection import RedisConnection
from cachebus.messages import (
    Add,
    BadMessage,
    CacheSerializationError,
    Clear,
    Cleared,
    CompareAndSet,
    Delete,
    Deleted,
    DeleteMany,
    DeletePattern,
    Exists,
    Failed,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Incremented,
    Missing,
    NotStored,
    Present,
    Scan,
    Set,
    SetMany,
    Stored,
    StoredMany,
    Touch,
    WrongType,
)
from cachebus.testing.servers import Server, redis_command

from ...clock import ManualClock
from .conftest import one, opened


async def test_a_value_comes_back_with_its_version_and_its_time(store: Any) -> None:
    stored = await one(store, Set("a", b"1", ttl=50.0))
    found = await one(store, Get("a"))
    assert isinstance(stored, Stored)
    assert found.value == b"1"
    assert found.version == stored.version > 1e15
    assert found.ttl == pytest.approx(50.0, abs=5.0)
    assert found.stored_at == pytest.approx(found.version / 1e6)


async def test_a_missing_key_is_missing_for_every_verb_that_reads(store: Any) -> None:
    replies = await store.execute([Get("a"), Exists("a"), Touch("a"), GetMany(("a", "b"))])
    assert replies == [Missing(), Missing(), Missing(), FoundMany({})]


async def test_a_version_grows_with_every_write_of_one_batch(store: Any) -> None:
    replies = await store.execute([Set("a", number) for number in range(300)])
    versions = [reply.version for reply in replies]
    assert versions == sorted(set(versions))
    assert (await one(store, Get("a"))).value == 299


@pytest.mark.parametrize("only_if", ["absent", "present"])
async def test_a_condition_decides_whether_a_set_is_stored(store: Any, only_if: Any) -> None:
    first, second = await store.execute([Set("a", 1, only_if=only_if), Set("a", 2, only_if=only_if)])
    if only_if == "absent":
        assert isinstance(first, Stored)
        assert second == NotStored(first.version)
    else:
        assert (first, second) == (NotStored(), NotStored())


async def test_add_stores_once(store: Any) -> None:
    first, second = await store.execute([Add("a", 1), Add("a", 2)])
    assert isinstance(first, Stored)
    assert second == NotStored(first.version)


async def test_compare_and_set_wants_the_version_that_is_there(store: Any) -> None:
    assert await one(store, CompareAndSet("a", 1, version=0.0)) == NotStored(0.0)
    first = await one(store, Set("a", 1))
    second = await one(store, CompareAndSet("a", 2, version=first.version))
    assert second.version > first.version
    assert await one(store, CompareAndSet("a", 3, version=first.version)) == NotStored(second.version)
    assert (await one(store, Get("a"))).value == 2


async def test_several_are_set_and_read_in_one_request(store: Any) -> None:
    items = {f"k{number}": number for number in range(50)}
    assert await one(store, SetMany(items, ttl=9.0)) == StoredMany(50)
    reply = await one(store, GetMany((*items, "none", "k1")))
    assert {key: found.value for key, found in reply.entries.items()} == items
    assert await store.execute([SetMany({}), GetMany(())]) == [StoredMany(0), FoundMany({})]


async def test_set_many_with_one_unfit_value_stores_nothing(store: Any) -> None:
    assert isinstance(await one(store, SetMany({"a": 1, "b": object()})), Failed)
    assert await one(store, Get("a")) == Missing()


async def test_exists_tells_version_and_ttl(store: Any) -> None:
    stored, forever = await store.execute([Set("a", 1, ttl=30.0), Set("b", 1, ttl=None)])
    here, there = await store.execute([Exists("a"), Exists("b")])
    assert here.version == stored.version
    assert here.ttl == pytest.approx(30.0, abs=5.0)
    assert there == Present(forever.version, None)


async def test_touch_changes_the_expiry_of_reads_and_of_the_server(store: Any, server: Server) -> None:
    await one(store, Set("a", 1, ttl=3.0))
    assert (await one(store, Touch("a", ttl=60.0))).ttl == 60.0
    assert (await one(store, Get("a"))).ttl == pytest.approx(60.0, abs=5.0)
    assert int((await anyio.to_thread.run_sync(redis_command, server, "PTTL", "tests:a")).strip(b":\r\n")) > 50_000
    assert (await one(store, Touch("a", ttl=None))).ttl is None
    assert (await one(store, Get("a"))).ttl is None
    assert await anyio.to_thread.run_sync(redis_command, server, "PTTL", "tests:a") == b":-1\r\n"


async def test_a_counter_starts_counts_and_is_an_int(store: Any) -> None:
    assert await one(store, Increment("n")) == Incremented(1)
    assert await one(store, Increment("n", delta=-5)) == Incremented(-4)
    assert (await one(store, Get("n"))).value == -4
    assert await one(store, Increment("m", delta=2, initial=10)) == Incremented(12)
    assert await one(store, Increment("x", initial=None)) == Missing()
    await one(store, Set("s", 7))
    assert await one(store, Increment("s")) == Incremented(8)


async def test_a_counter_keeps_its_time_to_live_and_gets_a_new_version(store: Any, server: Server) -> None:
    await one(store, Increment("n", ttl=40.0))
    before = await one(store, Get("n"))
    await one(store, Increment("n", ttl=1000.0))
    after = await one(store, Get("n"))
    assert after.version > before.version
    assert after.ttl == pytest.approx(40.0, abs=5.0)
    assert 0 < int((await anyio.to_thread.run_sync(redis_command, server, "PTTL", "tests:n")).strip(b":\r\n")) <= 40_000


async def test_a_counter_is_exact_to_64_bits_and_goes_no_further(store: Any) -> None:
    top = 2**63 - 1
    assert await one(store, Increment("n", delta=top - 1)) == Incremented(top - 1)
    assert await one(store, Increment("n")) == Incremented(top)
    for request in (Increment("n"), Increment("n", delta=2**70), Increment("other", delta=2**63)):
        assert isinstance((await one(store, request)).error(), WrongType)
    assert (await one(store, Get("n"))).value == top


@pytest.mark.parametrize("value", ["1", b"1", 1.5, True, None, [1]])
async def test_what_is_no_int_cannot_be_incremented(store: Any, value: Any) -> None:
    await one(store, Set("a", value))
    assert isinstance((await one(store, Increment("a"))).error(), WrongType)
    assert (await one(store, Get("a"))).value == value


async def test_deleting_says_how_many_there_were(store: Any) -> None:
    await one(store, SetMany({"a": 1, "b": 2, "c": 3}))
    assert await store.execute([Delete("a"), Delete("a"), DeleteMany(("b", "c", "d", "b"))]) == [
        Deleted(1),
        Deleted(0),
        Deleted(2),
    ]
    assert await one(store, DeleteMany(())) == Deleted(0)


async def test_a_batch_is_carried_out_in_its_order(store: Any) -> None:
    replies = await store.execute(
        [Set("a", 1), Get("a"), Delete("a"), Get("a"), Increment("a"), Get("a"), SetMany({"a": "z"}), GetMany(("a",))]
    )
    assert replies[1].value == 1
    assert replies[2:5] == [Deleted(1), Missing(), Incremented(1)]
    assert replies[5].value == 1
    assert replies[7].entries["a"].value == "z"


async def test_patterns_match_as_they_do_everywhere(store: Any) -> None:
    keys = ["user:1", "user:22", "user:é", "user:*", "order:1", "[x]"]
    await one(store, SetMany(dict.fromkeys(keys, 1)))

    async def matching(pattern: str) -> set[str]:
        found: set[str] = set()
        cursor = ""
        while True:
            page = await one(store, Scan(pattern, cursor))
            found.update(page.keys)
            if not (cursor := page.cursor):
                return found

    assert await matching("*") == set(keys)
    assert await matching("user:?") == {"user:1", "user:é", "user:*"}
    assert await matching(r"user:\*") == {"user:*"}
    assert await matching("user:[12]*") == {"user:1", "user:22"}
    assert await matching("[^u]*") == {"order:1", "[x]"}
    assert await matching("[x]") == set()
    assert await one(store, DeletePattern("user:?")) == Deleted(3)
    assert await matching("*") == {"user:22", "order:1", "[x]"}


async def test_a_scan_has_pages(store: Any) -> None:
    await one(store, SetMany({f"k{number}": 1 for number in range(3000)}))
    page = await one(store, Scan())
    assert page.cursor
    assert 0 < len(page.keys) < 3000
    assert isinstance((await one(store, Scan("*", "nonsense"))).error(), BadMessage)


async def test_clear_and_patterns_stay_in_their_namespace(server: Server) -> None:
    async with opened(server.url, namespace="a-b") as ours, opened(server.url, namespace="a") as theirs:
        await one(theirs, SetMany({"x": 1, "-b:x": 2, "b:y": 3}))
        await one(ours, SetMany({"x": 1, "a:x": 2}))
        assert await one(ours, DeletePattern("*a:*")) == Deleted(1)
        assert await one(ours, Clear()) == Cleared()
        assert await one(ours, Get("x")) == Missing()
        assert len((await one(theirs, GetMany(("x", "-b:x", "b:y")))).entries) == 3
        assert await one(theirs, Clear()) == Cleared()


async def test_sub_second_times_to_live_are_kept(store: Any) -> None:
    await store.execute([Set("a", 1, ttl=0.05), SetMany({"b": 1}, ttl=0.05), Increment("n", ttl=0.05), Set("c", 1)])
    assert len((await one(store, GetMany(("a", "b", "n")))).entries) == 3
    assert 0 < (await one(store, Get("a"))).ttl <= 0.06
    await anyio.sleep(0.07)
    assert list((await one(store, GetMany(("a", "b", "n", "c")))).entries) == ["c"]


@pytest.mark.parametrize("ttl", [0.0001, 40 * 86400.0, 1e12, 1e300])
async def test_a_time_to_live_of_any_size_is_taken(store: Any, ttl: float) -> None:
    assert isinstance(await one(store, Set("a", 1, ttl=ttl)), Stored)


async def test_the_default_time_to_live_is_the_settings(server: Server) -> None:
    async with opened(f"{server.url}?default_ttl=70") as store:
        await store.execute([Set("a", 1), Set("b", 1, ttl=None), Increment("c")])
        found = (await one(store, GetMany(("a", "b", "c")))).entries
        assert found["a"].ttl == pytest.approx(70.0, abs=5.0)
        assert found["b"].ttl is None
        assert found["c"].ttl == pytest.approx(70.0, abs=5.0)


async def test_what_somebody_else_wrote_is_an_error_and_can_be_overwritten(store: Any, server: Server) -> None:
    for words in (("SET", "tests:a", "foreign and long enough"), ("SET", "tests:b", "x"), ("RPUSH", "tests:c", "1")):
        await anyio.to_thread.run_sync(redis_command, server, *words)
    a, b, c = await store.execute([Get("a"), Get("b"), Get("c")])
    assert isinstance(a.error(), CacheSerializationError)
    assert isinstance(b.error(), CacheSerializationError)
    assert c == Missing()
    assert isinstance((await one(store, Touch("a"))).error(), WrongType)
    assert isinstance((await one(store, Increment("c"))).error(), WrongType)
    assert await one(store, Add("c", 1)) == NotStored(0.0)
    assert all(isinstance(reply, Stored) for reply in await store.execute([Set("a", 1), Set("b", 1), Set("c", 1)]))
    assert (await one(store, Get("c"))).value == 1


async def test_a_found_many_reports_a_damaged_value(store: Any, server: Server) -> None:
    await anyio.to_thread.run_sync(redis_command, server, "SET", "tests:a", "foreign")
    assert isinstance((await one(store, GetMany(("a", "b")))).error(), CacheSerializationError)


def test_the_servers_clock_is_never_taken_to_be_behind_what_it_is() -> None:
    clock: Any = ManualClock()
    connection = RedisConnection("here", clock, window=1, health_interval=None)

    def time_reply(server: float, seconds: float) -> None:
        """Process a reply with the time `server` that took `seconds`."""
        asked_at = clock.monotonic()
        clock.advance(seconds)
        connection.set_time((b"%d" % server, b"%d" % round(server % 1 * 1e6)), asked_at)

    time_reply(1000.0, 0.5)
    assert connection.now() == pytest.approx(1000.5), "the server may have read its clock at once"
    time_reply(1000.3, 0.01)
    assert connection.now() == pytest.approx(1000.31), "a faster reply is more accurate"
    time_reply(1000.35, 0.5)
    assert connection.now() == pytest.approx(1000.81), "a slower reply changes nothing"
    time_reply(2000.0, 0.1)
    assert connection.now() == pytest.approx(2000.1), "the clock was set"
    time_reply(500.0, 0.1)
    assert connection.now() == pytest.approx(500.1)
