"""The synchronous facade: a `Cache` whose client blocks instead of suspending.

Its coroutines finish in one step, so both facades share one implementation.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from cachebus.bus import Turn
from cachebus.client.backend_client import BackendClient
from cachebus.client.background_loop import BACKGROUND, Hosted, blocking, mirrored, run
from cachebus.client.validation import Duration, TimeToLive, check_key, set_request
from cachebus.loading import cached_function
from cachebus.loading.coordinator import LoadCoordinator
from cachebus.loading.leased_load import LoadJob
from cachebus.loading.loaders import Loader, kind_of
from cachebus.loading.options import LOAD_OPTIONS, LoadKeywords, LoadOptions, LoadTtl
from cachebus.loading.runners import ThreadRunner
from cachebus.messages import CacheClosed, Found, Get, Stored
from cachebus.node.node import Node

from .cache import Cache
from .locks import SyncLock
from .rate_limiter import AsyncRateLimiter, OnLimitError, RateLimiter, admit_request

if TYPE_CHECKING:
    from cachebus.payload.pipeline import PayloadPipeline


class SyncCache:
    """A cache with one backend for code without an event loop. Safe to use from any number of threads.

    Returned by `open_sync_cache`. It opens on first use, or with `with`. In a forked child it is unopened and opens
    again on first use. The methods are those of `Cache`, without `await`. A call that would block the event loop it
    waits for raises `CacheError`.
    """

    def __init__(self, make_node: Callable[[], Node], name: str | None = None) -> None:
        self._make_node = make_node
        self._name = name
        self.loads = LoadCoordinator()
        self._closed = False
        self.begin()
        _caches.add(self)

    def begin(self) -> None:
        """Reset to the unopened state, for a new cache or in a forked child."""
        self.loads.forked()
        self._guard = threading.Lock()
        self._hosted: Hosted | None = None
        self._unopen()

    def _unopen(self) -> None:
        self._cache: Cache | None = None
        self._try_inline_get: Turn = self._first_turn
        self._try_inline_set: Turn = self._first_turn

    def _first_turn(self, request: Any) -> Any:
        client = self.client  # Opens the cache, unless it is closed.
        return client.try_inline_get(request) if type(request) is Get else client.try_inline_set(request)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "unopened" if self._cache is None else str(self._cache.client.address)
        return f"<{type(self).__name__} {state}>"

    def __enter__(self) -> Self:
        self._opened()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Finish the calls in progress and reject new ones. Safe to call twice."""
        with self._guard:
            self._closed = True
            self._unopen()
            hosted, self._hosted = self._hosted, None
        if hosted is not None:
            BACKGROUND.value.run(hosted.close)

    def _opened(self) -> Cache:
        cache = self._cache
        if cache is not None:
            return cache
        with self._guard:
            if self._closed:
                raise CacheClosed("the cache is closed")
            if self._cache is None:
                node = self._make_node()
                hosted = Hosted(node)
                BACKGROUND.value.run(hosted.open)
                self._hosted = hosted
                client = node.client(self._name)
                cache = Cache(self._make_node, self._name).attach(client, blocking=True)
                cache.loads = self.loads
                self._cache = cache
                self._try_inline_get, self._try_inline_set = client.try_inline_get, client.try_inline_set
            return self._cache

    _inner = property(_opened)  # For `mirrored`.

    @property
    def blocking_cache(self) -> Cache:
        """A `Cache` whose coroutines block instead of suspending, for libraries built on caches. Opens the cache."""
        return self._opened()

    @property
    def client(self) -> BackendClient:
        """Client of the backend. Opens the cache if it is not open yet."""
        return self._opened().client

    @property
    def payloads(self) -> PayloadPipeline | None:
        """See `Cache.payloads`. Opens the cache if it is not open yet."""
        return self._opened().payloads

    # The hot paths are written out, for the reasons given in `Cache`.

    def get(self, key: str, default: Any = None) -> Any:
        """See `Cache.get`."""
        if type(key) is not str:
            check_key(key)
        request = Get(key)
        reply = self._try_inline_get(request)
        if type(reply) is Found:
            return reply.value
        found = run(self._opened().finish_get(request, reply))
        return found.value if isinstance(found, Found) else default

    def set(
        self,
        key: str,
        value: Any,
        *,
        ttl: TimeToLive = "default",
        tags: Iterable[str] = (),
        only_if: Literal["absent", "present"] | None = None,
    ) -> bool:
        """See `Cache.set`."""
        request = set_request(key, value, ttl, tags, only_if)
        reply = self._try_inline_set(request)
        return type(reply) is Stored or isinstance(run(self.client.wait_reply(request, reply, blocking=True)), Stored)

    def get_or_load(
        self,
        key: str,
        loader: Loader,
        *,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        **options: Unpack[LoadKeywords],
    ) -> Any:
        """See `Cache.get_or_load`.

        A plain loader runs in the calling thread, or in a new thread if the load may outlast the call. A coroutine
        function runs on the event loop of the cache.
        """
        if type(key) is not str:
            check_key(key)
        request = Get(key)
        reply = self._try_inline_get(request)
        if type(reply) is Found and (
            not options or (options.keys() <= LOAD_OPTIONS and options.get("idle_ttl") is None)
        ):
            return reply.value
        check_key(key)
        checked = LoadOptions.of(ttl, tags, **options)
        wants_context, asynchronous = kind_of(loader)
        job = LoadJob(key, loader, checked, checked.tags, asynchronous, wants_context)
        return run(self.loads.deliver(ThreadRunner(self.client), job, request, reply))

    # The rest of `Cache`

    lookup = blocking(Cache.lookup)
    get_typed = blocking(Cache.get_typed)
    get_many = blocking(Cache.get_many)
    get_or_load_many = blocking(Cache.get_or_load_many)
    exists = blocking(Cache.exists)
    ttl = blocking(Cache.ttl)
    set_many = blocking(Cache.set_many)
    add = blocking(Cache.add)
    compare_and_set = blocking(Cache.compare_and_set)
    touch = blocking(Cache.touch)
    increment = blocking(Cache.increment)
    delete = blocking(Cache.delete)
    delete_many = blocking(Cache.delete_many)
    delete_pattern = blocking(Cache.delete_pattern)
    invalidate_tags = blocking(Cache.invalidate_tags)
    clear = blocking(Cache.clear)
    statistics = blocking(Cache.statistics)
    health = blocking(Cache.health)
    events = mirrored(Cache.events, lambda subscription: subscription)
    lock = mirrored(Cache.lock, SyncLock)
    cached = cached_function.cached

    def scan(self, pattern: str = "*") -> Iterator[str]:
        """See `Cache.scan`."""
        cache, cursor = self._opened(), ""
        while True:
            page = run(cache.scan_page(pattern, cursor))
            yield from page.keys
            if not (cursor := page.cursor):
                return

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
    ) -> RateLimiter:
        """See `Cache.rate_limit`. Call `check()` on the result to get a `RateLimit`, or use it with `with`."""
        request = admit_request(name, limit, per, burst, cost, wait, on_error)
        return RateLimiter(AsyncRateLimiter(lambda: ThreadRunner(self.client), request, on_error))


_caches: weakref.WeakSet[SyncCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_caches):
        cache.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
