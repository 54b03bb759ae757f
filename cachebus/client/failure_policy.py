"""The health of a backend, and the meaning of its failures to a caller.

With `on_error="miss"` the application goes on without its cache. This is the one place that decides it, for `Cache`,
`SyncCache` and what is built on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar, cast

from msgspec import Struct

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
"""The errors of the backend, which may pass. All others say that the program or its settings are wrong, or that the cache is
closed: they are raised whatever `on_error` says."""

FAILED_READ = Missing()
"""The fallback for a `Get`: it shows that the backend fails, so that the caller sends it no more requests."""

_STAND_INS: Mapping[type[Request[Any]], tuple[str, Callable[[], Reply]]] = {
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
"""For each request that may fail unnoticed: the outcome in `RequestFailed`, and the reply in place of the backend's."""

_RAISED: tuple[str, Callable[[], Reply] | None] = ("raised", None)


class Health(Struct, frozen=True):
    """The health of a backend. `ok` says that it answered, `latency` is the seconds that took, `detail` what went wrong.

    `circuit` is the state of the guard before the backend's server: `closed`, `open` (it gets no requests), `half_open` (it
    is being tried), or empty if there is no guard or its state is unknown.
    """

    ok: bool
    backend: str
    latency: float
    detail: str = ""
    circuit: str = ""


class FailurePolicy:
    """Handles the failures of one backend for one cache, and counts them: `errors` in all, and of these `dropped_writes`. Usable
    from any thread."""

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
        """Return the fallback for a failed request, or raise. `allow` is for a rate limit that admits everything then.

        Raises `error` if the cache is to raise, or if no reply would be true, as for an increment. An invalidation that may not
        have been carried out is a `CacheInvalidationError`: ignoring it would serve stale values once the backend is back.
        """
        if isinstance(error, CacheTimeoutError) and not request.IDEMPOTENT:
            error.in_doubt = True
        outcome, stand_in = _RAISED
        if allow:
            outcome, stand_in = "admitted", lambda: messages.Admitted(0)
        elif self.on_error == "miss":
            outcome, stand_in = _STAND_INS.get(type(request), _RAISED)
        with self._guard:
            self.errors += 1
            self.dropped_writes += outcome == "dropped"
        name, key = request.WIRE_NAME, getattr(request, "key", "")
        self._emitter.emit(RequestFailed, request=name, error=error.code, outcome=outcome, key=key)
        if stand_in is not None:
            return cast("R", stand_in())
        if self.on_error == "miss" and request.INVALIDATES:
            named = name.removeprefix("backend.")
            raise messages.CacheInvalidationError(f"{named} may not have been carried out: {error}") from error
        raise error
