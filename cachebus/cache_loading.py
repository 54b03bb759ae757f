"""The loading half of the facades: `get_or_load`, `get_or_load_many` and the decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import checkpoint

from cachebus.bus import TURNS_PER_CHECKPOINT, Turn
from cachebus.messages import Found, Get, Missing

from .cached import TURNS_OF_A_MISS, Decorator, Loads
from .checks import Duration, check_key, check_keys
from .landing import job_of
from .link import Link, run
from .load_options import ErrorClasses, LoadOptions, LoadTtl, Refresh, WaitPolicy
from .loaders import Loader
from .ways import Awaiting, Blocking


class Decorating:
    """The decorator of both facades. The functions say which one they want: a coroutine function waits, a plain one blocks."""

    _loads: Loads

    def cached(
        self,
        *,
        key: str | Callable[..., str],
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        stale_for: Duration = 0.0,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        refresh: Refresh = None,
        refresh_after: Duration | None = None,
        beta: float = 1.0,
        negative_ttl: Duration | None = None,
        ttl_jitter: float = 0.0,
        idle_ttl: Duration | None = None,
        wait: WaitPolicy = "load",
        wait_limit: Duration = 30.0,
        lease_ttl: Duration = 10.0,
        cache_errors: ErrorClasses = (),
        error_ttl: Duration | None = None,
    ) -> Decorator:
        """Cache what a function returns; see `Loads.cached`, and `get_or_load` for the options."""
        options = LoadOptions.of(
            ttl, tags, stale_for, soft_timeout, hard_timeout, refresh, refresh_after, beta, negative_ttl,
            ttl_jitter, idle_ttl, wait, wait_limit, lease_ttl, cache_errors, error_ttl,
        )  # fmt: skip
        return self._loads.cached(key=key, options=options)


class CacheLoading(Decorating):
    """What `Cache` does about loaders."""

    _link: Link
    _turn_get: Turn
    _turns_left: int

    if TYPE_CHECKING:

        async def get_many(self, keys: Iterable[str]) -> dict[str, Any]: ...

    async def get_or_load(
        self,
        key: str,
        loader: Loader,
        *,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        stale_for: Duration = 0.0,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        refresh: Refresh = None,
        refresh_after: Duration | None = None,
        beta: float = 1.0,
        negative_ttl: Duration | None = None,
        ttl_jitter: float = 0.0,
        idle_ttl: Duration | None = None,
        wait: WaitPolicy = "load",
        wait_limit: Duration = 30.0,
        lease_ttl: Duration = 10.0,
        cache_errors: ErrorClasses = (),
        error_ttl: Duration | None = None,
    ) -> Any:
        """The value under `key`; where there is none, what `loader` returns, which is stored.

        One caller of all that share the backend loads at a time, where the store can lease (see `docs/loading.md`);
        everybody else waits for the value. A delete, a clear, a write of the key or an invalidation of a tag during the
        load keeps what was loaded from being stored. What the loader raises, everybody in this process gets who waits.

        `loader` is a coroutine function or a plain one, which runs in a worker thread; if it takes an argument, that is a
        `LoadContext`. It returns the value, or a `LoadResult` that also says how to keep it. Durations are seconds, or
        a `timedelta`; options are checked when a value has to be loaded.

        * `stale_for`: so long after its `ttl` a value is served where the loader fails.
        * `soft_timeout`: with such a value at hand, wait no longer for the loader; 0 serves it at once. `hard_timeout`: wait
          no longer in any case; without such a value that is a `CacheTimeoutError`. The load goes on and is stored.
        * `refresh`, `refresh_after`: load a live value anew, in the background: by chance, the likelier the nearer its end
          and the longer it takes to load (`"xfetch"`, `beta` above 1 is earlier), after a part of its lifetime, or after
          so many seconds.
        * `ttl`: seconds, or a function of the loaded value that returns them.
        * `cache_errors`, `error_ttl`: what the loader raises of these classes is kept for so long, and raised again without
          asking the loader, for callers who list it; for all others the key has no value. Where a stale value is served
          instead, nothing is kept.
        * `negative_ttl`: the `ttl` of a loaded `None`. `ttl_jitter`: the part of the `ttl` that chance may take off.
        * `idle_ttl`: the value goes when nobody has asked for it here for so long, and after `ttl` in any case.
        * `wait_limit`: wait so long for somebody else's load, and then do as `wait` says: `"load"` loads too, and does
          not store; `"stale"` takes a stale value if there is one, and else loads; `"raise"` raises `CacheStampedeError`.
        * `lease_ttl`: so long after the death of whoever loads somebody else may. A load itself may take longer.
        """
        if type(key) is not str:
            check_key(key)
        if self._turns_left <= 0:
            # Before the turn: whoever comes back to a value that was read before others ran would refresh it once more.
            self._turns_left = TURNS_PER_CHECKPOINT
            await checkpoint()
        request = Get(key)
        reply = self._turn_get(request)
        self._turns_left -= 1
        if type(reply) is Found and idle_ttl is None:
            return reply.value
        self._turns_left -= TURNS_OF_A_MISS
        check_key(key)
        found: Any = reply if isinstance(reply, Found | Missing) else await self._link.finish(request, reply)
        options = LoadOptions.of(
            ttl, tags, stale_for, soft_timeout, hard_timeout, refresh, refresh_after, beta, negative_ttl,
            ttl_jitter, idle_ttl, wait, wait_limit, lease_ttl, cache_errors, error_ttl,
        )  # fmt: skip
        return await self._loads.deliver(
            Awaiting(self._link), job_of(key, loader, options, remote=reply is None), found
        )

    async def get_or_load_many(
        self,
        keys: Iterable[str],
        loader: Loader,
        *,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        stale_for: Duration = 0.0,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        negative_ttl: Duration | None = None,
        ttl_jitter: float = 0.0,
        wait: WaitPolicy = "load",
        wait_limit: Duration = 30.0,
        lease_ttl: Duration = 10.0,
    ) -> dict[str, Any]:
        """The values under `keys`; those that are missing are loaded by one call of `loader`, which is given a list of them
        and returns a mapping. Keys that it leaves out are left out here too, and nothing is stored for them.

        Everything else is as in `get_or_load`. A key that somebody else is loading already is waited for, and not loaded
        again. Values are served stale if all that are loaded can be.
        """
        wanted = check_keys(keys)
        found = await self.get_many(wanted)
        if missing := [key for key in dict.fromkeys(wanted) if key not in found]:
            options = LoadOptions.of(
                ttl=ttl,
                tags=tags,
                stale_for=stale_for,
                soft_timeout=soft_timeout,
                hard_timeout=hard_timeout,
                negative_ttl=negative_ttl,
                ttl_jitter=ttl_jitter,
                wait=wait,
                wait_limit=wait_limit,
                lease_ttl=lease_ttl,
            )
            found |= await self._loads.fetch_many(Awaiting(self._link), missing, loader, options)
        return {key: found[key] for key in wanted if key in found}


class SyncCacheLoading(Decorating):
    """What `SyncCache` does about loaders."""

    _turn_get: Turn

    if TYPE_CHECKING:

        @property
        def link(self) -> Link: ...

        def get_many(self, keys: Iterable[str]) -> dict[str, Any]: ...

    def get_or_load(
        self,
        key: str,
        loader: Loader,
        *,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        stale_for: Duration = 0.0,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        refresh: Refresh = None,
        refresh_after: Duration | None = None,
        beta: float = 1.0,
        negative_ttl: Duration | None = None,
        ttl_jitter: float = 0.0,
        idle_ttl: Duration | None = None,
        wait: WaitPolicy = "load",
        wait_limit: Duration = 30.0,
        lease_ttl: Duration = 10.0,
        cache_errors: ErrorClasses = (),
        error_ttl: Duration | None = None,
    ) -> Any:
        """As `Cache.get_or_load`. A plain loader runs in the calling thread, or, where it may have to go on by itself, in
        one of its own; a coroutine function runs in the event loop of the cache."""
        if type(key) is not str:
            check_key(key)
        request = Get(key)
        reply = self._turn_get(request)
        if type(reply) is Found and idle_ttl is None:
            return reply.value
        check_key(key)
        link = self.link
        found: Any = reply if isinstance(reply, Found | Missing) else run(link.finish_blocking(request, reply))
        options = LoadOptions.of(
            ttl, tags, stale_for, soft_timeout, hard_timeout, refresh, refresh_after, beta, negative_ttl,
            ttl_jitter, idle_ttl, wait, wait_limit, lease_ttl, cache_errors, error_ttl,
        )  # fmt: skip
        return run(self._loads.deliver(Blocking(link), job_of(key, loader, options, remote=reply is None), found))

    def get_or_load_many(
        self,
        keys: Iterable[str],
        loader: Loader,
        *,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        stale_for: Duration = 0.0,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        negative_ttl: Duration | None = None,
        ttl_jitter: float = 0.0,
        wait: WaitPolicy = "load",
        wait_limit: Duration = 30.0,
        lease_ttl: Duration = 10.0,
    ) -> dict[str, Any]:
        """As `Cache.get_or_load_many`."""
        wanted = check_keys(keys)
        found = self.get_many(wanted)
        if missing := [key for key in dict.fromkeys(wanted) if key not in found]:
            options = LoadOptions.of(
                ttl=ttl,
                tags=tags,
                stale_for=stale_for,
                soft_timeout=soft_timeout,
                hard_timeout=hard_timeout,
                negative_ttl=negative_ttl,
                ttl_jitter=ttl_jitter,
                wait=wait,
                wait_limit=wait_limit,
                lease_ttl=lease_ttl,
            )
            found |= run(self._loads.fetch_many(Blocking(self.link), missing, loader, options))
        return {key: found[key] for key in wanted if key in found}
