"""Client through which the locks of a node reach the lock manager."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from cachebus.actors import Timers
from cachebus.bus import Address, Bus
from cachebus.bus.spawn import spawn
from cachebus.messages import CacheError, Request

from .renewals import PER_LEASE, Renewals

R = TypeVar("R")

LOCKS = Address("locks")
"""Address of the lock manager if the settings have `locks`. Otherwise each backend has one at `locks.<backend>`."""

PER_LEASE_AFTER_FAILURE = 12
"""Number of renewals per `ttl` of a lock after a failed renewal."""


class LockClient:
    """Client through which the locks of a node reach the lock manager. Safe to use from any thread.

    `timeout` is the time limit of a call, in seconds. Locks are renewed on the event loop of the node. If the node has
    no lock manager, every request raises `unavailable`.
    """

    def __init__(
        self, bus: Bus, address: Address, timeout: float, timers: Timers, unavailable: CacheError | None = None
    ) -> None:
        self.bus = bus
        self.address = address
        self.timeout = timeout
        self._unavailable = unavailable
        self._timers = timers
        self._renewals = Renewals()

    def __repr__(self) -> str:
        return f"<LockClient to {self.address}, {len(self._renewals)} held>"

    def now(self) -> float:
        """Return the current time of the clock that measures lock expiry, in seconds."""
        return self.bus.clock.monotonic()

    async def ask(self, request: Request[R], patience: float = 0.0, *, blocking: bool = False) -> R:
        """Send a request to the lock manager and return its reply. The time limit is `timeout` plus `patience` seconds.

        With `blocking`, the coroutine blocks the thread and never suspends.
        """
        if self._unavailable is not None:
            raise self._unavailable
        timeout = self.timeout + patience
        if blocking:
            return self.bus.request_blocking(self.address, request, timeout)
        return await self.bus.request(self.address, request, timeout)

    def send(self, request: Request[Any]) -> None:
        """Send a request without waiting for the reply."""
        if self._unavailable is None:
            self.bus.send(self.address, request)

    def track(self, ticket: str, ttl: float, renew: Callable[[], Awaitable[bool]]) -> None:
        """Start calling `renew` several times per `ttl`, until it returns False because the lock is no longer held."""

        async def renew_once() -> None:
            started, share = self.now(), PER_LEASE
            try:
                if not await renew():
                    self.untrack(ticket)
                    return
            except CacheError:
                started, share = self.now(), PER_LEASE_AFTER_FAILURE
            self._renewals.postpone(ticket, self._timers, started + ttl / share)

        def renew_in_background() -> None:
            spawn(renew_once())

        self._renewals.track(ticket, self._timers, self.now() + ttl / PER_LEASE, renew_in_background)

    def untrack(self, ticket: str) -> None:
        """Stop renewing a lock."""
        self._renewals.untrack(ticket)
