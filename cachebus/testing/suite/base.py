"""Base of the conformance suite: fixtures, requests to any kind of store, and time."""

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
"""Seconds after which a value that should have expired counts as a failure."""


async def carry_out(store: AnyStore, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
    """Execute a batch and return the replies, as the store's actor does. An error of the store fails every request."""
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
    """Execute one request and return the reply. Raises the error of a `Failed` reply."""
    (reply,) = await carry_out(store, [request])
    if isinstance(reply, Failed):
        raise reply.error()
    return cast("R", reply)


async def granted(store: AnyStore, request: GetOrLease) -> str:
    """Request a lease, check that it is granted, and return its name."""
    reply = await ask(store, request)
    assert isinstance(reply, LeaseGranted), reply
    return reply.token


async def value_of(store: AnyStore, key: str) -> Any:
    """Return the live value of a key, or `MISSING`."""
    reply = await ask(store, Get(key))
    return reply.value if isinstance(reply, Found) else MISSING


async def all_keys(store: AnyStore, pattern: str = "*") -> set[str]:
    """Return all keys that match a pattern. A page may be empty, and a key may be on two pages."""
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
"""Marker for a key without a value."""


class Conformance:
    """Fixtures and settings of the suite. See `cachebus.testing.stores.StoreConformance`."""

    pytestmark = pytest.mark.anyio

    default_ttl: ClassVar[float | None] = None
    """Default time to live of the store, in seconds, for values written with `ttl="default"`."""

    big_value: ClassVar[int] = 2**20 + 1
    """Size in bytes of the largest value that the suite stores, if the store has no limit."""

    short_ttl: ClassVar[float] = 0.05
    """Time to live, in seconds, of values that expire during a test."""

    slack: ClassVar[float] = 0.005
    """Tolerated difference, in seconds, between the resolutions of the store's clock and the test's clock."""

    @pytest.fixture
    def store(self) -> AnyStore:
        """Provide the store to test, open and empty. Override it with an async fixture that also closes the store."""
        raise NotImplementedError("a subclass of StoreConformance provides the fixture `store`")

    @pytest.fixture
    def neighbour(self) -> AnyStore:
        """Provide a second open and empty store on the same server, in another namespace.

        Its name should begin with that of the first. Override it unless the values are kept in the process.
        """
        pytest.skip("the store keeps its values in the process, so two stores share nothing")

    async def elapse(self, seconds: float) -> None:
        """Let time pass for the store. Override it if you can move the store's clock."""
        await anyio.sleep(seconds)

    async def expire(self, store: AnyStore, *, times: int = 1) -> None:
        """Wait until a value with `short_ttl` has expired in the store, and then for `times` - 1 more periods."""
        rounded = max(self.short_ttl, store.capabilities.ttl_resolution)
        await self.elapse(rounded + (times - 1) * self.short_ttl + times * self.slack)

    def now(self) -> float:
        """Return the monotonic time, in seconds, of the clock that `elapse` moves."""
        return time.monotonic()

    async def vanishes(self, store: AnyStore, key: str) -> None:
        """Wait until a key has no live value."""
        limit = self.now() + VANISHING_LIMIT
        while not isinstance(await ask(store, Exists(key)), Missing):
            assert self.now() < limit, f"{key!r} did not expire"
            await self.elapse(self.short_ttl / 4)

    def needs(self, store: AnyStore, capability: str) -> None:
        """Skip the test if the store does not declare a capability.

        Another test checks that it rejects such requests.
        """
        if not getattr(store.capabilities, capability):
            pytest.skip(f"the store does not declare the capability {capability}")
