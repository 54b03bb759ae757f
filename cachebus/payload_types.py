"""Classes that the serializer `auto` may carry: dataclasses, pydantic models, enums and named tuples that somebody registered.

A payload names a class; it never makes one. Only what the application registered is looked up, nothing is imported, and no
code of the class is called but `__new__`: an object is put back together from its fields, as `copy` does it, and is exactly
what it was. The fields' names and types make a fingerprint. A payload of a class that has changed since is not taken.
"""

from __future__ import annotations

import dataclasses
import enum
import zlib
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple, cast

from cachebus.messages import CacheConfigurationError, CacheSerializationError

from .payload_scalars import type_name, type_of


class Carrier(NamedTuple):
    """How one class is taken apart and put together again."""

    name: str
    fingerprint: int
    take_apart: Callable[[Any], Any]
    put_together: Callable[[Any], Any]


class TypeRegistry:
    """The classes that may be carried, by class and by the name that payloads call them: `module:Class`."""

    def __init__(self, types: Iterable[type[Any]] = ()) -> None:
        self._by_type: dict[type[Any], Carrier] = {}
        self._by_name: dict[str, Carrier] = {}
        for each in types:
            self.register(each)

    def register(self, kind: Any) -> None:
        """Carry a class from now on. Raises `CacheConfigurationError` for one that is none of the kinds that can be."""
        name = f"{kind.__module__}:{kind.__qualname__}"
        if _is_a(kind, enum.Enum):
            carrier = _enum(name, kind)
        elif hasattr(kind, "__pydantic_fields__") and hasattr(kind, "model_fields"):
            carrier = _model(name, kind)
        elif _is_dataclass(kind):
            carrier = _dataclass(name, kind)
        elif _is_a(kind, tuple) and hasattr(kind, "_fields"):
            carrier = _named_tuple(name, kind)
        else:
            raise CacheConfigurationError(
                f"{type_name(kind)} cannot be registered: only dataclasses, pydantic models, enums and named tuples can"
            )
        self._by_type[kind] = self._by_name[name] = carrier

    def take_apart(self, value: Any) -> list[Any] | None:
        """Name, fingerprint and content of an object; `None` if its class is not registered."""
        carrier = self._by_type.get(type_of(value))
        return None if carrier is None else [carrier.name, carrier.fingerprint, carrier.take_apart(value)]

    def put_together(self, parts: list[Any]) -> Any:
        """The object of these parts. Raises `ValueError` or `LookupError` for a class that is not registered or has changed."""
        name, fingerprint, content = parts
        carrier = self._by_name[name]
        if fingerprint != carrier.fingerprint:
            raise ValueError("the class has other fields now")
        return carrier.put_together(content)


# Type checkers would narrow Any to what they know less of.
_is_a: Callable[[Any, type[Any]], bool] = issubclass
_is_dataclass: Callable[[Any], bool] = dataclasses.is_dataclass
_new_tuple: Any = tuple.__new__  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _fingerprint(fields: Mapping[str, Any]) -> int:
    return zlib.crc32(repr([(name, _said(hint)) for name, hint in fields.items()]).encode())


def _said(hint: Any) -> str:
    return type_name(cast("type[Any]", hint)) if isinstance(hint, type) else str(hint)


def _enum(name: str, kind: Any) -> Carrier:
    # By name, which stays when values are renumbered. A combination of flags has none.
    if _is_a(kind, enum.Flag):
        return Carrier(name, 0, attrgetter("value"), kind)
    return Carrier(name, 0, attrgetter("name"), kind.__getitem__)


def _named_tuple(name: str, kind: Any) -> Carrier:
    fields: tuple[str, ...] = kind._fields

    def put_together(content: list[Any]) -> Any:
        if len(content) != len(fields):
            raise ValueError("another number of fields")
        return _new_tuple(kind, content)

    return Carrier(name, _fingerprint(dict.fromkeys(fields)), list, put_together)


def _dataclass(name: str, kind: type[Any]) -> Carrier:
    hints = {each.name: each.type for each in dataclasses.fields(kind)}
    names = tuple(hints)

    def take_apart(value: Any) -> list[Any]:
        if len(getattr(value, "__dict__", ())) > len(names) or not names_are_all(value):
            raise CacheSerializationError(f"a {type_name(kind)} has attributes besides its fields, which would be lost")
        try:
            return [getattr(value, each) for each in names]
        except AttributeError:
            raise CacheSerializationError(f"a field of a {type_name(kind)} is not there") from None

    def names_are_all(value: Any) -> bool:
        return hints.keys() >= getattr(value, "__dict__", {}).keys()

    def put_together(content: list[Any]) -> Any:
        if len(content) != len(names):
            raise ValueError("another number of fields")
        made = object.__new__(kind)
        for each, inner in zip(names, content, strict=True):
            object.__setattr__(made, each, inner)
        return made

    return Carrier(name, _fingerprint(hints), take_apart, put_together)


_UNDEFINED = "PydanticUndefinedType"
_STATE = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")


def _model(name: str, kind: Any) -> Carrier:
    hints = {field: info.annotation for field, info in kind.model_fields.items()}

    def take_apart(value: Any) -> list[Any]:
        held: dict[str, Any] = value.__dict__
        if not hints.keys() >= held.keys():
            raise CacheSerializationError(f"a {type_name(kind)} has attributes besides its fields, which would be lost")
        private: dict[str, Any] | None = value.__pydantic_private__
        if private is not None:
            # What has not been set yet is a mark of pydantic's own.
            private = {name: each for name, each in private.items() if type_of(each).__name__ != _UNDEFINED}
        return [dict(held), set(value.__pydantic_fields_set__), value.__pydantic_extra__, private]

    def put_together(content: list[Any]) -> Any:
        state: dict[str, Any] = dict(zip(_STATE, content, strict=True))
        if type_of(state["__dict__"]) is not dict or state["__dict__"].keys() != hints.keys():
            raise ValueError("other fields")
        made = kind.__new__(kind)
        for each, inner in state.items():
            object.__setattr__(made, each, inner)
        return made

    return Carrier(name, _fingerprint(hints), take_apart, put_together)
