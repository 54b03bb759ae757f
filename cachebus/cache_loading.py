"""The loading half of the facades: `get_or_load`, `get_or_load_many` and the decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Unpack

from anyio.lowlevel import checkpoint

from cachebus.bus import TURNS_PER_CHECKPOINT, Turn
from cachebus.messages import Found, Get, Missing, Reply

from .cached_function import TURNS_OF_A_MISS, Decorator, cached
from .checks import check_key, check_keys
from .leased_load import LoadJob
from .link import Link, run
from .load_coordinator import LoadCoordinator
from .load_options import LOAD_OPTIONS, MANY_LOAD_OPTIONS, LoadKeywords, LoadOptions, LoadTtl, ManyLoadKeywords
from .loaders import Loader, kind_of
from .runners import AsyncRunner, ThreadRunner


class Decorating:
    """The decorator of both facades. The functions say which one they want: a coroutine function waits, a plain one blocks."""

    _loads: LoadCoordinator

    if TYPE_CHECKING:

        @property
        def link(self) -> Link: ...

    def cached(
        self,
        *,
        key: str | Callable[..., str],
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        **options: Unpack[LoadKeywords],
    ) -> Decorator:
        """Cache what a function returns; see `cached_function.cached`, and `get_or_load` for the options."""
        checked = LoadOptions.of(ttl, tags, **options)
        return cached(self, self._loads, key=key, options=checked)


class CacheLoading(Decorating):
    """What `Cache` does about loaders."""

    _link: Link
    _runner: AsyncRunner
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
        **options: Unpack[LoadKeywords],
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
        if type(reply) is Found and (
            not options or (options.keys() <= LOAD_OPTIONS and options.get("idle_ttl") is None)
        ):
            return reply.value
        self._turns_left -= TURNS_OF_A_MISS
        if not key or not key.isascii():
            check_key(key)
        found: Any = reply if isinstance(reply, Found | Missing) else await self._link.finish(request, reply)
        checked = LoadOptions.of(ttl, tags, **options)
        wants_context, asynchronous = kind_of(loader)
        job = LoadJob(key, loader, checked, checked.tags, asynchronous, not isinstance(reply, Reply), wants_context)
        return await self._loads.deliver(self._runner, job, found)

    async def get_or_load_many(
        self,
        keys: Iterable[str],
        loader: Loader,
        *,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        **options: Unpack[ManyLoadKeywords],
    ) -> dict[str, Any]:
        """The values under `keys`; those that are missing are loaded by one call of `loader`, which is given a list of them
        and returns a mapping. Keys that it leaves out are left out here too, and nothing is stored for them.

        Everything else is as in `get_or_load`. A key that somebody else is loading already is waited for, and not loaded
        again. Values are served stale if all that are loaded can be.
        """
        if unknown := options.keys() - MANY_LOAD_OPTIONS:
            raise TypeError(f"there is no option {min(unknown)!r} of get_or_load_many")
        wanted = check_keys(keys)
        found = await self.get_many(wanted)
        if missing := [key for key in dict.fromkeys(wanted) if key not in found]:
            checked = LoadOptions.of(ttl, tags, **options)
            found |= await self._loads.fetch_many(AsyncRunner(self._link), missing, loader, checked)
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
        **options: Unpack[LoadKeywords],
    ) -> Any:
        """As `Cache.get_or_load`. A plain loader runs in the calling thread, or, where it may have to go on by itself, in
        one of its own; a coroutine function runs in the event loop of the cache."""
        if type(key) is not str:
            check_key(key)
        request = Get(key)
        reply = self._turn_get(request)
        if type(reply) is Found and (
            not options or (options.keys() <= LOAD_OPTIONS and options.get("idle_ttl") is None)
        ):
            return reply.value
        check_key(key)
        link = self.link
        found: Any = reply if isinstance(reply, Found | Missing) else run(link.finish_blocking(request, reply))
        checked = LoadOptions.of(ttl, tags, **options)
        wants_context, asynchronous = kind_of(loader)
        job = LoadJob(key, loader, checked, checked.tags, asynchronous, not isinstance(reply, Reply), wants_context)
        return run(self._loads.deliver(ThreadRunner(link), job, found))

    def get_or_load_many(
        self,
        keys: Iterable[str],
        loader: Loader,
        *,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        **options: Unpack[ManyLoadKeywords],
    ) -> dict[str, Any]:
        """As `Cache.get_or_load_many`."""
        if unknown := options.keys() - MANY_LOAD_OPTIONS:
            raise TypeError(f"there is no option {min(unknown)!r} of get_or_load_many")
        wanted = check_keys(keys)
        found = self.get_many(wanted)
        if missing := [key for key in dict.fromkeys(wanted) if key not in found]:
            checked = LoadOptions.of(ttl, tags, **options)
            found |= run(self._loads.fetch_many(ThreadRunner(self.link), missing, loader, checked))
        return {key: found[key] for key in wanted if key in found}
