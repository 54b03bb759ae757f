"""What a backend's failure means to whoever called: with `on_error="miss"` the application goes on without its cache.

The one place that decides it, for `Cache`, `SyncCache` and what is built on them: their links come by here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar, cast

from cachebus.bus import Emitter
from cachebus.messages import (
    ActorFailed,
    Add,
    Admitted,
    CacheBackendError,
    CacheError,
    CacheInvalidationError,
    CacheTimeoutError,
    CircuitOpen,
    CompareAndSet,
    Exists,
    FoundMany,
    Get,
    GetMany,
    GetOrLease,
    Missing,
    NoSuchActor,
    NotHeld,
    NotStored,
    Overloaded,
    Reply,
    Request,
    RequestFailed,
    Scan,
    Scanned,
    Set,
    SetMany,
    StoredMany,
    Touch,
)

R = TypeVar("R")
OnError: TypeAlias = Literal["miss", "raise"]

BACKEND_FAILURES = (CacheBackendError, CacheTimeoutError, CircuitOpen, Overloaded, ActorFailed, NoSuchActor)
"""The errors that are the backend's, and may pass. All others say that the program or its settings are wrong, or that
the cache is closed: they go out whatever `on_error` says."""

MISSED = Missing()
"""The reply that stands for that of a `Get`: whoever holds it knows that the backend fails, and asks it nothing more."""

_READS: Mapping[type[Request[Any]], Callable[[], Reply]] = {
    Get: lambda: MISSED,
    GetMany: lambda: FoundMany({}),
    Exists: Missing,
    Scan: lambda: Scanned(()),
    GetOrLease: NotHeld,  # Who gets it loads without a lease, and stores nothing.
}
_WRITES: Mapping[type[Request[Any]], Callable[[], Reply]] = {
    Set: NotStored,
    SetMany: lambda: StoredMany(0),
    Add: NotStored,
    CompareAndSet: NotStored,
    Touch: Missing,
}


class Failures:
    """Takes the failures of one backend for one cache, and counts them: `errors` in all, and of these
    `dropped_writes`. Usable from any thread."""

    __slots__ = ("_emitter", "_guard", "dropped_writes", "errors", "on_error")

    def __init__(self, on_error: OnError, emitter: Emitter) -> None:
        self.on_error = on_error
        self.errors = 0
        self.dropped_writes = 0
        self._emitter = emitter
        self._guard = threading.Lock()

    def __repr__(self) -> str:
        return f"<Failures {self.on_error}, {self.errors} errors, {self.dropped_writes} dropped writes>"

    def settle(self, request: Request[R], error: CacheError, *, allow: bool = False) -> R:
        """The reply that stands for the one that the backend did not give. `allow` is for a rate limit that lets everybody
        go on then.

        Raises `error` where that is asked for, or where no reply would be true: nobody can make up the sum of an
        increment. An invalidation that may not have been carried out is a `CacheInvalidationError`: to go on in silence
        would serve what is out of date once the backend is back.
        """
        if isinstance(error, CacheTimeoutError) and not request.IDEMPOTENT:
            error.in_doubt = True
        kind = type(request)
        stand_in = (_READS.get(kind) or _WRITES.get(kind)) if self.on_error == "miss" else None
        if allow:
            stand_in = _admitted
        dropped = stand_in is not None and kind in _WRITES
        with self._guard:
            self.errors += 1
            self.dropped_writes += dropped
        if RequestFailed in self._emitter.audience.kinds:
            self._emitter.emit(
                RequestFailed(
                    request=request.WIRE_NAME,
                    error=error.code,
                    outcome="raised"
                    if stand_in is None
                    else "admitted"
                    if allow
                    else "dropped"
                    if dropped
                    else "missed",
                    key=getattr(request, "key", ""),
                )
            )
        if stand_in is not None:
            return cast("R", stand_in())
        if self.on_error == "miss" and request.INVALIDATES:
            raise CacheInvalidationError(f"{_named(request)} may not have been carried out: {error}") from error
        raise error


def _admitted() -> Reply:
    return Admitted(0)


def _named(request: Request[Any]) -> str:
    return request.WIRE_NAME.removeprefix("backend.")
