"""Values on the wire: the types that messages may contain, and their form in JSON.

A value is `None`, `bool`, `int` of 64 bits (signed or unsigned), `float`, `str`, `bytes`, or a `list` or a `dict` with
`str` keys of these, nested at most `MAX_DEPTH` levels deep. Types must match exactly: an enum that is also an `int`
would be decoded as a plain `int`, so it is rejected rather than changed silently.

JSON has no bytes, so they are written as `{"$base64": "AAEC"}`. A dict whose only key is `base64` after one or more `$`
gets an additional `$`, which the receiver removes: `{"$base64": 1}` is sent as `{"$$base64": 1}`, and `{"$$base64": 1}`
as `{"$$$base64": 1}`. NaN and the infinities have no JSON form.
"""

from __future__ import annotations

import binascii
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, NoReturn, get_args, get_origin

import msgspec
from msgspec.structs import replace

from cachebus.messages import Message

MAX_DEPTH = 100
MIN_INT, MAX_INT = -(2**63), 2**64 - 1

_LEAVES: frozenset[type[Any]] = frozenset({type(None), bool, int, float, str, bytes})
_BYTES_TAG = "$base64"

type_of: Callable[[object], type[Any]] = type  # to a type checker, type() of Any is not fully known


class Unfit(ValueError):
    """Raised when a value cannot be encoded. The message names types, and never contains a part of the value.

    `placed` is true if the message already names the field.
    """

    def __init__(self, problem: str, *, placed: bool = False) -> None:
        super().__init__(problem)
        self.placed = placed


def type_name(cls: type[Any]) -> str:
    """Return the name of a type for error messages, with its module unless it is a builtin."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def name_of_type(value: object) -> str:
    """Return the name of the type of a value for error messages."""
    return type_name(type(value))


def check(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return the value itself. Raises `Unfit` if msgpack would change it or fail; msgpack checks the range of ints."""
    kind = type_of(value)
    if kind in _LEAVES:
        return value
    _check_container(value, kind, depth)
    inside = value.values() if kind is dict else value
    if not _LEAVES.issuperset(map(type, inside)):
        for each in inside:
            if type(each) not in _LEAVES:
                check(each, depth - 1)
    return value


