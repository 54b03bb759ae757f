"""Payloads behind both facades, over a memory store that holds bytes and over a real Redis."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from pydantic import BaseModel
from typing_extensions import TypedDict

from cachebus import (
    CacheCapacityError,
    CacheConfigurationError,
    CacheSerializationError,
    CapabilityError,
    Missing,
    SyncCache,
    open_cache,
    open_sync_cache,
)
from cachebus.adapters.memory.store import MemoryStore
from cachebus.client.background_loop import run
from cachebus.messages import CacheHit, CacheSet, Found, Get, PayloadRejected, PayloadSealed, Set
from cachebus.testing.servers import run_redis

from ..facade.faces import awaited, heard
from .pipelines import EXAMPLE, MASTER_KEY, SIGNING_KEY, VALUES, pipeline, same

SEALED = {"encryption_keys": {"k1": MASTER_KEY}, "tenant": "shop"}
PAYLOADS: dict[str, dict[str, Any]] = {
    "msgpack": {"serializer": "msgpack"},
    "json": {"serializer": "json", "compression": "zstd", "threshold": 0},
    "auto": {"serializer": "auto", "checksum": True},
    "pickle": {"serializer": "pickle", "signing_keys": [SIGNING_KEY]},
    "sealed": {**SEALED},
    "in a thread": {"serializer": "msgpack", "compression": "zlib", "threshold": 0, "offload_above": 1},
}


def received(events: Any) -> list[Any]:
    """Return the events received so far, as `Any` because their fields differ."""
    return list(heard(events))


class Shelf:
    """Store over which caches with different settings are opened, one after the other."""

    def __init__(self) -> None:
        self.store = Kept()

    def raw(self, key: str) -> Any:
        reply = self.store.get(Get(key))
        return reply.value if isinstance(reply, Found) else None

    def put(self, key: str, value: Any) -> None:
        self.store.set(Set(key, value))


class Kept(MemoryStore):
    """Store that outlives its actor."""

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with run_redis() as server:
        yield server.url


class Caches:
    """Opens caches over one store, with one of the two facades."""

    def __init__(self, shelf: Shelf, face: str) -> None:
        self.shelf = shelf
        self.face = face
        self._opened: list[Any] = []

    async def __call__(self, **payload: Any) -> Any:
        opened = open_cache if self.face == "async" else open_sync_cache
        cache: Any = opened({"payload": payload}, stores=lambda _: self.shelf.store)
        self._opened.append(cache)
        return await cache.__aenter__() if self.face == "async" else awaited(cache.__enter__())

    async def close(self) -> None:
        for each in self._opened:
            await each.close() if self.face == "async" else each.close()


def on_both_faces(test: Any) -> Any:
    """Run a test over `Cache`, on both event loops, and over `SyncCache`, without one."""

    async def behave(face: str, arguments: Any) -> None:
        caches = Caches(arguments["shelf"], face)
        try:
            await test(**{**arguments, "caches": caches})
        finally:
            await caches.close()

    @functools.wraps(test)
    async def over_cache(**arguments: Any) -> None:
        await behave("async", arguments)

    @functools.wraps(test)
    def over_sync_cache(**arguments: Any) -> None:
        run(behave("sync", arguments))

    sys._getframe(1).f_globals[f"{test.__name__}_over_sync_cache"] = over_sync_cache
    return over_cache


@pytest.fixture
def caches() -> None:
    """Parameter that `on_both_faces` sets."""


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@on_both_faces
@pytest.mark.parametrize("name", PAYLOADS)
async def test_every_way_to_store_and_to_read_goes_through_payloads(name: str, shelf: Shelf, caches: Any) -> None:
    cache = await caches(**PAYLOADS[name])
    assert await cache.set("set", EXAMPLE)
    assert await cache.add("add", EXAMPLE)
    await cache.set_many({"many": EXAMPLE, "none": None})
    found = await cache.lookup("set")
    assert isinstance(found, Found)
    assert await cache.compare_and_set("set", [1, (2,)], version=found.version)
    assert not await cache.compare_and_set("set", 3, version=found.version)
    for key in ("set", "add", "many", "none"):
        assert type(shelf.raw(key)) is bytes, key
        assert shelf.raw(key)[0] == 1
    assert await cache.get("set") == [1, (2,)]
    assert same(found.value, EXAMPLE)
    assert same(await cache.get("add"), EXAMPLE)
    many = await cache.get_many(["many", "none", "missing"])
    assert same(many["many"], EXAMPLE)
    assert many["none"] is None
    assert len(many) == 2
    assert not await cache.add("add", 1)
    assert not await cache.set("add", 1, only_if="absent")
    assert await cache.get("missing", 5) == 5


@on_both_faces
async def test_the_decorator_goes_through_payloads(shelf: Shelf, caches: Any) -> None:
    cache = await caches(serializer="msgpack")
    calls = []

    def load(number: int) -> Any:
        calls.append(number)
        return (number, {"at": dt.date(2024, 1, 1)})

    async def load_async(number: int) -> Any:
        return load(number)

    if caches.face == "async":
        call = cache.cached(key="load:{number}")(load_async)
        got = [await call(1), await call(1)]
    else:
        plain = cache.cached(key="load:{number}")(load)
        got = [plain(1), plain(1)]
    assert got == [(1, {"at": dt.date(2024, 1, 1)})] * 2
    assert calls == [1]
    assert type(shelf.raw("load:1")) is bytes


@on_both_faces
async def test_integers_stay_integers_so_that_increment_works(shelf: Shelf, caches: Any) -> None:
    cache = await caches(serializer="msgpack")
    await cache.set("n", 41)
    assert await cache.increment("n") == 42
    assert (shelf.raw("n"), await cache.get("n")) == (42, 42)
    for value in (True, 2**63, -(2**63) - 1, 1.0):
        await cache.set("other", value)
        assert type(shelf.raw("other")) is bytes
        assert same(await cache.get("other"), value)


@on_both_faces
async def test_sealed_numbers_are_sealed_and_cannot_be_counted(shelf: Shelf, caches: Any) -> None:
    cache = await caches(**SEALED)
    await cache.set("n", 41)
    assert type(shelf.raw("n")) is bytes
    assert await cache.get("n") == 41
    with pytest.raises(CapabilityError, match="sealed"):
        await cache.increment("n")


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another serializer": ({"serializer": "json"}, {"serializer": "msgpack"}, "serializer"),
    "plain where sealed is demanded": ({"serializer": "msgpack"}, SEALED, "protection"),
    "a number where sealed is demanded": ({"serializer": "none"}, SEALED, "format"),
    "sealed where plain is expected": (SEALED, {"serializer": "msgpack"}, "protection"),
    "another tenant": ({**SEALED, "tenant": "other"}, SEALED, "seal"),
    "another master key": ({"encryption_keys": {"k1": SIGNING_KEY}, "tenant": "shop"}, SEALED, "seal"),
    "another signing key": (
        {"serializer": "pickle", "signing_keys": [MASTER_KEY]},
        {"serializer": "pickle", "signing_keys": [SIGNING_KEY]},
        "signature",
    ),
    "an object of a cache without payloads": ({"serializer": "none"}, {"serializer": "msgpack"}, "format"),
    "no checksum": ({"serializer": "msgpack"}, {"serializer": "msgpack", "checksum": True}, "protection"),
    "too large": ({"serializer": "msgpack"}, {"serializer": "msgpack", "max_size": 2}, "capacity"),
}


@on_both_faces
@pytest.mark.parametrize("name", WRONG)
async def test_a_payload_that_does_not_fit_is_a_miss_an_event_and_a_count(shelf: Shelf, name: str, caches: Any) -> None:
    writing, reading, reason = WRONG[name]
    await (await caches(**writing)).set("k", 5 if "number" in name else [1, 2, 3])
    cache = await caches(**reading)
    with _listening(cache) as events:
        assert await cache.get("k", "miss") == "miss"
        assert isinstance(await cache.lookup("k"), Missing)
        assert await cache.get_many(["k"]) == {}
        assert [(each.key, each.reason) for each in received(events)] == [("k", reason)] * 3
    assert (await cache.statistics()).payload["rejected"] == 3
    # Both add and set replace it.
    assert await cache.add("k", "a")
    assert await cache.get("k") == "a"


@on_both_faces
@pytest.mark.parametrize("how", ["set", "set_many", "only_if absent", "only_if present"])
async def test_what_is_written_next_takes_the_place_of_a_payload_that_does_not_fit(
    how: str, shelf: Shelf, caches: Any
) -> None:
    cache = await caches(serializer="msgpack")
    shelf.put("k", b"\x01m-\x00\xc1 damaged")
    assert await cache.get("k") is None
    if how == "set_many":
        await cache.set_many({"k": "new"})
    else:
        assert await cache.set("k", "new", only_if=how.partition(" ")[2] or None)
    assert await cache.get("k") == "new"


@on_both_faces
async def test_a_value_that_cannot_be_written_leaves_the_old_one(shelf: Shelf, caches: Any) -> None:
    cache = await caches(serializer="msgpack", max_size=100)
    await cache.set("k", "old")
    with pytest.raises(CacheSerializationError):
        await cache.set("k", object())
    with pytest.raises(CacheSerializationError):
        await cache.set_many({"k": "new", "l": object()})
    with pytest.raises(CacheCapacityError):
        await cache.add("m", b"x" * 200)
    assert await cache.get_many(["k", "l", "m"]) == {"k": "old"}


@on_both_faces
async def test_a_value_moved_to_another_key_is_a_miss(shelf: Shelf, caches: Any) -> None:
    for payload in (SEALED, {"serializer": "pickle", "signing_keys": [SIGNING_KEY]}):
        cache = await caches(**payload)
        await cache.set("mine", "secret")
        shelf.put("yours", shelf.raw("mine"))
        assert await cache.get("yours") is None
        assert await cache.get("mine") == "secret"


@on_both_faces
async def test_rotation_loses_nothing(shelf: Shelf, caches: Any) -> None:
    cache = await caches(**SEALED)
    await cache.set("old", 1)
    cache.payloads.rotate_key(bytes(32), "k2")
    await cache.set("new", 2)
    assert await cache.get_many(["old", "new"]) == {"old": 1, "new": 2}
    # One process with both keys, and one with only the new key.
    both = await caches(encryption_keys={"k2": bytes(32), "k1": MASTER_KEY}, tenant="shop")
    assert await both.get_many(["old", "new"]) == {"old": 1, "new": 2}
    late = await caches(encryption_keys={"k2": bytes(32)}, tenant="shop")
    assert await late.get_many(["old", "new"]) == {"new": 2}


@on_both_faces
async def test_sealing_is_audited_without_the_content(shelf: Shelf, caches: Any) -> None:
    cache = await caches(**SEALED)
    with _listening(cache, PayloadSealed) as events:
        await cache.set("k", "the content")
        (sealed,) = received(events)
    assert (sealed.key, sealed.key_id, sealed.tenant) == ("k", "k1", "shop")
    assert "content" not in repr(sealed)


@on_both_faces
async def test_statistics_say_what_compression_saved(shelf: Shelf, caches: Any) -> None:
    cache = await caches(serializer="msgpack", compression="zstd", threshold=100)
    await cache.set_many({"large": "x" * 1000, "small": "x"})
    counted = (await cache.statistics()).payload
    assert (counted["written"], counted["compressed"]) == (2, 1)
    assert counted["ratio"] > 10
    assert counted["bytes_saved"] > 900


@on_both_faces
async def test_options_of_compression_are_read(shelf: Shelf, caches: Any) -> None:
    sizes = {}
    for level in (1, 9):
        cache = await caches(serializer="msgpack", compression="zlib", level=level, threshold=0)
        await cache.set("k", [number * 7 % 1000 for number in range(3000)])
        sizes[level] = len(shelf.raw("k"))
    assert sizes[9] < sizes[1]
    cache = await caches(serializer="msgpack", compression="zlib", threshold=10_000)
    await cache.set("k", "x" * 5000)
    assert len(shelf.raw("k")) > 5000


def _listening(cache: Any, *kinds: Any) -> Any:
    return _Listening(cache.events(*(kinds or (PayloadRejected,))))


class _Listening:
    """Subscribe with either facade. Closing differs between them, so the cache closes the subscription."""

    def __init__(self, subscription: Any) -> None:
        self.subscription = subscription

    def __enter__(self) -> Any:
        return self.subscription.__enter__() if hasattr(self.subscription, "__enter__") else self.subscription

    def __exit__(self, *_: object) -> None:
        self.subscription.close()


@dataclasses.dataclass
class Address:
    street: str
    number: int


class Person(BaseModel):
    name: str
    addresses: list[Address] = []


class Entry(TypedDict):
    a: int


@on_both_faces
@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ({"street": "s", "number": 1}, Address, Address("s", 1)),
        (
            {"name": "n", "addresses": [{"street": "s", "number": 1}]},
            Person,
            Person(name="n", addresses=[Address("s", 1)]),
        ),
        ([1, 2], tuple[int, ...], (1, 2)),
        ({"a": 1}, Entry, {"a": 1}),
        (None, int | None, None),
        (dt.date(2024, 1, 1), dt.date, dt.date(2024, 1, 1)),
    ],
)
async def test_a_value_that_fits_is_converted(shelf: Shelf, value: Any, kind: Any, expected: Any, caches: Any) -> None:
    cache = await caches(serializer="msgpack")
    await cache.set("k", value)
    got = await cache.get_typed("k", kind, "default")
    assert got == expected
    assert type(got) is type(expected)


@on_both_faces
async def test_one_that_does_not_is_a_miss_and_an_event_or_an_error(shelf: Shelf, caches: Any) -> None:
    for payload in ({"serializer": "msgpack"}, {}):
        cache = await caches(**payload)
        await cache.set("k", {"street": "secret", "number": "x"})
        with _listening(cache) as events:
            assert await cache.get_typed("k", Address, "default") == "default"
            assert [(each.key, each.reason) for each in received(events)] == [("k", "type")]
        with pytest.raises(CacheSerializationError, match="not a valid Address; invalid: number") as refused:
            await cache.get_typed("k", Address, strict=True)
        assert "secret" not in repr(refused.value)
        assert await cache.get_typed("missing", Address, "default", strict=True) == "default"


def test_a_memory_cache_keeps_objects_unless_keys_forbid_it() -> None:
    value = object()
    with open_sync_cache("memory://", payload={"compression": "zstd", "checksum": True}) as cache:
        cache.set("k", value)
        assert cache.get("k") is value
        assert cache.payloads is None
        assert cache.statistics().payload == {}
    with (
        open_sync_cache("memory://", payload={"signing_keys": [SIGNING_KEY]}) as cache,
        pytest.raises(CacheSerializationError),
    ):
        cache.set("k", value)


def test_objects_are_for_the_memory_backend() -> None:
    with pytest.raises(CacheConfigurationError, match=r"payload\.serializer: none requires the memory backend"):
        open_sync_cache("redis://localhost:1", payload={"serializer": "none"})


def test_classes_are_named_in_the_settings() -> None:
    named = "tests.payload.pipelines:Point"
    with open_sync_cache("memory://", payload={"serializer": "auto", "types": [named]}) as cache:
        assert repr(cache.payloads) == "<PayloadPipeline auto for 'default'>"
    with pytest.raises(CacheConfigurationError, match=r"cannot import the class 'no\.such:Class'"):
        open_sync_cache("memory://", payload={"serializer": "auto", "types": ["no.such:Class"]}).get("k")


def test_events_carry_no_keys_where_these_are_redacted() -> None:
    with open_sync_cache("memory://", events={"keys": "none"}) as cache, cache.events(CacheSet, CacheHit) as events:
        cache.set("secret", 1)
        cache.get("secret")
        seen = received(events)
        assert [each.key for each in seen] == ["", ""]
        assert "secret" not in repr(seen)


def test_the_log_names_keys_only_in_debugging(caplog: pytest.LogCaptureFixture) -> None:
    for debug in (False, True):
        caplog.clear()
        with open_sync_cache("memory://", payload={"serializer": "msgpack"}, debug=debug) as cache:
            cache.client.bus.request_blocking(cache.client.address, Set("the key", b"no payload"), 1)
            assert cache.get("the key") is None
        assert "rejected a payload (format)" in caplog.text
        assert ("the key" in caplog.text) == debug


@pytest.mark.parametrize("name", PAYLOADS)
def test_over_redis(name: str, redis_url: str) -> None:
    with open_sync_cache(redis_url, namespace=f"payload-{name.replace(' ', '-')}", payload=PAYLOADS[name]) as cache:
        assert cache.set("k", EXAMPLE)
        assert same(cache.get("k"), EXAMPLE)
        assert not cache.add("k", 1)
        cache.set_many({"a": (1,), "b": {2}})
        assert same(cache.get_many(["a", "b"]), {"a": (1,), "b": {2}})
        cache.clear()


@given(VALUES)
@settings(max_examples=60)
def test_any_value_comes_back_over_redis(redis_caches: dict[str, SyncCache], value: Any) -> None:
    for cache in redis_caches.values():
        cache.set("any", value)
        assert same(cache.get("any"), value)
        cache.set_many({"many": value})
        assert same(cache.get_many(["many"])["many"], value)


@pytest.fixture(scope="module")
def redis_caches(redis_url: str) -> Iterator[dict[str, SyncCache]]:
    made = {
        name: open_sync_cache(redis_url, namespace=f"any-{place}", payload=options)
        for place, (name, options) in enumerate(PAYLOADS.items())
    }
    yield made
    for cache in made.values():
        cache.close()


def test_what_redis_itself_cannot_read_is_a_miss_and_replaced(redis_url: str) -> None:
    with open_sync_cache(redis_url, namespace="payload-damaged") as cache:
        cache.set_many({"k": [1], "good": [2]})
        raw_set(redis_url, "payload-damaged", b"no header")
        assert cache.get("k") is None
        assert cache.get_many(["k", "good"]) == {"good": [2]}
        assert cache.add("k", "new")
        assert cache.get("k") == "new"
        cache.clear()


def raw_set(url: str, namespace: str, value: bytes) -> None:
    """Overwrite the key `k` of a namespace without the cache."""
    import redis

    with redis.Redis.from_url(url) as client:
        (key,) = [each for each in client.scan_iter(match=b"*" + namespace.encode() + b"*") if each.endswith(b"k")]
        client.set(key, value)


async def test_large_payloads_are_packed_and_unpacked_beside_the_event_loop(anyio_backend: str) -> None:
    small = "x" * 10
    for offload_above, offloaded in ((1000, True), (None, False)):
        payload = {"serializer": "msgpack", "compression": "zlib", "offload_above": offload_above}
        async with open_cache("memory://", payload=payload, actors={"inline_turns": False}) as cache:
            threads: list[tuple[str, bool]] = []
            made: Any = cache.payloads

            def spy(name: str, work: Any, threads: list[tuple[str, bool]] = threads) -> Any:
                def watched(*arguments: Any) -> Any:
                    threads.append((name, threading.current_thread() is not threading.main_thread()))
                    return work(*arguments)

                return watched

            made.protect, made.decode = spy("pack", made.protect), spy("unpack", made.decode)
            await cache.set("k", random_text(20_000))
            await cache.add("l", random_text(20_000))
            assert len(await cache.get("k")) == 20_000
            assert threads == [("pack", offloaded), ("pack", offloaded), ("unpack", offloaded)]
            threads.clear()
            await cache.set("k", small)
            assert await cache.get("k") == small
            assert threads == [("pack", False), ("unpack", False)]


def random_text(size: int) -> str:
    """Return text that does not compress well."""
    return os.urandom(size // 2).hex()


@pytest.mark.parametrize(
    ("module", "payload", "extra"),
    [
        ("orjson", {"serializer": "json"}, "json"),
        ("pyarrow", {"serializer": "arrow"}, "arrow"),
        ("lz4.frame", {"serializer": "msgpack", "compression": "lz4"}, "lz4"),
        ("zstandard", {"serializer": "msgpack", "compression": "zstd"}, "zstd"),
        ("xxhash", {"serializer": "msgpack", "checksum": True}, "checksum"),
        ("cryptography.hazmat.primitives.ciphers.aead", SEALED, "crypto"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(
    module: str, payload: dict[str, Any], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    cache = open_sync_cache("memory://", payload=payload)
    with pytest.raises(CacheConfigurationError, match=rf"requires .*: pip install 'cachebus\[{extra}\]'"):
        cache.get("k")
    cache.close()


def test_what_only_a_missing_library_could_unpack_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = pipeline(compression="lz4", threshold=0).encode("k", "x" * 1000)
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    with pytest.raises(CacheSerializationError) as refused:
        pipeline().decode("k", payload)
    assert refused.value.reason == "compression"
