"""Messages as field maps: what the type hints of a message class say about writing it, and about checking what arrives.

A `Plan` is made from a class's hints the first time the class is met, one for each content type. Writing takes the
exact type of a field as the sign that it goes as it is, and converts or refuses the rest. Reading is one pydantic
`TypeAdapter`, built with the first message to be read. It turns a map straight into the class's arguments, because
pydantic's own way with a dataclass takes either an instance (strict) or anything that resembles the hints (lax), and
takes twice as long.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
    GetCoreSchemaHandler,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
)

from cachebus.messages import WIRE_NAMES, Message

from .codec_values import Unfit, ValueForm, name_of_type, type_name

ENVELOPE = ("v", "kind")
"""The fields that every message begins with, and that none may have as its own."""

_MOST_FAULTS = 32  # more are only counted: a list of a million faults would cost more than the body

# Types made at run time are values to the type checker.
_annotated: Any = typing.Annotated
_union: Any = typing.Union
_literal: Any = Literal

# A subclass, such as the StrEnum that somebody uses as a key, goes as what it is underneath.
_UNDERNEATH: dict[type[Any], Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}


class _Way(NamedTuple):
    """How values of one type hint travel."""

    plain: frozenset[type[Any]]
    """Exact types that are written as they are."""

    write: Callable[[Any], Any]
    """What to write for any other. Raises `Unfit`."""

    check: Any
    """The type that pydantic checks arrivals against."""


class Plan:
    """How the messages of one class are written and read in one form."""

    def __init__(self, cls: type[Message], plans: Plans) -> None:
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(typing.cast(Any, cls))
        for field in fields:
            if field.name in ENVELOPE:
                raise TypeError(f"{cls.__name__} has a field {field.name!r}, which every message begins with")
        self.cls = cls
        self.kind = cls.WIRE_NAME
        self.names = {field.name for field in fields}
        self._ways = {field.name: plans.way(hints[field.name], self.names) for field in fields}
        self._required = {
            field.name
            for field in fields
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        self._writes = [(name, way.plain, way.write) for name, way in self._ways.items()]

    def write(self, message: Message, tree: dict[str, Any]) -> dict[str, Any]:
        """`tree`, with the fields of the message added in their order. Raises `Unfit`, naming the field."""
        name = ""
        try:
            for name, plain, convert in self._writes:
                value = getattr(message, name)
                tree[name] = value if type(value) in plain else convert(value)
        except Unfit as unfit:
            problem = str(unfit) if unfit.placed else f"field {name!r} of {self.kind} {unfit}"
        else:
            return tree
        raise Unfit(problem, placed=True)

    def nested(self, message: Message) -> dict[str, Any]:
        """The field map of a message inside a message."""
        if type(message) is not self.cls:
            _refuse(message, (self.cls,))
        return self.write(message, {})

    def read(self, tree: dict[str, Any]) -> Message:
        """The message. Fields that the class does not have are ignored. Raises `Unfit`, naming the field."""
        try:
            return self.cls(**self._check(tree))
        except ValidationError as error:
            problem = self._explain(error)
        raise Unfit(problem, placed=True)

    def _explain(self, error: ValidationError) -> str:
        """What is wrong with a field: its name, what it should be and its type. Never what it or a key in it holds."""
        if (count := error.error_count()) > _MOST_FAULTS:
            return f"{self.kind} has {count} faults in its fields"
        faults = error.errors(include_url=False)
        path = self._path(faults[0]["loc"])
        if faults[0]["type"] == "missing":
            return f"field {path!r} of {self.kind} is missing"
        if isinstance(cause := faults[0].get("ctx", {}).get("error"), Unfit):
            return f"field {path!r} of {self.kind} {cause}"
        wanted = {each["msg"].removeprefix("Input should be ") for each in faults if self._path(each["loc"]) == path}
        found = name_of_type(faults[0]["input"])
        return f"field {path!r} of {self.kind} should be {' or '.join(sorted(wanted))}, not this {found}"

    def _path(self, location: tuple[int | str, ...]) -> str:
        return ".".join(str(each) for each in location if each in self.names)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        # The schema of a TypedDict: pydantic takes one as a class only from typing_extensions before Python 3.12.
        fields = {
            name: {
                "type": "typed-dict-field",
                "schema": handler.generate_schema(way.check),
                "required": name in self._required,
            }
            for name, way in self._ways.items()
        }
        return {"type": "typed-dict", "fields": fields, "extra_behavior": "ignore"}

    @cached_property
    def _check(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(_annotated[Any, self])
        return adapter.validator.validate_python


class Plans:
    """The plans of one form, by class and by wire name, made when they are first asked for."""

    def __init__(self, values: ValueForm) -> None:
        self._values = values
        self._by_class: dict[type[Message], Plan] = {}
        self._by_kind: dict[str, Plan] = {}

    def of(self, cls: type[Message]) -> Plan:
        """The plan of a class. Raises `TypeError` for one that no wire name belongs to."""
        if (plan := self._by_class.get(cls)) is None:
            if WIRE_NAMES.get(getattr(cls, "WIRE_NAME", "")) is not cls:
                raise TypeError(f"{type_name(cls)} is not a message with a wire name")
            # Two threads may make the same one; either will do.
            plan = self._by_class[cls] = Plan(cls, self)
        return plan

    def named(self, kind: str) -> Plan | None:
        """The plan of a wire name, if there is a message of that name."""
        if (plan := self._by_kind.get(kind)) is None and (cls := WIRE_NAMES.get(kind)) is not None:
            plan = self._by_kind[kind] = self.of(cls)
        return plan

    def way(self, hint: Any, names: set[str]) -> _Way:
        """How a type hint travels. The fields of messages inside it are added to `names`.

        Raises `TypeError` for a hint that messages cannot have.
        """
        values = self._values
        if hint is Any:
            return _Way(values.plain, values.write, _annotated[Any, PlainValidator(values.read)])
        if hint is None or hint is types.NoneType:
            return self._scalar(types.NoneType, None)
        if hint is bytes:
            return self._scalar(bytes, _annotated[bytes, Strict(), BeforeValidator(values.read)])
        if hint in (bool, int, str):
            return self._scalar(hint, _annotated[hint, Strict()])
        if hint is float:
            return self._scalar(float, _annotated[float, Strict()], int)
        if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
            members = tuple(each.value for each in hint)
            return _Way(frozenset(), _writes_enum(hint), _annotated[_literal[members], AfterValidator(hint)])
        if isinstance(hint, type) and issubclass(hint, Message):
            plan = self.of(hint)
            names |= plan.names
            return _Way(frozenset(), plan.nested, _annotated[Any, plan, AfterValidator(_makes(hint))])
        return self._compound(hint, names)

    def _compound(self, hint: Any, names: set[str]) -> _Way:
        origin, args = get_origin(hint), get_args(hint)
        if origin is Literal and all(type(each) is str for each in args):
            return _Way(frozenset({str}) & self._values.plain, self._scalar(str, None).write, hint)
        if origin is list or (origin is tuple and args[1:] == (...,)):
            inner = self.way(args[0], names)
            alias = types.GenericAlias(origin, (inner.check, *args[1:]))
            return _Way(frozenset(), _writes_each(inner, origin), alias)
        if origin is dict and args[0] is str:
            key, inner = self.way(str, names), self.way(args[1], names)
            return _Way(frozenset(), _writes_map(key, inner), types.GenericAlias(dict, (key.check, inner.check)))
        if origin in (typing.Union, types.UnionType):
            return _union_of(args, [self.way(each, names) for each in args])
        raise TypeError(f"the codec has no way to carry a field of type {hint}")

    def _scalar(self, cls: type[Any], check: Any, *others: type[Any]) -> _Way:
        """`cls`, and `others` that will do for it too."""
        allowed = (cls, *others)
        write = self._values.write

        def convert(value: Any) -> Any:
            if type(value) in allowed:
                return write(value)
            for each in allowed:
                if isinstance(value, each) and each in _UNDERNEATH and type(value) is not bool:
                    return write(_UNDERNEATH[each](value))
            _refuse(value, allowed)

        return _Way(frozenset(allowed) & self._values.plain, convert, check)


def _makes(cls: type[Message]) -> Callable[[dict[str, Any]], Message]:
    def make(arguments: dict[str, Any]) -> Message:
        return cls(**arguments)

    return make


def _writes_enum(cls: type[enum.StrEnum]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, cls):
            _refuse(value, (cls,))
        return value.value

    return convert


def _writes_each(inner: _Way, sequence: type[Any]) -> Callable[[Any], Any]:
    plain, write = inner.plain, inner.write

    def convert(value: Any) -> Any:
        if not isinstance(value, sequence):
            _refuse(value, (sequence,))
        items: Iterable[Any] = value
        return [each if type(each) in plain else write(each) for each in items]

    return convert


def _writes_map(key: _Way, inner: _Way) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, dict):
            _refuse(value, (dict,))
        items: dict[Any, Any] = value
        return {
            name if type(name) is str else key.write(name): each if type(each) in inner.plain else inner.write(each)
            for name, each in items.items()
        }

    return convert


def _union_of(hints: tuple[Any, ...], ways: list[_Way]) -> _Way:
    if sum(isinstance(each, type) and issubclass(each, Message) for each in hints) > 1:
        raise TypeError("a message inside a message has no kind on the wire, so a union may name only one")
    plain = frozenset[type[Any]]().union(*(each.plain for each in ways))

    def convert(value: Any) -> Any:
        problem = None
        for each in ways:
            try:
                return each.write(value)
            except Unfit as unfit:
                problem = problem or unfit
        raise problem or Unfit("is of no type")

    return _Way(plain, convert, _union[tuple(each.check for each in ways)])


def _refuse(value: Any, wanted: tuple[type[Any], ...]) -> NoReturn:
    raise Unfit(f"is of type {name_of_type(value)}, not {' or '.join(type_name(each) for each in wanted)}")