def to_json(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return the JSON form of a value. Raises `Unfit` if it has none."""
    kind = type_of(value)
    if value is None or kind is str or kind is bool:
        return value
    if kind is bytes:
        return {_BYTES_TAG: binascii.b2a_base64(value, newline=False).decode("ascii")}
    if kind is int:
        if not MIN_INT <= value <= MAX_INT:
            raise Unfit("contains an int of more than 64 bits")
        return value
    if kind is float:
        if not math.isfinite(value):
            raise Unfit("contains NaN or an infinity, which JSON cannot represent; use msgpack")
        return value
    _check_container(value, kind, depth)
    if kind is list:
        return [to_json(each, depth - 1) for each in value]
    tree = {name: to_json(each, depth - 1) for name, each in value.items()}
    if _is_tag(tree):
        ((name, each),) = tree.items()
        return {f"${name}": each}
    return tree


def from_json(tree: Any, depth: int = MAX_DEPTH) -> Any:
    """Return the value from its JSON form, reversing `to_json`. Raises `Unfit`."""
    kind = type_of(tree)
    if kind is int and not MIN_INT <= tree <= MAX_INT:
        raise Unfit("contains an int of more than 64 bits")
    if kind in _LEAVES:
        return tree
    if kind is dict and _is_tag(tree):
        ((name, each),) = tree.items()
        if name == _BYTES_TAG:
            return _from_base64(each)
        _check_container(tree, kind, depth)
        return {name[1:]: from_json(each, depth - 1)}
    _check_container(tree, kind, depth)
    if kind is list:
        return [from_json(each, depth - 1) for each in tree]
    return {name: from_json(each, depth - 1) for name, each in tree.items()}


def _check_container(value: Any, kind: type[Any], depth: int) -> None:
    if kind is dict:
        for name in value:
            if type(name) is not str:
                raise Unfit(f"contains a dict with a key of type {name_of_type(name)}, not str")
    elif kind is not list:
        _refuse(kind)
    if depth <= 0:
        raise Unfit(f"is nested deeper than {MAX_DEPTH} levels")


def _refuse(kind: type[Any]) -> NoReturn:
    raise Unfit(
        f"contains a {type_name(kind)}; choose a serializer, because only None, bool, int, float, str, bytes, "
        "list and dict can leave the process without one"
    )


def _is_tag(tree: dict[str, Any]) -> bool:
    if len(tree) != 1:
        return False
    (name,) = tree
    return name.endswith(_BYTES_TAG) and not name.removesuffix("base64").strip("$")


def _from_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise Unfit(f"contains a {_BYTES_TAG} of type {name_of_type(text)}, not str")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        problem = f"contains a {_BYTES_TAG} that is not valid base64"
    raise Unfit(problem)


class Direction:
    """Conversion of values for one content type, when encoding or when decoding.

    `change` converts each value whose type is not in `plain`. `numbers` are the number types that must be checked: JSON
    has no NaN, for which msgspec writes null, and its integers may have any size. `places` maps each message class to
    its fields that must be checked, found when the class is first used.
    """

    def __init__(
        self, plain: frozenset[type[Any]], numbers: frozenset[type[Any]], change: Callable[[Any], Any]
    ) -> None:
        self.plain = plain
        self.change = change
        self.places = _Places(numbers)


class _Places(dict[type[Any], "_FieldCheck | None"]):
    def __init__(self, numbers: frozenset[type[Any]]) -> None:
        super().__init__()
        self._numbers = numbers

    def __missing__(self, cls: type[Any]) -> _FieldCheck | None:
        if not issubclass(cls, msgspec.Struct):
            raise TypeError(f"expected a message, not a {type_name(cls)}")
        fields = msgspec.structs.fields(cls)
        found = tuple((each.name, inside) for each in fields if (inside := _inside(each.type, self._numbers)))
        names = [name for name, _ in found]
        self[cls] = (attrgetter(*names), found) if names else None
        return self[cls]


_Check = Callable[[Any, Direction], Any]
_FieldCheck = tuple[Callable[[Any], Any], tuple[tuple[str, _Check], ...]]
"""Getter of the fields to check (returns a tuple if there are several), and each field name with its check."""

_JSON_PLAIN: frozenset[type[Any]] = frozenset({type(None), bool, str})
MSGPACK_OUT = MSGPACK_IN = Direction(_LEAVES, frozenset(), check)
JSON_OUT = Direction(_JSON_PLAIN, frozenset({int, float}), to_json)
JSON_IN = Direction(_JSON_PLAIN, frozenset({int}), from_json)


def map_values(message: Any, direction: Direction) -> Any:
    """Return the message with its values converted for a direction, or the message itself if none changes.

    Raises `Unfit`, naming the field, and `TypeError` for an object that is not a message.
    """
    places = direction.places[type(message)]
    if places is None:
        return message
    fields, inside_of = places
    plain = direction.plain
    got = fields(message)
    for held in (got,) if len(inside_of) == 1 else got:
        kind = type_of(held)
        # Most other values are numbers that both formats can represent: finite, and of at most 64 bits.
        if not (
            kind in plain or (kind is float and held - held == 0.0) or (kind is int and MIN_INT <= held <= MAX_INT)
        ):
            break
    else:
        return message
    changed: dict[str, Any] = {}
    name = ""
    try:
        for name, inside in inside_of:
            held = getattr(message, name)
            if type(held) not in plain and (new := inside(held, direction)) is not held:
                changed[name] = new
    except Unfit as unfit:
        problem = str(unfit) if unfit.placed else f"field {name!r} of {_name_of(message)} {unfit}"
    else:
        return replace(message, **changed) if changed else message
    raise Unfit(problem, placed=True)


def map_each(messages: Iterable[Any], direction: Direction) -> list[Any]:
    """Convert each message like `map_values`, with a fast path for messages whose only value needs no conversion."""
    places, plain = direction.places, direction.plain
    return [
        each if (found := places[type(each)]) is None or type(found[0](each)) in plain else map_values(each, direction)
        for each in messages
    ]


def _of_value(held: Any, direction: Direction) -> Any:
    return direction.change(held)


def _of_number(held: Any, direction: Direction) -> Any:
    return direction.change(held) if type(held) is float or type(held) is int else held


def _of_values(held: Mapping[str, Any], direction: Direction) -> Any:
    for name in held:
        if not isinstance(name, str):
            raise Unfit(f"has a key of type {name_of_type(name)}, not str")
    plain, change = direction.plain, direction.change
    new = {name: each if type(each) in plain else change(each) for name, each in held.items()}
    return held if all(new[name] is each for name, each in held.items()) else new


def _of_messages(held: Mapping[str, Any], direction: Direction) -> Any:
    new = {name: map_values(each, direction) for name, each in held.items()}
    return held if all(new[name] is each for name, each in held.items()) else new


def _inside(hint: Any, numbers: frozenset[type[Any]]) -> _Check | None:
    if hint is Any:
        return _of_value
    options: set[Any] = set(get_args(hint)) if get_origin(hint) in {typing.Union, types.UnionType} else {hint}
    if any(isinstance(each, type) and issubclass(each, msgspec.Struct) for each in options):
        return map_values
    if get_origin(hint) is Mapping:
        inner = _inside(get_args(hint)[1], numbers)
        return _of_messages if inner is map_values else _of_values if inner is not None else None
    return _of_number if options & numbers else None


def _name_of(message: Any) -> str:
    return message.WIRE_NAME if isinstance(message, Message) else type_name(type_of(message))
