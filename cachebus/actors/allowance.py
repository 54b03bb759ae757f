"""What may take longer than usual, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachebus.messages import Clear, DeletePattern, Request

LONG = frozenset[type[Request[Any]]]({Clear, DeletePattern})
"""Requests whose duration grows with the number of keys: they have the longest timeout, and say nothing of others."""

SLOWEST_LINE = 10e6
"""Bytes a second below which a backend counts as not answering: what a batch's own values may take on top."""


def allowance(batch: Sequence[Request[Any]], longest: float) -> float:
    """Seconds that a batch may take longer than others: for its size, or, `longest`, for what it asks."""
    if not LONG.isdisjoint(map(type, batch)):
        return longest
    return sum(len(value) for each in batch if isinstance(value := getattr(each, "value", None), bytes | str)) / (
        SLOWEST_LINE
    )
