"""Where the values of the user's are in messages: which kinds carry one, how large it is, and putting another in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import fields
from operator import attrgetter
from typing import Any

from cachebus.messages import Incremented, FoundMany, LeaseGranted, Message

from .payload_scalars import type_of


def size(payloads: Iterable[Any]) -> int:
    return sum(len(each) for each in payloads if type(each) is bytes)


def size_of(reply: Any) -> int:
    """How many bytes of payloads are in a reply."""
    if type(reply) is FoundMany:
        return size(found.value for found in reply.entries.values())
    if type(reply) is LeaseGranted:
        reply = reply.stale
    return size([getattr(reply, "value", None)])


def _fields_of(kind: Any) -> tuple[str, ...]:
    return tuple(each.name for each in fields(kind))


def _carries_value(kind: Any) -> bool:
    """Whether messages of a kind carry a value of the user's. Of every kind there will be: one that is forgotten would hand out
    payloads."""
    return issubclass(kind, Message) and kind is not Incremented and "value" in _names(kind)


_names: Callable[[Any], tuple[str, ...]] = functools.cache(_fields_of)
has_value: Callable[[Any], bool] = functools.cache(_carries_value)


def with_value(message: Any, value: Any) -> Any:
    """The same message with another value. A new object: whoever sent it may send it again, and two may share a reply."""
    kind = type_of(message)
    fields_of, place = _layout(kind)
    values = list(fields_of(message))
    values[place] = value
    return kind(*values)


def _layout_of(kind: Any) -> tuple[Callable[[Any], tuple[Any, ...]], int]:
    names = _names(kind)
    # Of a single field attrgetter makes no tuple.
    return attrgetter(*names) if len(names) > 1 else lambda message: (message.value,), names.index("value")


_layout: Callable[[Any], tuple[Callable[[Any], tuple[Any, ...]], int]] = functools.cache(_layout_of)
