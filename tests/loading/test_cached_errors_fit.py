"""Exceptions that can be cached, and code that is never run to restore them."""

from __future__ import annotations

import base64
from typing import Any
from uuid import uuid4

import anyio
import pytest
import redis
from anyio import to_thread
from hypothesis import given
from hypothesis import strategies as st

from cachebus import Settings, open_cache
from cachebus.adapters.null import NullStore
from cachebus.messages import PayloadRejected
from cachebus.payload.cached_errors import CachedError
from cachebus.testing.servers import Server, redis_server

from ..facade.faces import a_cache, heard
from .failing import KEPT, Failing, NotFound, raised

__all__ = ["redis_server"]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Secretive(NotFound):
    __slots__ = ("hidden",)

    def __init__(self, hidden: str) -> None:
        Exception.__init__(self)
        self.hidden = hidden

    def __str__(self) -> str:
        return self.hidden


class WithResponse(NotFound):
    def __init__(self) -> None:
        super().__init__(1)
        self.response = object()


@pytest.mark.parametrize(
    "error", [WithResponse(), Secretive("x"), LookupError(float("nan")), LookupError((1, 2)), LookupError(b"raw")]
)
async def test_what_would_not_come_back_as_it_was_is_not_kept_and_the_log_says_so(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_cache() as cache:
        load = Failing(error)
        for _ in range(2):
            assert await raised(cache, load, cache_errors=LookupError, error_ttl=60) is error
        assert load.calls == 2
    assert f"{type(error).__name__} is not cached" in caplog.text


async def test_a_store_that_keeps_nothing_keeps_no_exceptions() -> None:
    async with open_cache(Settings(), stores=lambda _: NullStore()) as cache:
        load = Failing()
        for _ in range(2):
            await raised(cache, load, **KEPT)
            await anyio.wait_all_tasks_blocked()  # Without leases, callers may join a load until it has ended.
        assert load.calls == 2


async def test_a_sealed_exception_belongs_to_its_key_and_shows_nothing(redis_server: Server) -> None:
    keys = {"one": f"base64:{base64.b64encode(bytes(32)).decode()}"}
    namespace = f"t{uuid4().hex}"

    def move() -> bytes:
        with redis.Redis(host=redis_server.host, port=redis_server.port) as client:
            stored: Any = client.get(f"{namespace}:k")
            client.set(f"{namespace}:j", stored)
            return bytes(stored)

    async with open_cache(redis_server.url, namespace=namespace, payload={"encryption_keys": keys}) as cache:
        load = Failing()
        await raised(cache, load, **KEPT)
        assert b"row" not in await to_thread.run_sync(move)
        with cache.events(PayloadRejected) as events:
            await raised(cache, load, "j", **KEPT)
            assert [each.reason for each in heard(events) if isinstance(each, PayloadRejected)][:1] == ["seal"]
        assert load.calls == 2


class Tripwire(Exception):
    made = 0

    def __init__(self, *arguments: Any) -> None:
        Tripwire.made += 1


def test_no_constructor_is_run_and_no_class_is_looked_for_elsewhere() -> None:
    record = CachedError(
        b'{"kind":"tests.loading.test_cached_errors_fit.Tripwire","args":["a"],"state":{"b":[1,{"c":null}]}}'
    )
    error: Any = record.rebuilt((Tripwire,))
    assert (type(error), error.args, error.b, Tripwire.made) == (Tripwire, ("a",), [1, {"c": None}], 0)
    assert record.rebuilt((NotFound,)) is None
    assert CachedError(b'{"kind":"os.system","args":["true"],"state":{}}').rebuilt((OSError,)) is None
    assert CachedError(b'{"kind":"builtins.SystemExit","args":[],"state":{}}').rebuilt((Exception,)) is None


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.binary())
def test_any_bytes_are_an_exception_or_none(content: bytes) -> None:
    assert CachedError(content).rebuilt((Exception,)) is None


@given(st.lists(json_like, max_size=4), st.dictionaries(st.text(), json_like, max_size=3))
def test_what_is_kept_comes_back_as_it_was(arguments: list[Any], state: dict[str, Any]) -> None:
    error = LookupError(*arguments)
    vars(error).update(state)
    record = CachedError.of(error)
    again = None if record is None else record.rebuilt((LookupError,))
    if again is not None:
        assert type(again) is LookupError
        assert repr(again.args) == repr(error.args)
        assert repr(vars(again)) == repr(state)
    else:
        assert any(word in repr((arguments, state)) for word in ("nan", "inf"))
