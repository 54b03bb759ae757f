"""Checks of durations and tokens in requests, which may come from any client on the bus."""

from __future__ import annotations

import math

from cachebus.messages import BadMessage, GetOrLease, LoadMetadata, RenewLease
from cachebus.messages.leases import ASKED_MAX

LONGEST = 1e12
"""Seconds: 31,000 years. Longer ones count as this: servers refuse what overflows when they add the time of day."""


def time_to_live(ttl: float) -> float:
    """Return the seconds to live, `LONGEST` at most. Raises `BadMessage` for what is not positive and finite."""
    if not 0 < ttl < math.inf:
        raise BadMessage(f"ttl must be a positive number of seconds, and finite, not {ttl!r}")
    return min(ttl, LONGEST)


def time_stale(origin: LoadMetadata | None) -> float:
    """Return the seconds, `LONGEST` at most, for which a value may be served stale; 0 for what is no number."""
    return 0.0 if origin is None else min(max(0.0, origin.stale_for), LONGEST)


def check_lease(request: GetOrLease | RenewLease) -> None:
    """Raise `BadMessage` for what cannot be a lease."""
    if isinstance(request, GetOrLease) and len(request.token.encode("utf-8", "surrogatepass")) > ASKED_MAX:
        raise BadMessage(f"the token that a lease is asked for as has {ASKED_MAX} bytes at most")
    if not 0 < request.lease_ttl < math.inf:
        raise BadMessage(f"lease_ttl must be a positive number of seconds, not {request.lease_ttl!r}")
