"""What every part of the suite stands on: the fixtures, the one way to ask any store, and the passing of time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar, cast

import anyio
import pytest

from cachebus.actors.ports import BatchStore, InlineStore
from cachebus.messages import (
    CacheError,
    CapabilityError,
    Exists,
    Failed,
    Found,
    Get,
    GetOrLease,
    LeaseGranted,
    Missing,
    Reply,
    Request,
    Scan,
)

AnyStore = InlineStore | BatchStore
R = TypeVar("R")

VANISHING_LIMIT = 30.0
"""Seconds after which a value that should have expired counts as one that never will."""


async def carry_out(store: AnyStore, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
    """The replies of a store to a batch, as its actor would give them: what a store raises is everybody's `Failed`."""
    if isinstance(store, InlineStore):
        return [_run(store, request) for request in batch]
    try:
        return await store.execute(batch)
    except CacheError as error:
        return [Failed.of(error)] * len(batch)


def _run(store: InlineStore, request: Request[Any]) -> Reply:
    verb = store.verb(type(request))
    try:
        if verb is None:
            raise CapabilityError(store=store.name, capability=type(request).__name__)
        return verb(request)
    except CacheError as error:
        return Failed.of(error)


async def ask(store: AnyStore, request: Request[R]) -> R:
    """The reply to one request. A `Failed` is raised as its error."""
    (reply,) = await carry_out(store, [request])
    if isinstance(reply, Failed):
        raise reply.error()
    return cast("R", reply)


async def granted(store: AnyStore, request: GetOrLease) -> str:
    """The name of a lease that is asked for and granted."""
    reply = await ask(store, request)
    assert isinstance(reply, LeaseGranted), reply
    return reply.token


async def value_of(store: AnyStore, key: str) -> Any:
    """The live value under a key; `MISSING` if there is none."""
    reply = await ask(store, Get(key))
    return reply.value if isinstance(reply, Found) else MISSING


async def all_keys(store: AnyStore, pattern: str = "*") -> set[str]:
    """Every key that a pattern matches, page by page. A page may be empty, and a key may stand on two."""
    keys: set[str] = set()
    cursor = ""
    while True:
        page = await ask(store, Scan(pattern, cursor))
        keys.update(page.keys)
        if not (cursor := page.cursor):
            return keys


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()
"""In the place of a value where there is none."""


class Conformance:
    """The fixtures and settings of the suite. See `cachebus.testing.stores.StoreConformance`."""

    pytestmark = pytest.mark.anyio

    default_ttl: ClassVar[float | None] = None
    """Seconds that the store of the fixture gives to a value written with `ttl="default"`."""

    big_value: ClassVar[int] = 2**20 + 1
    """Bytes of the largest value that the suite stores, where the store has no limit of its own."""

    short_ttl: ClassVar[float] = 0.05
    """Seconds to live of values that shall expire while a test runs."""

    slack: ClassVar[float] = 0.005
    """Seconds by which the store's clock may be finer or coarser than ours."""

    @pytest.fixture
    def store(self) -> AnyStore:
        """The store to test, open and empty. Override it with an asynchronous fixture that also closes it."""
        raise NotImplementedError("a subclass of StoreConformance provides the fixture `store`")

    @pytest.fixture
    def neighbour(self) -> AnyStore:
        """Another open and empty store in the same place under another namespace, best one whose name begins like the
        first. Override it unless the values are kept in this process."""
        pytest.skip("the values are kept in this process: two stores share nothing")

    async def elapse(self, seconds: float) -> None:
        """Let time pass for the store. Override it where the store's clock is yours to move."""
        await anyio.sleep(seconds)

    async def expire(self, store: AnyStore, *, times: int = 1) -> None:
        """Let the time of a value of `short_ttl` pass, as the store rounds it, and of what comes after it."""
        rounded = max(self.short_ttl, store.capabilities.ttl_resolution)
        await self.elapse(rounded + (times - 1) * self.short_ttl + times * self.slack)

    def now(self) -> float:
        """Monotonic seconds of the clock that `elapse` moves."""
        return time.monotonic()

    async def vanishes(self, store: AnyStore, key: str) -> None:
        """Return when a key has no live value any more."""
        limit = self.now() + VANISHING_LIMIT
        while not isinstance(await ask(store, Exists(key)), Missing):
            assert self.now() < limit, f"{key!r} did not expire"
            await self.elapse(self.short_ttl / 4)

    def needs(self, store: AnyStore, capability: str) -> None:
        """Skip the rest of a test about what the store says it cannot do; another test holds it to that."""
        if not getattr(store.capabilities, capability):
            pytest.skip(f"the store says that it cannot do {capability}")
