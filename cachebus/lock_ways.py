"""The way from a facade to the lock manager, and what renews the locks that this process holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from cachebus.bus import Address, Bus
from cachebus.bus.tasks import spawn
from cachebus.messages import CacheError, Request

R = TypeVar("R")
CallAfter = Callable[[float, Callable[[], None]], object]

LOCKS = Address("locks")
"""Where the lock manager is, if settings say where locks are kept; else one is beside each backend, at `locks.<backend>`."""

PER_LEASE = 3
"""How often a lock is renewed within its own time."""

PER_LEASE_IN_TROUBLE = 12
"""The same, after a renewal that failed."""


class Renewable(Protocol):
    """A lock that is held."""

    ttl: float

    async def renew(self) -> bool:
        """Renew it; says whether there is a point in going on. Raises `CacheError` when it is not known what became of
        it."""
        ...


class _Held:
    __slots__ = ("due", "lock")

    def __init__(self, lock: Renewable, due: float) -> None:
        self.lock = lock
        self.due: float = due


class LockWay:
    """A bus, where the manager is, the time that a call may take, in seconds, and the locks that are held over it. One for each node.

    One timer, on the node's event loop, renews all of them, and none runs while there are none. Usable from any thread.
    `why_not` is set where there is no manager to ask.
    """

    def __init__(
        self, bus: Bus, address: Address, timeout: float, call_after: CallAfter, why_not: CacheError | None = None
    ) -> None:
        self.bus = bus
        self.address = address
        self.timeout = timeout
        self._why_not = why_not
        self._call_after = call_after
        self._guard = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._armed_for: float = float("inf")

    def __repr__(self) -> str:
        return f"<LockWay to {self.address}, {len(self._held)} held>"

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
        with self._guard:
            self._held[ticket] = _Held(lock, due)
        self._arm(due)

    def let_go(self, ticket: str) -> None:
        """Renew a lock no longer."""
        with self._guard:
            self._held.pop(ticket, None)

    def _check(self) -> None:
        if self._why_not is not None:
            raise self._why_not

    def _arm(self, due: float) -> None:
        with self._guard:
            if due >= self._armed_for:
                return
            self._armed_for = due
        self._call_after(due - self.now(), lambda: self._ring(due))

    def _ring(self, when: float) -> None:
        with self._guard:
            if when != self._armed_for:
                return  # An earlier one was set since, and goes on for both.
            self._armed_for = float("inf")
            held = list(self._held.items())
        now = self.now()
        for ticket, each in held:
            if each.due <= now:
                each.due = float("inf")  # Until it is known what came of it.
                self._renew(ticket, each)
        if (earliest := min((each.due for _, each in held), default=float("inf"))) < float("inf"):
            self._arm(earliest)

    def _renew(self, ticket: str, each: _Held) -> None:
        lock = each.lock

        async def renew() -> None:
            started, share = self.now(), PER_LEASE
            try:
                if not await lock.renew():
                    self.let_go(ticket)
                    return
            except CacheError:
                started, share = self.now(), PER_LEASE_IN_TROUBLE
            each.due = started + lock.ttl / share
            if self._held.get(ticket) is each:
                self._arm(each.due)

        spawn(renew(), lambda: None)
