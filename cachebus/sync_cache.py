"""The synchronous facade: `Cache` over a link that blocks instead of suspending.

Its coroutines run to their end at the first step, so there is one implementation of everything.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from cachebus.bus import Subscription, Turn
from cachebus.messages import CacheClosed, Event, Found, Get, Missing, Snapshot, Stored

from .background import BACKGROUND, Hosted
from .cache import Cache, Health
from .cache_limits import SyncCacheLimits
from .cache_loading import SyncCacheLoading
from .cache_locks import SyncCacheLocks
from .cached import Loads
from .checks import Since, TimeToLive, check_key, set_request
from .link import Link, run
from .node import Node

if TYPE_CHECKING:
    from .payload import PayloadPipeline


class SyncCache(SyncCacheLoading, SyncCacheLimits, SyncCacheLocks):
    """A cache over one backend for code without an event loop, usable from any number of threads.

    Made by `open_sync_cache`. It opens at its first use, or with `with`, and in the child of a fork anew: a child begins
    with a cache of its own. Everything else is as in `Cache`, without `await`. A call that would wait for the event loop
    that it is made on is refused with a `CacheError`.
    """

    def __init__(self, make_node: Callable[[], Node], name: str | None = None) -> None:
        self._make_node = make_node
        self._name = name
        self._loads = Loads(self)
        self._closed = False
        self.begin()
        _caches.add(self)

    def begin(self) -> None:
        """Be unopened, as a new cache and one in the child of a fork are."""
        self._loads.forked()
        self._guard = threading.Lock()
        self._hosted: Hosted | None = None
        self._cache: Cache | None = None
        self._turn_get: Turn = self._open_and_get
        self._turn_set: Turn = self._open_and_set

    def __repr__(self) -> str:
        where = "closed" if self._closed else "unopened" if self._cache is None else str(self._cache.link.address)
        return f"<{type(self).__name__} {where}>"

    def __enter__(self) -> Self:
        self._opened()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def link(self) -> Link:
        """The way to the backend. Opens the cache if it is not open yet."""
        return self._opened().link

    def close(self) -> None:
        """Answer what is under way and refuse what comes. Safe to call twice."""
        with self._guard:
            self._closed = True
            self._cache = None
            self._turn_get, self._turn_set = self._open_and_get, self._open_and_set
            hosted, self._hosted = self._hosted, None
        if hosted is not None:
            BACKGROUND.run(hosted.close)

    def _opened(self) -> Cache:
        cache = self._cache
        if cache is not None:
            return cache
        with self._guard:
            if self._closed:
                raise CacheClosed("the cache is closed")
            if self._cache is None:
                node = self._make_node()
                self._hosted = BACKGROUND.run(_host, node)
                link = node.link(self._name)
                self._cache = Cache(self._make_node, self._name).attach(link, blocking=True)
                self._turn_get, self._turn_set = link.turn_get, link.turn_set
            return self._cache

    def _open_and_get(self, message: Any) -> Any:
        return self._opened().link.turn_get(message)

    def _open_and_set(self, message: Any) -> Any:
        return self._opened().link.turn_set(message)

    @property
    def blocking_cache(self) -> Cache:
        """This cache as a `Cache` whose coroutines never suspend. For what is built on caches. Opens the cache."""
        return self._opened()

    @property
    def payloads(self) -> PayloadPipeline | None:
        """As `Cache.payloads`. Opens the cache if it is not open yet."""
        return self._opened().payloads

    # Reading

    def get(self, key: str, default: Any = None) -> Any:
        """As `Cache.get`."""
        # The hot path, written out for the reasons given there.
        if type(key) is not str:
            check_key(key)
        request = Get(key)
        reply = self._turn_get(request)
        if type(reply) is Found:
            return reply.value
        found = run(self._opened().finish_get(request, reply))
        return found.value if isinstance(found, Found) else default

    def lookup(self, key: str) -> Found | Missing:
        """As `Cache.lookup`."""
        return run(self._opened().lookup(key))

    def get_typed(self, key: str, kind: Any, default: Any = None, *, strict: bool = False) -> Any:
        """As `Cache.get_typed`."""
        return run(self._opened().get_typed(key, kind, default, strict=strict))

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """As `Cache.get_many`."""
        return run(self._opened().get_many(keys))

    def exists(self, key: str) -> bool:
        """As `Cache.exists`."""
        return run(self._opened().exists(key))

    def ttl(self, key: str) -> float | None:
        """As `Cache.ttl`."""
        return run(self._opened().ttl(key))

    def scan(self, pattern: str = "*") -> Iterator[str]:
        """As `Cache.scan`."""
        cache, cursor = self._opened(), ""
        while True:
            page = run(cache.scan_page(pattern, cursor))
            yield from page.keys
            if not (cursor := page.cursor):
                return

    # Writing

    def set(
        self,
        key: str,
        value: Any,
        *,
        ttl: TimeToLive = "default",
        tags: Iterable[str] = (),
        only_if: Literal["absent", "present"] | None = None,
    ) -> bool:
        """As `Cache.set`."""
        request = set_request(key, value, ttl, tags, only_if)
        reply = self._turn_set(request)
        return isinstance(reply if type(reply) is Stored else run(self.link.finish_blocking(request, reply)), Stored)

    def set_many(self, items: Mapping[str, Any], *, ttl: TimeToLive = "default", tags: Iterable[str] = ()) -> None:
        """As `Cache.set_many`."""
        run(self._opened().set_many(items, ttl=ttl, tags=tags))

    def add(self, key: str, value: Any, *, ttl: TimeToLive = "default", tags: Iterable[str] = ()) -> bool:
        """As `Cache.add`."""
        return run(self._opened().add(key, value, ttl=ttl, tags=tags))

    def compare_and_set(
        self, key: str, value: Any, *, version: float, ttl: TimeToLive = "default", tags: Iterable[str] = ()
    ) -> bool:
        """As `Cache.compare_and_set`."""
        return run(self._opened().compare_and_set(key, value, version=version, ttl=ttl, tags=tags))

    def touch(self, key: str, *, ttl: TimeToLive = "default") -> bool:
        """As `Cache.touch`."""
        return run(self._opened().touch(key, ttl=ttl))

    def increment(self, key: str, delta: int = 1, *, initial: int | None = 0, ttl: TimeToLive = "default") -> int:
        """As `Cache.increment`."""
        return run(self._opened().increment(key, delta, initial=initial, ttl=ttl))

    # Removing

    def delete(self, key: str) -> bool:
        """As `Cache.delete`."""
        return run(self._opened().delete(key))

    def delete_many(self, keys: Iterable[str]) -> int:
        """As `Cache.delete_many`."""
        return run(self._opened().delete_many(keys))

    def delete_pattern(self, pattern: str) -> int:
        """As `Cache.delete_pattern`."""
        return run(self._opened().delete_pattern(pattern))

    def invalidate_tags(self, *tags: str) -> None:
        """As `Cache.invalidate_tags`."""
        run(self._opened().invalidate_tags(*tags))

    def clear(self) -> None:
        """As `Cache.clear`."""
        run(self._opened().clear())

    # Decorating and watching

    def events(
        self, *what: type[Event] | str, capacity: int = 1024, since: Since = None, local: bool = False
    ) -> Subscription:
        """As `Cache.events`; iterate with `for` within `with`, or call `next(timeout)`."""
        return self._opened().events(*what, capacity=capacity, since=since, local=local)

    def statistics(self) -> Snapshot:
        """As `Cache.statistics`."""
        return run(self._opened().statistics())

    def health(self) -> Health:
        """As `Cache.health`."""
        return run(self._opened().health())


async def _host(node: Node) -> Hosted:
    hosted = Hosted(node)
    await hosted.open()
    return hosted


_caches: weakref.WeakSet[SyncCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_caches):
        cache.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
