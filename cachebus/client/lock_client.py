"""Client through which the locks of a node reach their manager."""

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
"""Address of the lock manager, if settings say where locks are kept; else each backend has one, at `locks.<backend>`."""

PER_LEASE_IN_TROUBLE = 12
"""How often a lock is renewed within its own time after a renewal that failed."""


class LockClient:
    """Client through which the locks of a node reach their manager. Usable from any thread.

    `timeout` is the seconds that a call may take. Locks are renewed on the event loop of the node. `why_not` is raised by every
    request if there is no manager.
    """

    def __init__(
        self, bus: Bus, address: Address, timeout: float, timers: Timers, why_not: CacheError | None = None
    ) -> None:
        self.bus = bus
        self.address = address
        self.timeout = timeout
        self._why_not = why_not
        self._timers = timers
        self._renewals = Renewals()

    def __repr__(self) -> str:
        return f"<LockClient to {self.address}, {len(self._renewals)} held>"

    def now(self) -> float:
        """Return the time by which locks end, in seconds."""
        return self.bus.clock.monotonic()

    async def ask(self, request: Request[R], patience: float = 0.0, *, blocking: bool = False) -> R:
        """Ask the manager, awaiting the reply for `patience` seconds more than a call may take.

        With `blocking` it blocks this thread: a coroutine that never suspends.
        """
        if self._why_not is not None:
            raise self._why_not
        timeout = self.timeout + patience
        if blocking:
            return self.bus.request_blocking(self.address, request, timeout)
        return await self.bus.request(self.address, request, timeout)

    def send(self, request: Request[Any]) -> None:
        """Send a request without awaiting the reply."""
        if self._why_not is None:
            self.bus.send(self.address, request)

    def track(self, ticket: str, ttl: float, renew: Callable[[], Awaitable[bool]]) -> None:
        """Call `renew` from now on, before each `ttl` seconds are over. It returns whether the lock is still held."""

        async def renew_once() -> None:
            started, share = self.now(), PER_LEASE
            try:
                if not await renew():
                    self.untrack(ticket)
                    return
            except CacheError:
                started, share = self.now(), PER_LEASE_IN_TROUBLE
            self._renewals.postpone(ticket, self._timers, started + ttl / share)

        def renew_in_background() -> None:
            spawn(renew_once())

        self._renewals.track(ticket, self._timers, self.now() + ttl / PER_LEASE, renew_in_background)

    def untrack(self, ticket: str) -> None:
        """Stop renewing a lock."""
        self._renewals.untrack(ticket)
