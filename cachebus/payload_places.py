"""Where the values of the user's are in messages: which kinds carry one, how large it is, and putting another in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from msgspec.structs import replace

from cachebus.messages import FoundMany, Incremented, LeaseGranted, Message


def size(payloads: Iterable[Any]) -> int:
    return sum(len(each) for each in payloads if type(each) is bytes)


def size_of(reply: Any) -> int:
    """How many bytes of payloads are in a reply."""
    if type(reply) is FoundMany:
        return size(found.value for found in reply.entries.values())
    if type(reply) is LeaseGranted:
        reply = reply.stale
    return size([getattr(reply, "value", None)])


def _carries_value(kind: Any) -> bool:
    """Whether messages of a kind carry a value of the user's. Of every kind there will be: one that is forgotten would hand out
    payloads."""
    return issubclass(kind, Message) and kind is not Incremented and "value" in kind.__struct_fields__


has_value: Callable[[Any], bool] = functools.cache(_carries_value)


def with_value(message: Any, value: Any) -> Any:
    """The same message with another value. A new object: whoever sent it may send it again, and two may share a reply."""
    return replace(message, value=value)
