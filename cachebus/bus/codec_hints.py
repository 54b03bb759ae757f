"""How a field of a given type hint travels: what is written for it, and what pydantic checks on arrival.

Checks are strict, leaf by leaf: `"1"` is no `int` and `b"a"` no `str`. The forms have fewer types than the hints, so an
array becomes the tuple and a string the enum that the hint names, and an integer will do for a `float`.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, PlainValidator, Strict

from cachebus.messages import Message

from .codec_values import Unfit, ValueForm, name_of_type, type_name

# Types made at run time are values to the type checker.
_annotated: Any = typing.Annotated
_union: Any = typing.Union
_literal: Any = Literal

# A subclass, such as the StrEnum that somebody uses as a key, goes as what it is underneath.
_UNDERNEATH: dict[type[Any], Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}


class Way(NamedTuple):
    """How values of one type hint travel."""

    plain: frozenset[type[Any]]
    """Exact types that are written as they are."""

    write: Callable[[Any], Any]
    """What to write for any other. Raises `Unfit`."""

    check: Any
    """The type that pydantic checks arrivals against."""


class Ways:
    """The ways of one form. `of_message` knows how a message inside a message travels."""

    def __init__(self, values: ValueForm, of_message: Callable[[type[Message]], Way]) -> None:
        self._values = values
        self._of_message = of_message

    def of(self, hint: Any) -> Way:
        """How a type hint travels. Raises `TypeError` for one that messages cannot have."""
        values = self._values
        if hint is Any:
            return Way(values.plain, values.write, _annotated[Any, PlainValidator(values.read)])
        if hint is types.NoneType:
            return self._scalar(types.NoneType, None)
        if hint is bytes:
            return self._scalar(bytes, _annotated[bytes, Strict(), BeforeValidator(values.read)])
        if hint in (bool, int, str):
            return self._scalar(hint, _annotated[hint, Strict()])
        if hint is float:
            return self._scalar(float, _annotated[float, Strict()], int)
        if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
            return self._enum(hint)
        if isinstance(hint, type) and issubclass(hint, Message):
            return self._of_message(hint)
        return self._compound(hint)

    def _compound(self, hint: Any) -> Way:
        origin, args = get_origin(hint), get_args(hint)
        if origin is Literal and all(type(each) is str for each in args):
            return self._scalar(str, hint)
        if origin is list or (origin is tuple and args[1:] == (...,)):
            inner = self.of(args[0])
            return _sequence(origin, inner, types.GenericAlias(origin, (inner.check, *args[1:])))
        if origin is dict and args[0] is str:
            return _map(self.of(str), self.of(args[1]))
        if origin in (typing.Union, types.UnionType):
            if sum(isinstance(each, type) and issubclass(each, Message) for each in args) > 1:
                raise TypeError(f"a message inside a message has no kind on the wire: {hint} cannot be told apart")
            return _any_of([self.of(each) for each in args])
        raise TypeError(f"the codec has no way to carry a field of type {hint}")

    def _scalar(self, cls: type[Any], check: Any, *others: type[Any]) -> Way:
        """`cls`, and `others` that will do for it too."""
        allowed = (cls, *others)
        write = self._values.write

        def convert(value: Any) -> Any:
            if type(value) in allowed:
                return write(value)
            for each in allowed:
                if isinstance(value, each) and each in _UNDERNEATH and type(value) is not bool:
                    return write(_UNDERNEATH[each](value))
            _refuse(value, *allowed)

        return Way(frozenset(allowed) & self._values.plain, convert, check)

    def _enum(self, cls: type[enum.StrEnum]) -> Way:
        def convert(value: Any) -> Any:
            expect(value, cls)
            return value.value

        # Called through a function: from Python 3.12 on, pydantic takes the signature of an enum for no validator's.
        members = tuple(each.value for each in cls)
        return Way(frozenset(), convert, _annotated[_literal[members], AfterValidator(lambda member: cls(member))])  # noqa: PLW0108


def _sequence(cls: type[Any], inner: Way, check: Any) -> Way:
    plain, write = inner.plain, inner.write

    def convert(value: Iterable[Any]) -> Any:
        expect(value, cls)
        return [each if type(each) in plain else write(each) for each in value]

    return Way(frozenset(), convert, check)


def _map(key: Way, inner: Way) -> Way:
    plain, write = inner.plain, inner.write

    def convert(value: Mapping[Any, Any]) -> Any:
        expect(value, dict)
        return {
            name if type(name) is str else key.write(name): each if type(each) in plain else write(each)
            for name, each in value.items()
        }

    return Way(frozenset(), convert, types.GenericAlias(dict, (key.check, inner.check)))


def _any_of(ways: list[Way]) -> Way:
    def convert(value: Any) -> Any:
        problem: Unfit | None = None
        for each in ways:
            try:
                return each.write(value)
            except Unfit as unfit:
                problem = problem or unfit
        raise problem or Unfit("is of no type")

    plain = frozenset[type[Any]]().union(*(each.plain for each in ways))
    return Way(plain, convert, _union[tuple(each.check for each in ways)])


def expect(value: object, cls: type[Any]) -> None:
    """Raise `Unfit` unless the value is an instance."""
    if not isinstance(value, cls):
        _refuse(value, cls)


def _refuse(value: object, *wanted: type[Any]) -> NoReturn:
    raise Unfit(f"is of type {name_of_type(value)}, not {' or '.join(type_name(each) for each in wanted)}")
