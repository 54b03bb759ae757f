"""Client through which a facade calls its backend actor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from cachebus.bus import Address, Bus, Emitter, Turn
from cachebus.messages import CacheClosed, Get, GetOrLease, Request, Set
from cachebus.payload.cached_errors import CachedError, unwrap

from .failure_policy import BACKEND_FAILURES, FailurePolicy, OnError

if TYPE_CHECKING:
    from cachebus.actors import Timers
    from cachebus.payload.pipeline import PayloadPipeline

    from .lock_client import LockClient

R = TypeVar("R")

UNREAD: Any = object()
"""Sentinel for a value that `value_of` cannot decode inline; `wait_reply` decodes it."""


class BackendClient:
    """Client through which a facade calls its backend actor. `timeout` is the time limit of a call, in seconds.

    `try_inline_get`, `try_inline_set` and `try_inline_lease` run the actor's turn on the caller's stack if possible.
    `epoch` is the Unix time at which the monotonic clock was 0, so later jumps of the wall clock have no effect.
    `timers` are the timers of the node, on its event loop; `locks` is the client of its lock manager. With `blocking`,
    a coroutine blocks the thread and never suspends.
    """

    __slots__ = (
        "address",
        "bus",
        "emitter",
        "epoch",
        "failures",
        "locks",
        "timeout",
        "timers",
        "try_inline_get",
        "try_inline_lease",
        "try_inline_set",
    )

    locks: LockClient

    def __init__(
        self,
        bus: Bus,
        address: Address,
        timeout: float,
        emitter: Emitter,
        timers: Timers,
        on_error: OnError = "raise",
    ) -> None:
        self.timers = timers
        self.bus = bus
        self.address = address
        self.timeout = timeout
        self.emitter = emitter
        self.epoch = bus.clock.wall() - bus.clock.monotonic()
        self.failures = FailurePolicy(on_error, emitter)
        recipient = bus.recipient(address)
        self.try_inline_get: Turn = recipient.turn(Get)
        self.try_inline_set: Turn = recipient.turn(Set)
        self.try_inline_lease: Turn = recipient.turn(GetOrLease)

    @property
    def pipeline(self) -> PayloadPipeline | None:
        """Pipeline that encodes values as payloads, or `None` if values stay objects."""
        return None

    def value_of(self, key: str, value: Any, default: Any) -> Any:
        """Return the caller's value for a stored one, `default` if it is a cached exception, or `UNREAD`."""
        return default if type(value) is CachedError else value

    async def request(self, message: Request[R], patience: float = 0.0, *, blocking: bool = False) -> R:
        """Send a request and return its reply, or the fallback of `FailurePolicy`.

        The time limit is `timeout` plus `patience` seconds.
        """
        timeout = self.timeout + patience
        try:
            if blocking:
                return unwrap(self.bus.request_blocking(self.address, message, timeout))
            return unwrap(await self.bus.request(self.address, message, timeout))
        except BACKEND_FAILURES as error:
            return self.failures.resolve(message, error)

    async def request_unguarded(self, message: Request[R], patience: float = 0.0, *, blocking: bool = False) -> R:
        """Send a request and return its reply, or raise the error unchanged. Failures are not counted.

        The time limit is `timeout` plus `patience` seconds.
        """
        timeout = self.timeout + patience
        if blocking:
            return self.bus.request_blocking(self.address, message, timeout)
        return await self.bus.request(self.address, message, timeout)

    async def wait_reply(self, message: Request[R], reply: Any, *, blocking: bool = False) -> R:
        """Return the reply to a message whose inline turn returned `reply`, or the fallback of `FailurePolicy`."""
        try:
            if blocking:
                return unwrap(self.bus.wait_reply_blocking(self.address, message, reply, self.timeout))
            return unwrap(await self.bus.wait_reply(self.address, message, reply, self.timeout))
        except BACKEND_FAILURES as error:
            return self.failures.resolve(message, error)

    def send(self, message: Request[Any]) -> None:
        """Send a message without waiting for the reply."""
        self.bus.send(self.address, message)


class ClosedClient(BackendClient):
    """Client of a closed cache. Every use raises `CacheClosed` with the reason."""

    __slots__ = ("_why",)

    def __init__(self, why: str) -> None:
        self._why = why
        self.try_inline_get = self.try_inline_set = self.try_inline_lease = self._refuse

    @property
    def pipeline(self) -> NoReturn:
        raise CacheClosed(self._why)

    def __getattr__(self, name: str) -> NoReturn:
        # Reached for the unset slots of BackendClient, from any of its methods.
        raise CacheClosed(self._why)

    def _refuse(self, message: Any) -> NoReturn:
        raise CacheClosed(self._why)
