"""Failure policy: the result of a call whose backend failed.

With `on_error="miss"` the application continues without its cache. `Cache`, `SyncCache` and everything built on them
use this one policy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar, cast

from cachebus import messages
from cachebus.bus import Emitter
from cachebus.messages import CacheError, CacheTimeoutError, Missing, Reply, Request, RequestFailed

R = TypeVar("R")
OnError: TypeAlias = Literal["miss", "raise"]

BACKEND_FAILURES = (
    messages.CacheBackendError,
    CacheTimeoutError,
    messages.CircuitOpen,
    messages.Overloaded,
    messages.ActorFailed,
    messages.NoSuchActor,
)
"""Errors of the backend, which may be temporary. All other errors mean a mistake in the program or its settings, or a
closed cache; they are raised whatever `on_error` is."""

FAILED_READ = Missing()
"""Fallback for a `Get`. The caller recognises it by identity and sends the failing backend no further requests."""

_FALLBACKS: Mapping[type[Request[Any]], tuple[str, Callable[[], Reply]]] = {
    messages.Get: ("missed", lambda: FAILED_READ),
    messages.GetMany: ("missed", lambda: messages.FoundMany({})),
    messages.Exists: ("missed", Missing),
    messages.Scan: ("missed", lambda: messages.Scanned(())),
    messages.GetOrLease: ("missed", messages.NotHeld),  # Its caller loads without a lease, and stores nothing.
    messages.Set: ("dropped", messages.NotStored),
    messages.SetMany: ("dropped", lambda: messages.StoredMany(0)),
    messages.Add: ("dropped", messages.NotStored),
    messages.CompareAndSet: ("dropped", messages.NotStored),
    messages.Touch: ("dropped", Missing),
}
"""For each request that may fail without raising: the outcome in `RequestFailed`, and the fallback reply."""

_RAISED: tuple[str, Callable[[], Reply] | None] = ("raised", None)


class FailurePolicy:
    """Policy for the failures of one backend, as seen by one cache. Safe to use from any thread.

    `errors` counts all failures; `dropped_writes` counts those of writes that were dropped.
    """

    __slots__ = ("_emitter", "_guard", "dropped_writes", "errors", "on_error")

    def __init__(self, on_error: OnError, emitter: Emitter) -> None:
        self.on_error = on_error
        self.errors = 0
        self.dropped_writes = 0
        self._emitter = emitter
        self._guard = threading.Lock()

    def __repr__(self) -> str:
        return f"<FailurePolicy {self.on_error}, {self.errors} errors, {self.dropped_writes} dropped writes>"

    def resolve(self, request: Request[R], error: CacheError, *, allow: bool = False) -> R:
        """Return the fallback for a failed request, or raise. `allow` returns the fallback of an allowed rate limit.

        Raises `error` if `on_error` is `"raise"`, or if the request has no truthful fallback, such as an increment.
        Raises `CacheInvalidationError` for an invalidation that may not have taken effect: ignoring it would serve
        stale values once the backend recovers.
        """
        if isinstance(error, CacheTimeoutError) and not request.IDEMPOTENT:
            error.in_doubt = True
        outcome, fallback = _RAISED
        if allow:
            outcome, fallback = "admitted", lambda: messages.Admitted(0)
        elif self.on_error == "miss":
            outcome, fallback = _FALLBACKS.get(type(request), _RAISED)
        with self._guard:
            self.errors += 1
            self.dropped_writes += outcome == "dropped"
        name, key = request.WIRE_NAME, getattr(request, "key", "")
        self._emitter.emit(RequestFailed, request=name, error=error.code, outcome=outcome, key=key)
        if fallback is not None:
            return cast("R", fallback())
        if self.on_error == "miss" and request.INVALIDATES:
            named = name.removeprefix("backend.")
            raise messages.CacheInvalidationError(f"{named} may not have taken effect: {error}") from error
        raise error
