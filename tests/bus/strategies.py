"""Hypothesis strategies for every message kind, made from the type hints."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from hypothesis import strategies as st

from cachebus.bus.codec.messages import JSON
from cachebus.messages import WIRE_NAMES, Message

INTS = st.integers(-(2**63), 2**64 - 1)
NAMES = st.one_of(st.sampled_from(["$base64", "$$base64", "base64", "v", "kind"]), st.text(max_size=8))


def floats(content_type: str) -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=content_type != JSON)


def values(content_type: str) -> st.SearchStrategy[Any]:
    """Values of an `Any` field. NaN has a separate test, because it does not equal itself."""
    leaves: st.SearchStrategy[Any] = st.one_of(
        st.none(), st.booleans(), INTS, floats(content_type), st.text(max_size=8), st.binary(max_size=8)
    )
    return st.recursive(
        leaves, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(NAMES, inside, max_size=3), max_leaves=8
    )


def messages(cls: type[Any], content_type: str) -> st.SearchStrategy[Message]:
    hints = typing.get_type_hints(cls, include_extras=True)
    names = cls.__struct_fields__
    return st.builds(cls, **{name: _field(hints[name], content_type) for name in names})


def any_message(content_type: str) -> st.SearchStrategy[Message]:
    return st.one_of([messages(cls, content_type) for cls in WIRE_NAMES.values()])


def _field(hint: Any, content_type: str) -> st.SearchStrategy[Any]:
    if hint is Any:
        return values(content_type)
    if hint is int:
        return INTS
    if get_origin(hint) is Annotated:
        bounds = get_args(hint)[1]
        return st.integers(bounds.ge, bounds.le)
    if hint is float:
        return floats(content_type)
    if hint is str:
        return st.text(max_size=12)
    if hint in (bool, bytes, types.NoneType):
        return st.from_type(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return messages(hint, content_type)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (tuple, list):
        sequence: Any = origin
        return st.lists(_field(args[0], content_type), max_size=3).map(sequence)
    if origin is Mapping:
        return st.dictionaries(NAMES, _field(args[1], content_type), max_size=3)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([_field(each, content_type) for each in args])
    raise TypeError(f"no strategy generates {hint}; add one to {__name__}")
