"""The leases that this process holds, renewed for as long as their loads run."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cachebus.messages import RenewLease

from .link import Link
from .singleflight import InFlightLoad

PER_LEASE = 3
"""How often a lease is renewed within its own time, so that one lost renewal does not lose it."""


class _Held:
    __slots__ = ("due", "end", "in_flight", "key", "lease_ttl", "link")

    def __init__(
        self, link: Link, key: str, lease_ttl: float, due: float, in_flight: InFlightLoad, end: Callable[[], None]
    ) -> None:
        self.link: Link = link
        self.key = key
        self.lease_ttl = lease_ttl
        self.due: float = due
        self.in_flight = in_flight
        self.end = end


class Renewals:
    """Renews leases. One timer for all of them, and none while there are none. Usable from any thread.

    The lease of a load that ended without giving it back, as that of an interrupted thread, is not renewed but ended.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._armed_for: float = float("inf")

    def __len__(self) -> int:
        return len(self._held)

    def hold(
        self, link: Link, key: str, token: str, lease_ttl: float, in_flight: InFlightLoad, end: Callable[[], None]
    ) -> None:
        """Renew a lease from now on; `end` ends it, should its load be over by then."""
        now = link.bus.clock.monotonic()
        due = now + lease_ttl / PER_LEASE
        with self._guard:
            self._held[token] = _Held(link, key, lease_ttl, due, in_flight, end)
            sooner = due < self._armed_for
            if sooner:
                self._armed_for = due
        if sooner:
            link.call_after(due - now, lambda: self._ring(due))

    def let_go(self, token: str) -> None:
        """Renew a lease no longer."""
        if token not in self._held:
            return
        with self._guard:
            self._held.pop(token, None)

    def _ring(self, when: float) -> None:
        with self._guard:
            if when != self._armed_for:
                return  # An earlier one was set since, and goes on for both.
            held = list(self._held.items())
            self._armed_for = float("inf")
        earliest: _Held | None = None
        now = when
        for token, each in held:
            if each.in_flight.resolved or each.in_flight.is_orphan():
                self.let_go(token)
                each.end()
                continue
            now = each.link.bus.clock.monotonic()
            if each.due <= now:
                each.due = now + each.lease_ttl / PER_LEASE
                each.link.send(RenewLease(each.key, token, each.lease_ttl))
            if earliest is None or each.due < earliest.due:
                earliest = each
        if earliest is None:
            return
        due = earliest.due
        with self._guard:
            sooner = due < self._armed_for
            if sooner:
                self._armed_for = due
        if sooner:
            earliest.link.call_after(due - now, lambda: self._ring(due))
