"""The half of `Cache` by which callers take account of each other: shared loads, locks and rate limits."""

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
    """The methods of `Cache` for loads, locks and rate limits."""

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
        """Return the value under `key`. If there is none, call `loader`, store what it returns, and return that.

        Concurrent calls for the same key share one load, across every process that uses the backend, if the store can lease
        (see `docs/loading.md`). A delete, a clear, a write of the key or an invalidation of a tag during the load keeps the
        loaded value from being stored. If the loader raises, every waiter in this process gets that exception.

        `loader` is a coroutine function or a plain one, which runs in a worker thread; if it takes an argument, that is a
        `LoadContext`. It returns the value, or a `LoadResult` that also says how to keep it. Durations are seconds or
        a `timedelta`. Options are checked when a value has to be loaded.

        * `stale_for`: if the loader fails, an expired value is served for so long after its `ttl`.
        * `soft_timeout`: with such a value at hand, wait no longer for the loader; 0 serves it at once. `hard_timeout`: wait
          no longer in any case; without such a value that is a `CacheTimeoutError`. The load goes on and is stored.
        * `refresh`, `refresh_after`: reload a live value in the background: by chance, the likelier the nearer its end and the
          longer its load (`"xfetch"`, `beta` above 1 is earlier), after a part of its lifetime, or after so many seconds.
        * `ttl`: seconds, or a function of the loaded value that returns them.
        * `cache_errors`, `error_ttl`: exceptions of these classes that the loader raises are kept for so long. Callers who list
          the class get them without a load; for all others the key has no value. Nothing is kept if a stale value is served.
        * `negative_ttl`: the `ttl` of a loaded `None`. `ttl_jitter`: the part of the `ttl` that chance may take off.
        * `idle_ttl`: the value expires if this process has not read it for so long, and after `ttl` in any case.
        * `wait_limit`: how long to wait for another caller's load, and then do as `wait` says: `"load"` loads too, and does
          not store; `"stale"` takes a stale value if there is one, and else loads; `"raise"` raises `CacheStampedeError`.
        * `lease_ttl`: how long a crashed loader keeps others from loading. A load itself may take longer.
        """
        if type(key) is not str:
            check_key(key)
        if self._turns_left <= 0:
            # Before the turn: a value that was read before other tasks ran would be refreshed once more.
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
        """Return the values under `keys`. One call of `loader` loads the missing ones: it is given a list of their keys, and
        returns a mapping. Keys that it leaves out are left out here too, and nothing is stored for them.

        Everything else is as in `get_or_load`. A key that another caller is loading already is waited for, and not loaded
        again. Values are served stale if all that are loaded can be.
        """
        if unknown := options.keys() - MANY_LOAD_OPTIONS:
            raise TypeError(f"there is no option {min(unknown)!r} of get_or_load_many")
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
        """Return the lock of that name, to be acquired with `async with` or `acquire`: by one holder at a time of all that
        share the store where locks are kept. `docs/locks.md` says what it promises, and what the `token` is for.

        It ends `ttl` seconds after it was acquired unless it is renewed, which with `renew` happens in the background. `wait`
        is how long to wait for it: left out, as long as a call may take (`timeout`); 0 is one attempt. `owner` names the holder
        to others. Durations are seconds or a `timedelta`. Whatever `on_error` says, a lock is acquired or an error is raised.

        Raises `CacheKeyError`, `TypeError` or `ValueError` for wrong arguments.
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
        """Return a limit of `limit` units in `per` seconds, shared by all that use the same backend and namespace.

        ::

            if not await cache.rate_limit(f"login:{address}", 5, 60):
                return "try again later"

            async with cache.rate_limit("mails", 10, 1, wait=5):
                await send()

        Awaited, it takes `cost` units if they are available, and returns a `RateLimit`, which is true if it is allowed. As a
        block it is entered if it is allowed, and else raises `RateLimited`. A refusal takes nothing.

        * `burst`: so many may be taken at once after a quiet time; by default `limit`. In any t seconds it is at most
          `burst + t * limit / per`.
        * `wait`: if the units will be available within so many seconds, take them now and wait, in the order of asking.
        * `on_error`: if the backend fails, `"raise"` its error, or `"allow"`: then `RateLimit.unchecked` is true. Both
          count as an error of the cache, with a `RequestFailed` event.

        The limit has one state for each `name`, whatever the other arguments. It has nothing to do with the value under
        the key `name`; neither `clear` nor a pattern touches it. Durations are seconds or a `timedelta`. Raises
        `CacheKeyError`, `TypeError` or `ValueError` at once for wrong arguments, and `CapabilityError` when it is used
        with a store that cannot do it.
        """
        request = admit_request(name, limit, per, burst, cost, wait, on_error)
        return AsyncRateLimiter(lambda: self._runner, request, on_error)
