"""The way from a facade to the lock manager, and what renews the locks that this process holds."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from cachebus.actors import Timers
from cachebus.bus import Address, Bus
from cachebus.bus.tasks import spawn
from cachebus.messages import CacheError, Request

from .renewals import PER_LEASE, Renewals

R = TypeVar("R")

LOCKS = Address("locks")
"""Where the lock manager is, if settings say where locks are kept; else one is beside each backend, at `locks.<backend>`."""

PER_LEASE_IN_TROUBLE = 12
"""How often a lock is renewed within its own time after a renewal that failed."""


class Renewable(Protocol):
    """A lock that is held."""

    ttl: float

    async def renew(self) -> bool:
        """Renew it; says whether there is a point in going on. Raises `CacheError` when it is not known what became of
        it."""
        ...


class LockWay:
    """A bus, where the manager is, the time that a call may take, in seconds, and the locks that are held over it. One for each node.

    They are renewed on the node's event loop. Usable from any thread.
    `why_not` is set where there is no manager to ask.
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
        return f"<LockWay to {self.address}, {len(self._renewals)} held>"

    def now(self) -> float:
        """The clock by which leases end."""
        return self.bus.clock.monotonic()

    async def ask(self, request: Request[R], patience: float = 0.0) -> R:
        """Ask the manager, awaiting the reply for `patience` seconds more than a call may take."""
        self._check()
        return await self.bus.request(self.address, request, self.timeout + patience)

    async def ask_blocking(self, request: Request[R], patience: float = 0.0) -> R:
        """As `ask`, blocking this thread; a coroutine that never suspends."""
        self._check()
        return self.bus.request_blocking(self.address, request, self.timeout + patience)

    def send(self, request: Request[Any]) -> None:
        """Send what nobody waits for."""
        if self._why_not is None:
            self.bus.send(self.address, request)

    def hold(self, ticket: str, lock: Renewable) -> None:
        """Renew a lock from now on."""
        due = self.now() + lock.ttl / PER_LEASE
        self._renewals.track(ticket, self._timers, due, lambda: self._renew(ticket, lock))

    def let_go(self, ticket: str) -> None:
        """Renew a lock no longer."""
        self._renewals.untrack(ticket)

    def _check(self) -> None:
        if self._why_not is not None:
            raise self._why_not

    def _renew(self, ticket: str, lock: Renewable) -> None:
        async def renew() -> None:
            started, share = self.now(), PER_LEASE
            try:
                if not await lock.renew():
                    self.let_go(ticket)
                    return
            except CacheError:
                started, share = self.now(), PER_LEASE_IN_TROUBLE
            self._renewals.postpone(ticket, self._timers, started + lock.ttl / share)

        spawn(renew, lambda: None)
