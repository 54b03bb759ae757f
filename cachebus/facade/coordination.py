"""Coordination between callers: the methods of `Cache` for shared loads, locks and rate limits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from anyio.lowlevel import checkpoint

from cachebus.bus import TURNS_PER_CHECKPOINT, Turn
from cachebus.client.backend_client import BackendClient
from cachebus.client.validation import Duration, check_key, check_keys
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
from cachebus.loading.runners import Runner
from cachebus.messages import Found, Get, GetMany

from .locks import Lock
from .rate_limiter import AsyncRateLimiter, OnLimitError, admit_request


class CacheCoordination:
    """Base class of `Cache` with its methods for loads, locks and rate limits."""

    _client: BackendClient
    loads: LoadCoordinator
    _runner: Runner
    _try_inline_get: Turn
    _turns_left: int

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

        Raises `TypeError` for an unknown option.
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

        Durations are seconds or a `timedelta`. Raises `CacheKeyError`, `TypeError` or `ValueError` for invalid
        arguments.
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

        ::

            if not await cache.rate_limit(f"login:{address}", 5, 60):
                return "try again later"

            async with cache.rate_limit("mails", 10, 1, wait=5):
                await send()

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

        Raises `CacheKeyError`, `TypeError` or `ValueError` immediately for invalid arguments. Using it raises
        `CapabilityError` if the store does not support rate limits.
        """
        request = admit_request(name, limit, per, burst, cost, wait, on_error)
        return AsyncRateLimiter(lambda: self._runner, request, on_error)
