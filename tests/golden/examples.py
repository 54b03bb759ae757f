"""One message of every kind, derived from its type hints: a new kind needs no line here.

What the golden files hold is made here, so a change of these rules breaks them all. Add a rule for a new hint; leave
the others alone.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from cachebus.bus.codec.messages import JSON, MSGPACK, VERSION
from cachebus.messages import WIRE_NAMES

FOLDER = Path(__file__).parent / f"v{VERSION}"
SUFFIXES = {MSGPACK: ".msgpack", JSON: ".json"}

KINDS = {name: cls for name, cls in WIRE_NAMES.items() if cls.__module__.startswith("cachebus.")}
"""Every kind of message that is on the wire: not those that tests make for themselves."""

VALUE: dict[str, Any] = {
    "nothing": None,
    "bools": [True, False],
    "ints": [0, -1, 300, -(2**63), 2**64 - 1],
    "floats": [0.1, -0.0, 1e300, 5e-324, 2.0],
    "text": "naïve ☕ \x00\n\"'\\",
    "bytes": b"\x00\x01\xfe\xff",
    "nested": [[], {}, [{"": ""}]],
    "like bytes": [{"$base64": "AAE="}, {"$$base64": 1}, {"$base64": b"\x00", "more": 1}],
}


def example(cls: type[Any], fields: dict[str, Any] | None = None) -> Any:
    """A message with every field filled. Where `fields` is an older sender's map, what it lacks stays at its default."""
    hints = typing.get_type_hints(cls)
    names = cls.__struct_fields__
    return cls(
        **{
            name: _of(hints[name], name, None if fields is None else fields[name])
            for name in names
            if fields is None or name in fields
        }
    )


def _of(hint: Any, name: str, older: Any) -> Any:
    scalars: dict[Any, Any] = {
        Any: VALUE,
        str: f"{name} ü",
        int: sum(name.encode()),
        float: len(name) + 0.5,
        bool: True,
        bytes: name.encode(),
    }
    if hint in scalars:
        return scalars[hint]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return list(hint)[-1]
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return example(hint, older)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return args[0]
    if origin in (tuple, list):
        sequence: Any = origin
        return sequence(_of(args[0], each, older and older[0]) for each in ("one", "two"))
    if origin is Mapping:
        return {each: _of(args[1], each, older and older[each]) for each in ("one", "two")}
    if origin in (typing.Union, types.UnionType):
        return _of(next(each for each in args if each is not types.NoneType), name, older)
    raise TypeError(f"no rule makes an example of {hint}; add one to {__name__}")
