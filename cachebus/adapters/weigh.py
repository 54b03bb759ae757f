"""How many bytes a value takes in this process, roughly."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import Any

ENTRY_OVERHEAD = 250
"""Bytes that a store spends on an entry besides the value: the entry, its key, its places in dict and wheel."""

_MAX_OBJECTS = 10_000


def estimate_size(value: Any) -> int:
    """The bytes that `value` and what it holds take, counting what is reached by several ways once.

    Containers, instance dictionaries and slots are followed; arrays say it themselves (`nbytes`). Past 10,000 objects
    the rest of a value is taken to be like what was seen of it, so a value costs at most some milliseconds.
    """
    seen: set[int] = set()
    stack = [value]
    total = 0
    largest = 0
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        size = sys.getsizeof(current, 64)
        if not isinstance(current, (str, bytes, bytearray, int, float, complex, type, type(None))):
            nbytes = getattr(current, "nbytes", None)
            if isinstance(nbytes, int):
                size = max(size, nbytes)  # An array that owns its data counts them in its size already.
            else:
                stack.extend(_parts(current))
                largest = max(largest, size)
        total += size
        if len(seen) >= _MAX_OBJECTS:
            # Less the largest container: its size is that of places for all its parts, and counted whole.
            return total + (total - largest) * len(stack) // len(seen)
    return total


def _parts(current: Any) -> Iterable[Any]:
    kind = current.__class__
    if issubclass(kind, dict):
        yield from current.keys()
        yield from current.values()
    elif issubclass(kind, (list, tuple, set, frozenset, deque)):
        yield from current
    yield from getattr(current, "__dict__", {}).values()
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(current, name):
                yield getattr(current, name)
