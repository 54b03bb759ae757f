"""What every store asks of a request for a lease."""

from __future__ import annotations

import math

from cachebus.messages import BadMessage, GetOrLease, RenewLease
from cachebus.messages.leases import ASKED_MAX


def check_lease(request: GetOrLease | RenewLease) -> None:
    """Raise `BadMessage` for what cannot be a lease."""
    if isinstance(request, GetOrLease) and len(request.token.encode("utf-8", "surrogatepass")) > ASKED_MAX:
        raise BadMessage(f"the token that a lease is asked for as has {ASKED_MAX} bytes at most")
    if not 0 < request.lease_ttl < math.inf:
        raise BadMessage(f"lease_ttl must be a positive number of seconds, not {request.lease_ttl!r}")
