"""Validation of durations and tokens in requests, which may come from any client on the bus."""

from __future__ import annotations

import math

from cachebus.messages import BadMessage, GetOrLease, LoadMetadata, RenewLease
from cachebus.messages.leases import ASKED_MAX

LONGEST = 1e12
"""Maximum duration in seconds (31,000 years). Servers reject durations that overflow when the current time is added."""


def time_to_live(ttl: float) -> float:
    """Return the time to live in seconds, at most `LONGEST`. Raises `BadMessage` unless it is positive and finite."""
    if not 0 < ttl < math.inf:
        raise BadMessage(f"ttl must be a positive, finite number of seconds, not {ttl!r}")
    return min(ttl, LONGEST)


def time_stale(origin: LoadMetadata | None) -> float:
    """Return the seconds for which a value may be served stale, at most `LONGEST`, or 0 for NaN or no metadata."""
    return 0.0 if origin is None else min(max(0.0, origin.stale_for), LONGEST)


def check_lease(request: GetOrLease | RenewLease) -> None:
    """Raise `BadMessage` if a lease request is invalid."""
    if isinstance(request, GetOrLease) and len(request.token.encode("utf-8", "surrogatepass")) > ASKED_MAX:
        raise BadMessage(f"token must have at most {ASKED_MAX} bytes")
    if not 0 < request.lease_ttl < math.inf:
        raise BadMessage(f"lease_ttl must be a positive, finite number of seconds, not {request.lease_ttl!r}")
