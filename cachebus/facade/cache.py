"""The asynchronous facade: calls become requests, replies become values."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from anyio.lowlevel import checkpoint
from msgspec import Struct
from msgspec.structs import replace

from cachebus.bus import TURNS_PER_CHECKPOINT, ReplySlot, Subscription, too_late
from cachebus.client.backend_client import UNREAD, BackendClient, ClosedClient
from cachebus.client.failure_policy import BACKEND_FAILURES
from cachebus.client.validation import (
    Duration,
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
from cachebus.loading.cached_function import TURNS_OF_A_MISS
from cachebus.loading.coordinator import LoadCoordinator
from cachebus.loading.leased_load import LoadJob
from cachebus.loading.loaders import Loader, kind_of
from cachebus.loading.options import (
    LOAD_OPTIONS,
    MANY_LOAD_OPTIONS,
    LoadKeywords,
    LoadOptions,
    LoadTtl,
    ManyLoadKeywords,
)
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

from .locks import Lock
from .rate_limiter import AsyncRateLimiter, OnLimitError, admit_request

if TYPE_CHECKING:
    from cachebus.payload.pipeline import PayloadPipeline


class Health(Struct, frozen=True):
    """Health of a backend: whether it answered, after how many seconds, and otherwise what went wrong.

    `circuit` is the state of the guard: `closed`, `open` (the server gets no requests) or `half_open` (it is being
    probed). It is empty if the store has no guard or its state is unknown.
    """

    ok: bool
    backend: str
    latency: float
    detail: str = ""
    circuit: str = ""


class Cache:
    """Cache over one backend, on asyncio or trio. `open_cache` makes one; use it with `async with`.

    Keys are non-empty `str`; any other key raises `CacheKeyError`. A time to live is a positive number of seconds or a
    `timedelta`. Without one, the default of the backend applies; `None` means no expiry. Every call ends within the
    `timeout` of the cache, at the latest with `CacheTimeoutError`. Before `async with` and after `close`, every call
    raises `CacheClosed`. Failures of the backend follow `on_error`, as `docs/api.md` describes.
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
        """Finish the calls in progress and refuse new ones. Safe to call twice; `async with` calls it on exit.

        Example:
            ```python
            await cache.close()
            ```
        """
        self.detach("the cache is closed")
        if self._node is not None:
            await self._node.stop()

    def attach(self, client: BackendClient, *, blocking: bool = False) -> Self:
        """Use `client` from now on. If `blocking`, coroutines never suspend; `SyncCache` uses this."""
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
        # A blocking caller has no event loop to yield to.
        self._turns_left = sys.maxsize if blocking else TURNS_PER_CHECKPOINT
        return self

    def detach(self, why: str) -> None:
        """Refuse every call from now on, with `why` as the reason."""
        self.attach(ClosedClient(why))

    @property
    def client(self) -> BackendClient:
        """Client of the backend."""
        return self._client

    @property
    def payloads(self) -> PayloadPipeline | None:
        """Pipeline that turns values into payloads, with its statistics and `rotate_key`. `None` if values stay objects."""
        return self._client.pipeline

    # Reading

    async def get(self, key: str, default: Any = None) -> Any:
        """Return the value under `key`, or `default` if there is none.

        A cached `None` is a value. Pass another `default` to tell it from a miss.

        Args:
            key: Key to read.
            default: Result of a miss.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.

        Example:
            ```python
            await cache.set("user:1", {"name": "Ada"})
            assert await cache.get("user:1") == {"name": "Ada"}
            assert await cache.get("user:2", default="unknown") == "unknown"
            ```
        """
        # The hot path. Taking the turn here rather than in the bus saves a coroutine.
        if type(key) is not str:
            check_key(key)
        request = Get(key)
        reply = self._try_inline_get(request)
        self._turns_left = left = self._turns_left - 1
        if type(reply) is Found and left > 0:
            return reply.value
        # An awaited reply needs no checkpoint. Reading most remote replies here saves another coroutine.
        if type(reply) is ReplySlot and self._within is not None and key and key.isascii():
            # Bound now, because the cache may be closed during the await.
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
        """Return `Found` with the value under `key` and its metadata, or `Missing`.

        `Found` has the `value`, its `version`, the seconds left as `ttl`, its `tags` and the time when it was stored.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.

        Example:
            ```python
            await cache.set("user:1", "Ada", ttl=60, tags=["users"])
            match await cache.lookup("user:1"):
                case Found(value=value, ttl=left, tags=tags):
                    assert value == "Ada" and left <= 60 and tags == ("users",)
                case Missing():
                    print("a miss")
            ```
        """
        request = Get(check_key(key))
        reply = self._try_inline_get(request)
        self._turns_left -= 1
        return await self.finish_get(request, reply)

    async def get_typed(self, key: str, kind: Any, default: Any = None, *, strict: bool = False) -> Any:
        """Return the value under `key`, validated and converted to `kind` by pydantic.

        A value that does not fit is a miss, and emits `PayloadRejected`.

        Args:
            key: Key to read.
            kind: Builtin or generic type, dataclass, `TypedDict` or model.
            default: Result of a miss.
            strict: Raise an error for a value that does not fit.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.
            CacheSerializationError: If the value does not fit and `strict` is set.

        Example:
            ```python
            await cache.set("ports", ["80", "443"])
            assert await cache.get_typed("ports", list[int]) == [80, 443]
            ```
        """
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
        """Return the answer to a `Get` whose turn returned `reply`. The facades use this."""
        if self._turns_left <= 0 and type(reply) is not ReplySlot:  # A started request must be awaited at once.
            self._turns_left = TURNS_PER_CHECKPOINT
            await checkpoint()
        if not isinstance(reply, Found):
            check_key(request.key)
        answer: Found | Missing = (
            unwrap(reply) if isinstance(reply, Found | Missing) else await self._finish(request, reply)
        )
        return answer

    async def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values under `keys` as a dictionary, without the keys that have none.

        Raises:
            CacheKeyError: If a key is not a non-empty `str`.

        Example:
            ```python
            await cache.set_many({"a": 1, "b": 2})
            assert await cache.get_many(["a", "b", "c"]) == {"a": 1, "b": 2}
            ```
        """
        reply = await self._ask(GetMany(check_keys(keys)))
        return {key: found.value for key, found in reply.entries.items()}

    async def exists(self, key: str) -> bool:
        """Return whether there is a value under `key`. This counts neither as a hit nor as a miss.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.

        Example:
            ```python
            assert await cache.exists("user:1") is False
            ```
        """
        return isinstance(await self._ask(Exists(check_key(key))), Present)

    async def ttl(self, key: str) -> float | None:
        """Return how many seconds the value under `key` has left.

        The result is `None` if the value does not expire, and 0.0 if there is no value.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.

        Example:
            ```python
            await cache.set("user:1", "Ada", ttl=60)
            assert 59 < await cache.ttl("user:1") <= 60
            ```
        """
        reply = await self._ask(Exists(check_key(key)))
        return reply.ttl if isinstance(reply, Present) else 0.0

    async def scan(self, pattern: str = "*") -> AsyncIterator[str]:
        """Iterate over the keys that match a glob; see `delete_pattern`.

        Keys that are added or removed during the iteration may or may not appear.

        Raises:
            ValueError: If `pattern` is not a non-empty `str`.
            CapabilityError: If the store does not support patterns.

        Example:
            ```python
            await cache.set_many({"user:1": "Ada", "user:2": "Bob", "team:1": "A"})
            assert sorted([key async for key in cache.scan("user:*")]) == ["user:1", "user:2"]
            ```
        """
        cursor = ""
        while True:
            page = await self.scan_page(pattern, cursor)
            for key in page.keys:
                yield key
            if not (cursor := page.cursor):
                return

    async def scan_page(self, pattern: str, cursor: str) -> Scanned:
        """Return one page of `scan`. The facades use this."""
        page: Scanned = await self._ask(Scan(_check_pattern(pattern), cursor))
        return page

    # Loading, locks and rate limits

    async def get_or_load(
        self,
        key: str,
        loader: Loader,
        *,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        **options: Unpack[LoadKeywords],
    ) -> Any:
        """Return the value under `key`. On a miss, call `loader`, store its result and return it.

        Concurrent calls for the same key share one load, across every process that uses the backend, if the store
        supports leases (see `docs/loading.md`). The loaded value is not stored if, during the load, the key is written
        or deleted, the cache is cleared, or one of its tags is invalidated. If the loader raises, every waiter in this
        process gets that exception.

        `loader` is a coroutine function, or a plain function, which runs in a worker thread. If it takes an argument,
        it receives a `LoadContext`. It returns the value, or a `LoadResult` that also sets options such as the TTL.
        Durations are seconds or a `timedelta`. Options are validated when a value has to be loaded.

        * `ttl`: seconds, or a function that takes the loaded value and returns them.
        * `stale_for`: how long after its `ttl` an expired value may still be served if the loader fails.
        * `soft_timeout`: how long to wait for the loader before serving a stale value, if one is available; 0 serves it
          immediately. The load continues in the background and its value is stored.
        * `hard_timeout`: how long to wait for the loader in any case. If no stale value is available, the call raises
          `CacheTimeoutError`. The load continues in the background and its value is stored.
        * `refresh`: when to reload a live value in the background. A number is a fraction of its lifetime. `"xfetch"`
          decides at random, with a probability that grows towards expiry and with the load time; `beta` above 1
          refreshes earlier.
        * `refresh_after`: seconds after which to reload a live value in the background.
        * `cache_errors`, `error_ttl`: the exception classes of the loader to cache, and for how long. Callers that list
          the class get the cached exception without a load; for other callers the key has no value. Nothing is cached
          if a stale value is served.
        * `negative_ttl`: the `ttl` of a loaded `None`.
        * `ttl_jitter`: the largest fraction of the `ttl` that is subtracted at random.
        * `idle_ttl`: how long a value lives if this process does not read it. It expires after `ttl` in any case.
        * `wait_limit`: how long to wait for another caller's load.
        * `wait`: what to do after `wait_limit`. `"load"` loads without storing. `"stale"` returns a stale value if one
          is available, and otherwise loads. `"raise"` raises `CacheStampedeError`.
        * `lease_ttl`: how long a crashed loader keeps others from loading. A load may take longer than this.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.
            CacheStampedeError: If `wait="raise"` and `wait_limit` has passed.
            CacheTimeoutError: After `hard_timeout`, if there is no stale value.
            Exception: Whatever the loader raises, unless a stale value can be served.

        Example:
            ```python
            async def load_user() -> dict[str, str]:
                return {"name": "Ada"}

            assert await cache.get_or_load("user:1", load_user, ttl=60) == {"name": "Ada"}
            ```
        """
        if type(key) is not str:
            check_key(key)
        if self._turns_left <= 0:
            # Before the turn: a value read before other tasks ran would be refreshed a second time.
            self._turns_left = TURNS_PER_CHECKPOINT
            await checkpoint()
        request = Get(key)
        reply = self._try_inline_get(request)
        self._turns_left -= 1
        if type(reply) is Found and (
            not options or (options.keys() <= LOAD_OPTIONS and options.get("idle_ttl") is None)
        ):
            return reply.value
        self._turns_left -= TURNS_OF_A_MISS
        if not key or not key.isascii():
            check_key(key)
        checked = LoadOptions.of(ttl, tags, **options)
        wants_context, asynchronous = kind_of(loader)
        job = LoadJob(key, loader, checked, checked.tags, asynchronous, wants_context)
        return await self.loads.deliver(self._runner, job, request, reply)

    async def get_or_load_many(
        self,
        keys: Iterable[str],
        loader: Loader,
        *,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        **options: Unpack[ManyLoadKeywords],
    ) -> dict[str, Any]:
        """Return the values under `keys`. On misses, call `loader` once with the list of missing keys.

        `loader` returns a mapping of keys to values. Keys missing from it are missing from the result too, and nothing
        is stored for them. If another caller is already loading a key, this call waits for that load instead of
        repeating it. Stale values are served only if every key to be loaded has one. The options are those of
        `get_or_load`, except `refresh`, `refresh_after`, `beta`, `idle_ttl`, `cache_errors` and `error_ttl`.

        Raises:
            CacheKeyError: If a key is not a non-empty `str`.
            TypeError: If an option is unknown.

        Example:
            ```python
            async def load_users(keys: list[str]) -> dict[str, str]:
                return {key: key.upper() for key in keys}

            assert await cache.get_or_load_many(["a", "b"], load_users) == {"a": "A", "b": "B"}
            ```
        """
        if unknown := options.keys() - MANY_LOAD_OPTIONS:
            raise TypeError(f"get_or_load_many has no option {min(unknown)!r}")
        wanted = check_keys(keys)
        reply = await self._runner.ask(GetMany(wanted))
        found: dict[str, Any] = {key: each.value for key, each in reply.entries.items()}
        if missing := [key for key in dict.fromkeys(wanted) if key not in found]:
            checked = LoadOptions.of(ttl, tags, **options)
            found |= await self.loads.fetch_many(self._runner, missing, loader, checked)
        return {key: found[key] for key in wanted if key in found}

    def lock(
        self,
        name: str,
        *,
        ttl: Duration = 30.0,
        wait: Duration | None = None,
        renew: bool = True,
        owner: str | None = None,
    ) -> Lock:
        """Return a distributed lock, to be acquired with `async with` or `acquire`.

        Only one holder at a time, among all processes that share the lock store, holds the lock of a given name. See
        `docs/locks.md` for its guarantees and the use of `token`. Acquiring a lock either succeeds or raises, whatever
        `on_error` is.

        * `ttl`: how long the lock is held after it was acquired or last renewed.
        * `wait`: how long to wait for the lock; by default, the cache's `timeout`. 0 makes one attempt.
        * `renew`: renew the lock in the background while it is held.
        * `owner`: the name of the holder that other callers see.

        Durations are seconds or a `timedelta`.

        Raises:
            CacheKeyError: If `name` is not a non-empty `str`.
            ValueError: If a duration is out of range; `TypeError` if it is none.

        Example:
            ```python
            async with cache.lock("report", ttl=30, wait=10) as lock:
                print(lock.token)
            ```
        """
        blocking = self._runner.blocks
        return Lock(self._client.locks, name, ttl=ttl, wait=wait, renew=renew, owner=owner, blocking=blocking)

    def rate_limit(
        self,
        name: str,
        limit: int,
        per: Duration,
        *,
        burst: int | None = None,
        cost: int = 1,
        wait: Duration = 0.0,
        on_error: OnLimitError = "raise",
    ) -> AsyncRateLimiter:
        """Return a rate limit of `limit` units per `per` seconds, shared by all users of the backend and namespace.

        When awaited, it takes `cost` units if they are available and returns a `RateLimit`, which is true if the call
        is allowed. `async with` enters its block if the call is allowed, and otherwise raises `RateLimited`. A denied
        call takes no units.

        * `burst`: how many units may be taken at once after an idle period; by default `limit`. Any t seconds allow at
          most `burst + t * limit / per` units.
        * `wait`: if the units will be available within this time, take them in advance and wait, first come, first
          served.
        * `on_error`: what to do if the backend fails. `"raise"` raises its error; `"allow"` allows the call and sets
          `RateLimit.unchecked`. Either counts as an error of the cache and emits `RequestFailed`.

        Each `name` has one state, whatever the other arguments. It is independent of the value under the key `name`,
        and neither `clear` nor `delete_pattern` affects it. Durations are seconds or a `timedelta`.

        Raises:
            CacheKeyError: If `name` is not a non-empty `str`.
            ValueError: If a number is out of range; `TypeError` if it is none.
            CapabilityError: When used, if the store does not support rate limits.

        Example:
            ```python
            if not await cache.rate_limit("login:192.0.2.7", 5, 60):
                print("try again later")

            async with cache.rate_limit("mails", 10, 1, wait=5):
                print("send a mail")
            ```
        """
        request = admit_request(name, limit, per, burst, cost, wait, on_error)
        return AsyncRateLimiter(lambda: self._runner, request, on_error)

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
        """Store `value` under `key`, and return whether it was stored.

        Args:
            key: Key to write.
            value: Any value that the serializer accepts. A memory backend stores it by reference.
            ttl: Seconds or a `timedelta`; `None` for no expiry. By default, the backend decides.
            tags: Tags by which `invalidate_tags` finds the value.
            only_if: Store only if the key is `"absent"` or `"present"`.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.
            CacheSerializationError: If the serializer cannot write the value.
            CacheCapacityError: If the value is too large.
            ValueError: If `ttl` or `only_if` is invalid.

        Example:
            ```python
            assert await cache.set("user:1", {"name": "Ada"}, ttl=60, tags=["users"]) is True
            assert await cache.set("user:1", "Bob", only_if="absent") is False
            ```
        """
        request = set_request(key, value, ttl, tags, only_if)
        if self._turns_left <= 0:  # Before the turn, because a started request must be awaited at once.
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
        """Store several values with the same time to live and the same tags.

        Raises:
            CacheKeyError: If a key is not a non-empty `str`.
            CacheSerializationError: If the serializer cannot write a value.

        Example:
            ```python
            await cache.set_many({"a": 1, "b": 2}, ttl=60)
            ```
        """
        check_keys(items)
        await self._ask(SetMany(dict(items), check_ttl(ttl), check_tags(tags)))

    async def add(self, key: str, value: Any, *, ttl: TimeToLive = "default", tags: Iterable[str] = ()) -> bool:
        """Store `value` if there is none under `key`, and return whether it was stored.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.
            CacheSerializationError: If the serializer cannot write the value.

        Example:
            ```python
            assert await cache.add("job:1", "running") is True
            assert await cache.add("job:1", "running") is False
            ```
        """
        return isinstance(await self._ask(Add(check_key(key), value, check_ttl(ttl), check_tags(tags))), Stored)

    async def compare_and_set(
        self, key: str, value: Any, *, version: float, ttl: TimeToLive = "default", tags: Iterable[str] = ()
    ) -> bool:
        """Store `value` if the value under `key` still has `version`, and return whether it was stored.

        Args:
            key: Key to write.
            value: New value.
            version: `Found.version` of an earlier `lookup`.
            ttl: As in `set`.
            tags: As in `set`.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.
            CacheSerializationError: If the serializer cannot write the value.

        Example:
            ```python
            await cache.set("stock", 5)
            found = await cache.lookup("stock")
            assert await cache.compare_and_set("stock", found.value - 1, version=found.version)
            ```
        """
        request = CompareAndSet(check_key(key), value, version, check_ttl(ttl), check_tags(tags))
        return isinstance(await self._ask(request), Stored)

    async def touch(self, key: str, *, ttl: TimeToLive = "default") -> bool:
        """Set the time to live of the value under `key`, counted from now, and return whether there is a value.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.
            ValueError: If `ttl` is not positive.

        Example:
            ```python
            await cache.set("session", "data", ttl=60)
            assert await cache.touch("session", ttl=3600) is True
            ```
        """
        return isinstance(await self._ask(Touch(check_key(key), check_ttl(ttl))), Present)

    async def increment(self, key: str, delta: int = 1, *, initial: int | None = 0, ttl: TimeToLive = "default") -> int:
        """Add `delta` to the integer under `key` atomically, and return the sum.

        Args:
            key: Key of the counter.
            delta: Integer to add; negative to subtract.
            initial: Start of a missing counter. With `None`, a missing counter raises `CacheKeyError`.
            ttl: Time to live of a new counter. An existing counter keeps its own.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`, or is missing and `initial` is `None`.
            WrongType: If the value is not an integer of 64 bits.
            TypeError: If `delta` or `initial` is not an integer.

        Example:
            ```python
            assert await cache.increment("visits", ttl=3600) == 1
            assert await cache.increment("visits", 2) == 3
            ```
        """
        for name, number in (("delta", delta), ("initial", initial)):
            if type(number) is not int and not (name == "initial" and number is None):
                raise TypeError(f"{name} must be an int, not {number!r}")
        reply = await self._ask(Increment(check_key(key), delta, initial, check_ttl(ttl)))
        if isinstance(reply, Missing):
            raise CacheKeyError("there is no counter under the key, and initial is None")
        return int(reply.value)

    # Removing

    async def delete(self, key: str) -> bool:
        """Remove the value under `key`, and return whether there was one.

        Raises:
            CacheKeyError: If `key` is not a non-empty `str`.
            CacheInvalidationError: If the backend failed, whatever `on_error` is. The value may still be there.

        Example:
            ```python
            await cache.set("user:1", "Ada")
            assert await cache.delete("user:1") is True
            ```
        """
        return bool((await self._ask(Delete(check_key(key)))).count)

    async def delete_many(self, keys: Iterable[str]) -> int:
        """Remove the values under `keys`, and return how many there were.

        Raises:
            CacheKeyError: If a key is not a non-empty `str`.
            CacheInvalidationError: If the backend failed.

        Example:
            ```python
            await cache.set_many({"a": 1, "b": 2})
            assert await cache.delete_many(["a", "b", "c"]) == 2
            ```
        """
        return int((await self._ask(DeleteMany(check_keys(keys)))).count)

    async def delete_pattern(self, pattern: str) -> int:
        r"""Remove every key that matches a glob, and return how many there were.

        `*` matches any run of characters, `?` any one character, and `[abc]` one of a set. `\` escapes the next
        character. Pass untrusted text through `escape_pattern`.

        Raises:
            ValueError: If `pattern` is not a non-empty `str`.
            CapabilityError: If the store does not support patterns.
            CacheInvalidationError: If the backend failed.

        Example:
            ```python
            await cache.set_many({"user:1": "Ada", "user:2": "Bob"})
            assert await cache.delete_pattern("user:*") == 2
            ```
        """
        return int((await self._ask(DeletePattern(_check_pattern(pattern)))).count)

    async def invalidate_tags(self, *tags: str) -> None:
        """Make every value unreadable that was stored with one of `tags` before now.

        The time this takes does not depend on the number of values.

        Raises:
            CacheInvalidationError: If the backend failed. The values may still be readable.
            CapabilityError: If the store does not support tags.

        Example:
            ```python
            await cache.set("user:1", "Ada", tags=["users"])
            await cache.invalidate_tags("users")
            assert await cache.get("user:1") is None
            ```
        """
        if checked := check_tags(tags):
            await self._ask(InvalidateTags(checked))

    async def clear(self) -> None:
        """Remove every value of the namespace of this cache.

        Raises:
            CacheInvalidationError: If the backend failed.

        Example:
            ```python
            await cache.clear()
            ```
        """
        await self._ask(Clear())

    # Decorating and watching

    cached = cached_function.cached

    def events(
        self, *what: type[Event] | str, capacity: int = 1024, since: Since = None, local: bool = False
    ) -> Subscription:
        """Return a subscription to events.

        Iterate over it with `async for` inside `async with`. On a `SyncCache`, use `for` inside `with`, or call
        `next(timeout)`. On a bus over NATS, events of other processes arrive too.

        Args:
            what: Event classes, or globs over event names such as `"cache_*"`. All events if left out.
            capacity: How many events may wait. A slower subscriber loses events and counts them in `dropped`.
            since: Seconds or a `timedelta` before now, or an aware `datetime`. Events that the stream of the bus kept
                since then arrive first (`events_stream`), without loss; `EventsMissed` marks those lost earlier.
            local: Leave out events of other processes.

        Raises:
            CapabilityError: If `since` is given and the bus has no stream.
            ValueError: If `since` and `local` are both given, or a name matches no event.

        Example:
            ```python
            async with cache.events("cache_set") as events:
                await cache.set("user:1", "Ada")
                assert (await anext(events)).key == "user:1"
            ```
        """
        if since is not None and local:
            raise ValueError("since and local exclude each other: a stream keeps the events of all processes")
        bus = self._client.bus
        return bus.subscribe(*what, capacity=capacity, since=check_since(since, bus.clock.wall()), local=local)

    async def statistics(self) -> Snapshot:
        """Return the counters of the backend since its actor started, and the size of its store.

        Example:
            ```python
            await cache.get("user:1")
            assert (await cache.statistics()).misses == 1
            ```
        """
        snapshot: Snapshot = await self._ask(TakeSnapshot())
        failures = self._client.failures
        return replace(snapshot, errors=failures.errors, dropped_writes=failures.dropped_writes)

    async def health(self) -> Health:
        """Return whether the backend and its server answer, and after how many seconds.

        It sends an ordinary request, which an open circuit refuses. A failure does not count as an error of the cache.

        Raises:
            CacheClosed: If the cache is closed. No other error is raised.

        Example:
            ```python
            assert (await cache.health()).ok
            ```
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
            pass  # The backend answered.
        except CacheError as error:
            wrong = error
        latency, circuit = now() - started, ""
        with suppress(*BACKEND_FAILURES):
            snapshot = await self._runner.request_unguarded(TakeSnapshot(), -latency)
            circuit = snapshot.guard.get("state", "")
        return Health(wrong is None, client.address, latency, "" if wrong is None else str(wrong), circuit)


_PROBED_KEY = "cachebus.health"
"""Key that is never stored. A request for it takes the same path as any other."""


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
