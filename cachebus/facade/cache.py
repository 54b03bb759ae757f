"""The asynchronous facade: calls become requests, replies become values."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from anyio.lowlevel import checkpoint
from msgspec.structs import replace

from cachebus.bus import TURNS_PER_CHECKPOINT, ReplySlot, Subscription, too_late
from cachebus.client.backend_client import UNREAD, BackendClient, ClosedClient
from cachebus.client.failure_policy import BACKEND_FAILURES, Health
from cachebus.client.validation import (
    Since,
    TimeToLive,
    check_key,
    check_keys,
    check_since,
    check_tags,
    check_ttl,
    fit,
    set_request,
)
from cachebus.loading import cached_function
from cachebus.loading.coordinator import LoadCoordinator
from cachebus.loading.runners import AsyncRunner, Runner, ThreadRunner
from cachebus.messages import (
    Add,
    CacheClosed,
    CacheError,
    CacheKeyError,
    CacheSerializationError,
    CapabilityError,
    Clear,
    CompareAndSet,
    Delete,
    DeleteMany,
    DeletePattern,
    Event,
    Exists,
    Found,
    Get,
    GetMany,
    Increment,
    InvalidateTags,
    Missing,
    PayloadRejected,
    Present,
    Scan,
    Scanned,
    SetMany,
    Snapshot,
    Stored,
    TakeSnapshot,
    Touch,
)
from cachebus.node.node import Node
from cachebus.payload.cached_errors import unwrap

from .coordination import CacheCoordination

if TYPE_CHECKING:
    from cachebus.payload.pipeline import PayloadPipeline


class Cache(CacheCoordination):
    """A cache over one backend, on asyncio or trio. Made by `open_cache`; used within `async with`.

    Keys are non-empty `str`; anything else is a `CacheKeyError`. Times to live are seconds or a `timedelta`: left out, the
    backend's default; `None` is no expiry; a `ValueError` unless positive. Every call ends within the cache's `timeout`, at
    worst with a `CacheTimeoutError`. Before `async with` and after `close` every call raises `CacheClosed`.
    """

    def __init__(self, make_node: Callable[[], Node], name: str | None = None) -> None:
        self._make_node = make_node
        self._name = name
        self._node: Node | None = None
        self.loads = LoadCoordinator()
        self.detach("the cache is not open: use it within `async with`")

    def __repr__(self) -> str:
        where = "closed" if isinstance(self._client, ClosedClient) else str(self._client.address)
        return f"<{type(self).__name__} {where}>"

    async def __aenter__(self) -> Self:
        if self._node is not None:
            raise CacheClosed("the cache is open already, or was closed; make another one")
        node = self._make_node()
        await node.__aenter__()
        self._node = node
        self.attach(node.client(self._name))
        _open_caches.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.detach("the cache is closed")
        if self._node is not None:
            await self._node.__aexit__(kind, error, tb)

    async def close(self) -> None:
        """Finish the calls under way and refuse new ones. Safe to call twice; leaving `async with` does it too."""
        self.detach("the cache is closed")
        if self._node is not None:
            await self._node.stop()

    def attach(self, client: BackendClient, *, blocking: bool = False) -> Self:
        """Use `link` from now on; `blocking` makes every call a coroutine that never suspends, for `SyncCache`."""
        self._client = client
        self._try_inline_get, self._try_inline_set = client.try_inline_get, client.try_inline_set
        self._runner: Runner = ThreadRunner(client) if blocking else AsyncRunner(client)
        self._ask, self._finish = self._runner.ask, self._runner.wait_reply
        self._value_of = client.value_of
        self._within = (
            None
            if blocking or isinstance(client, ClosedClient)
            else (client.timeout, too_late(client.address, client.timeout))
        )
        # A blocking caller has no event loop to let go of.
        self._turns_left = sys.maxsize if blocking else TURNS_PER_CHECKPOINT
        return self

    def detach(self, why: str) -> None:
        """Refuse every call from now on, with `why` as the reason."""
        self.attach(ClosedClient(why))

    @property
    def client(self) -> BackendClient:
        """The client of the backend."""
        return self._client

    @property
    def payloads(self) -> PayloadPipeline | None:
        """The pipeline that turns values into payloads, with its statistics and `rotate_key`; `None` if values stay objects."""
        return self._client.pipeline

    # Reading

    async def get(self, key: str, default: Any = None) -> Any:
        """Return the value under `key`, or `default`. A cached `None` is a value: tell it from a miss by the default."""
        # The hot path. Filling the slot of a bare object takes two thirds of the time of Get(key), and the turn is
        # taken here rather than in the bus, which saves a coroutine.
        if type(key) is not str:
            check_key(key)
        request = Get(key)
        reply = self._try_inline_get(request)
        self._turns_left = left = self._turns_left - 1
        if type(reply) is Found and left > 0:
            return reply.value
        # A reply that is awaited needs no checkpoint. Most replies of a remote backend are read right here: a coroutine less.
        if type(reply) is ReplySlot and self._within is not None and key and key.isascii():
            # Looked up now: the cache may be closed meanwhile.
            slot, value_of, wait_reply = reply, self._value_of, self._finish
            try:
                reply = await slot.within(*self._within)
            except BaseException:
                slot.leave()
                raise
            if type(reply) is Missing:
                return default
            if type(reply) is Found and (value := value_of(key, reply.value, default)) is not UNREAD:
                return value
            found = await wait_reply(request, reply)
        elif reply is None and key and key.isascii():
            found = await self._finish(request, reply)
        else:
            found = await self.finish_get(request, reply)
        return found.value if isinstance(found, Found) else default

    async def lookup(self, key: str) -> Found | Missing:
        """Return `Found` with the value under `key`, its version, seconds left, tags and time of storing; or `Missing`."""
        request = Get(check_key(key))
        reply = self._try_inline_get(request)
        self._turns_left -= 1
        return await self.finish_get(request, reply)

    async def get_typed(self, key: str, kind: Any, default: Any = None, *, strict: bool = False) -> Any:
        """Return the value under `key`, checked and converted by pydantic as a `kind`: a builtin or generic type, a dataclass, a
        `TypedDict` or a model. A value that does not fit is a miss, with a `PayloadRejected` event; with `strict` it is a
        `CacheSerializationError`."""
        found = await self.lookup(key)
        if not isinstance(found, Found):
            return default
        try:
            return fit(found.value, kind)
        except CacheSerializationError:
            self._client.emitter.emit(PayloadRejected, key=key, reason="type")
            if strict:
                raise
        return default

    async def finish_get(self, request: Get, reply: Any) -> Found | Missing:
        """Return the answer to a `Get` whose turn has returned `reply`. For the facades."""
        if self._turns_left <= 0 and type(reply) is not ReplySlot:  # What a turn has begun is awaited at once.
            self._turns_left = TURNS_PER_CHECKPOINT
            await checkpoint()
        if not isinstance(reply, Found):
            check_key(request.key)
        answer: Found | Missing = (
            unwrap(reply) if isinstance(reply, Found | Missing) else await self._finish(request, reply)
        )
        return answer

    async def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values under those of `keys` that have one."""
        reply = await self._ask(GetMany(check_keys(keys)))
        return {key: found.value for key, found in reply.entries.items()}

    async def exists(self, key: str) -> bool:
        """Return whether there is a value under `key`. Counts neither as hit nor as miss."""
        return isinstance(await self._ask(Exists(check_key(key))), Present)

    async def ttl(self, key: str) -> float | None:
        """Return the seconds that the value under `key` has left: `None` without expiry, 0.0 if there is no value."""
        reply = await self._ask(Exists(check_key(key)))
        return reply.ttl if isinstance(reply, Present) else 0.0

    async def scan(self, pattern: str = "*") -> AsyncIterator[str]:
        """Iterate over the keys that match a glob (see `delete_pattern`). Keys that come or go meanwhile may be listed or not."""
        cursor = ""
        while True:
            page = await self.scan_page(pattern, cursor)
            for key in page.keys:
                yield key
            if not (cursor := page.cursor):
                return

    async def scan_page(self, pattern: str, cursor: str) -> Scanned:
        """Return one page of `scan`. For the facades."""
        page: Scanned = await self._ask(Scan(_check_pattern(pattern), cursor))
        return page

    # Writing

    async def set(
        self,
        key: str,
        value: Any,
        *,
        ttl: TimeToLive = "default",
        tags: Iterable[str] = (),
        only_if: Literal["absent", "present"] | None = None,
    ) -> bool:
        """Store `value`, if `only_if` holds for the key, and return whether it was stored."""
        request = set_request(key, value, ttl, tags, only_if)
        if self._turns_left <= 0:  # Before the turn: what a turn has begun is awaited at once.
            self._turns_left = TURNS_PER_CHECKPOINT
            await checkpoint()
        reply = self._try_inline_set(request)
        self._turns_left -= 1
        if type(reply) is Stored:
            return True
        wait_reply = self._finish
        if type(reply) is ReplySlot and self._within is not None:  # As in `get`.
            slot = reply
            try:
                reply = await slot.within(*self._within)
            except BaseException:
                slot.leave()
                raise
            if type(reply) is Stored:
                return True
        return isinstance(await wait_reply(request, reply), Stored)

    async def set_many(
        self, items: Mapping[str, Any], *, ttl: TimeToLive = "default", tags: Iterable[str] = ()
    ) -> None:
        """Store several values with one TTL and the same tags."""
        check_keys(items)
        await self._ask(SetMany(dict(items), check_ttl(ttl), check_tags(tags)))

    async def add(self, key: str, value: Any, *, ttl: TimeToLive = "default", tags: Iterable[str] = ()) -> bool:
        """Store `value` if there is none under `key`, and return whether it was stored."""
        return isinstance(await self._ask(Add(check_key(key), value, check_ttl(ttl), check_tags(tags))), Stored)

    async def compare_and_set(
        self, key: str, value: Any, *, version: float, ttl: TimeToLive = "default", tags: Iterable[str] = ()
    ) -> bool:
        """Store `value` if the one under `key` is still at `version`, which `lookup` returns; return whether it was stored."""
        request = CompareAndSet(check_key(key), value, version, check_ttl(ttl), check_tags(tags))
        return isinstance(await self._ask(request), Stored)

    async def touch(self, key: str, *, ttl: TimeToLive = "default") -> bool:
        """Give the value under `key` a new time to live, counted from now; return whether there is one."""
        return isinstance(await self._ask(Touch(check_key(key), check_ttl(ttl))), Present)

    async def increment(self, key: str, delta: int = 1, *, initial: int | None = 0, ttl: TimeToLive = "default") -> int:
        """Add `delta` to the integer under `key` and return the sum, in one step.

        A missing key starts at `initial`, with `ttl`; an existing one keeps its time to live. With `initial=None` a
        missing key is a `CacheKeyError`. Raises `WrongType` if the value is not an integer of 64 bits.
        """
        for name, number in (("delta", delta), ("initial", initial)):
            if type(number) is not int and not (name == "initial" and number is None):
                raise TypeError(f"{name} must be an int, not {number!r}")
        reply = await self._ask(Increment(check_key(key), delta, initial, check_ttl(ttl)))
        if isinstance(reply, Missing):
            raise CacheKeyError("there is no counter to increment under the key, and initial is None")
        return int(reply.value)

    # Removing

    async def delete(self, key: str) -> bool:
        """Remove the value under `key`, and return whether there was one."""
        return bool((await self._ask(Delete(check_key(key)))).count)

    async def delete_many(self, keys: Iterable[str]) -> int:
        """Remove the values under `keys`, and return how many there were."""
        return int((await self._ask(DeleteMany(check_keys(keys)))).count)

    async def delete_pattern(self, pattern: str) -> int:
        r"""Remove every key that a glob matches, and return how many there were.

        `*` is any run of characters, `?` any one, `[abc]` one of a set, and `\` takes the next character literally.
        Put foreign text through `escape_pattern`.
        """
        return int((await self._ask(DeletePattern(_check_pattern(pattern)))).count)

    async def invalidate_tags(self, *tags: str) -> None:
        """Make every value unreadable that was stored with one of `tags` before now."""
        if checked := check_tags(tags):
            await self._ask(InvalidateTags(checked))

    async def clear(self) -> None:
        """Remove every value of this cache's namespace."""
        await self._ask(Clear())

    # Decorating and watching

    cached = cached_function.cached

    def events(
        self, *what: type[Event] | str, capacity: int = 1024, since: Since = None, local: bool = False
    ) -> Subscription:
        """Subscribe to events: to classes of them, to globs over their names such as `"cache_*"`, or to all.

        Iterate with `async for` within `async with`; on a `SyncCache` with `for` within `with`, or call `next(timeout)`. At most
        `capacity` events wait; a slower subscriber loses events, which its `dropped` counts. On a bus over NATS the events of
        other processes come too, unless `local` is set.

        `since` is seconds or a `timedelta` before now, or an aware `datetime`. The events that a stream of the bus has kept
        since then come first (`events_stream`), and a slow subscriber loses none; `EventsMissed` marks events that were lost
        before. Raises `CapabilityError` if the bus has no stream, and `ValueError` for `since` with `local`.
        """
        if since is not None and local:
            raise ValueError("since and local exclude each other: a stream keeps the events of all processes")
        bus = self._client.bus
        return bus.subscribe(*what, capacity=capacity, since=check_since(since, bus.clock.wall()), local=local)

    async def statistics(self) -> Snapshot:
        """Return the counters since the backend's actor started, and how full its store is."""
        snapshot: Snapshot = await self._ask(TakeSnapshot())
        failures = self._client.failures
        return replace(snapshot, errors=failures.errors, dropped_writes=failures.dropped_writes)

    async def health(self) -> Health:
        """Return whether the backend answers, its server included, and how fast. Raises `CacheClosed` only.

        It sends a request like any other, which an open circuit refuses. A failure does not count as an error of the cache.
        """
        client = self._client
        now = client.bus.clock.monotonic
        started = now()
        wrong: CacheError | None = None
        try:
            await self._runner.request_unguarded(Exists(_PROBED_KEY))
        except CacheClosed:
            raise
        except CapabilityError:
            pass  # An answer, too.
        except CacheError as error:
            wrong = error
        latency, circuit = now() - started, ""
        with suppress(*BACKEND_FAILURES):
            snapshot = await self._runner.request_unguarded(TakeSnapshot(), -latency)
            circuit = snapshot.guard.get("state", "")
        return Health(wrong is None, client.address, latency, "" if wrong is None else str(wrong), circuit)


_PROBED_KEY = "cachebus.health"
"""A key that is never stored; asking for it takes the path of every request."""


def _check_pattern(pattern: object) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"a pattern must be a non-empty str, not {pattern!r}")
    return pattern


_open_caches: weakref.WeakSet[Cache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_open_caches):
        cache.detach("this process was forked after the cache was opened; open another one in the child")
    _open_caches.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
