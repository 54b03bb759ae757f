"""Durations as requests say them, which may come from anybody on the bus."""

from __future__ import annotations

import math

from cachebus.messages import BadMessage, LoadMetadata

LONGEST = 1e12
"""Seconds: 31,000 years. What is longer counts as so long, because servers refuse what overflows when they add the time of
day."""


def time_to_live(ttl: float) -> float:
    """Seconds to live, `LONGEST` at most. Raises `BadMessage` for what is not positive and finite."""
    if not 0 < ttl < math.inf:
        raise BadMessage(f"ttl must be a positive number of seconds, and finite, not {ttl!r}")
    return min(ttl, LONGEST)


def time_stale(origin: LoadMetadata | None) -> float:
    """Seconds, `LONGEST` at most, for which a value may be served when its time to live is over; 0 for what is no number."""
    return 0.0 if origin is None else min(max(0.0, origin.stale_for), LONGEST)
