"""The serializer `auto`: msgpack plus NumPy, pandas and classes registered by the application.

| code | type | items after the marker |
| --- | --- | --- |
| 32 | numpy.ndarray | dtype, order (`C` or `F`), shape, bytes |
| 33 | NumPy scalar | dtype, bytes |
| 34 | pandas DataFrame, Series | form, Arrow IPC stream |
| 35 | registered class | name, fingerprint, content |

The form of a DataFrame is `frame`, or `ranged` if its columns are 0, 1, ... The form of a Series is `series`, or
`unnamed` if it has no name.

Arrays are restored as read-only views of the payload. Use `copy()` to get a writable array.

Dataclasses, pydantic models, enums and named tuples can be registered. A payload contains only the name of a class.
Only registered classes are looked up, nothing is imported, and only the class's `__new__` is called. The object is
restored exactly from its fields, as the `copy` module does. A fingerprint covers the names and types of the fields; a
payload is rejected if its class has changed since.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from cachebus.messages import CacheConfigurationError, CacheSerializationError

from ..format import load
from .arrow import form_of, read_frame, write_frame
from .msgpack import CONTAINER_READERS, ContainerReader, Ext, MsgpackSerializer
from .scalars import refuse, type_name, type_of

_ARRAY, _SCALAR, _FRAME, _OBJECT = (Ext(code, b"") for code in (32, 33, 34, 35))
_DTYPE = re.compile(r"[<>|=][biufcSUmMV?][0-9]{1,9}(\[[0-9]{0,6}[A-Za-z]{1,2}\])?")


class AutoSerializer(MsgpackSerializer):
    """Serializer that extends `msgpack`. `types` are the classes that payloads may contain.

    Raises `CacheConfigurationError` for a class that cannot be registered.
    """

    name = "auto"

    def __init__(self, types: Iterable[type[Any]] = ()) -> None:
        super().__init__()
        self._carriers = {kind: _carrier(kind) for kind in types}
        self._by_name = {carrier.name: carrier for carrier in self._carriers.values()}
        self._readers: Mapping[int, ContainerReader] = {
            **CONTAINER_READERS,
            _ARRAY.code: _read_array,
            _SCALAR.code: _read_scalar,
            _FRAME.code: lambda items: read_frame(items[1], items[0]),
            _OBJECT.code: self._read_object,
        }

    def write_other(self, value: Any) -> Any:
        kind = type_of(value)
        if (carrier := self._carriers.get(kind)) is not None:
            return [_OBJECT, carrier.name, carrier.fingerprint, carrier.take_apart(value)]
        family = kind.__module__.partition(".")[0]
        if family == "numpy":
            return _write_numpy(value, kind)
        if family == "pandas" and (form := form_of(value)) is not None:
            return [_FRAME, form, write_frame(value, form)]
        return refuse(value, self.name)

    def _read_object(self, items: list[Any]) -> Any:
        name, fingerprint, content = items
        carrier = self._by_name[name]
        if fingerprint != carrier.fingerprint:
            raise ValueError("the fields of the class have changed")
        return carrier.put_together(content)


def _write_numpy(value: Any, kind: type[Any]) -> list[Any]:
    numpy = load("numpy", "a NumPy array")
    if kind is not numpy.ndarray and not isinstance(value, numpy.generic):
        refuse(value, "auto")
    dtype: str = value.dtype.str
    if value.dtype.names is not None or not _DTYPE.fullmatch(dtype):
        raise CacheSerializationError(
            f"the serializer 'auto' does not support the NumPy dtype {value.dtype}; 'pickle' does"
        )
    if kind is not numpy.ndarray:
        return [_SCALAR, dtype, value.tobytes()]
    if not value.dtype.itemsize:
        raise CacheSerializationError("the serializer 'auto' does not support NumPy arrays with items of size 0")
    order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    return [_ARRAY, dtype, order, list(value.shape), value.tobytes(order)]


def _read_array(items: list[Any]) -> Any:
    name, order, shape, data = items
    numpy, dtype = _dtype(name)
    if order not in ("C", "F") or any(type(each) is not int or each < 0 for each in shape):
        raise ValueError("an invalid order or shape")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("the shape does not match the number of bytes")
    if not dtype.itemsize:
        raise ValueError("items of size 0 still take memory")
    if not data:
        return numpy.zeros(shape, dtype, order)
    return numpy.frombuffer(data, dtype).reshape(shape, order=order)


def _read_scalar(items: list[Any]) -> Any:
    name, data = items
    numpy, dtype = _dtype(name)
    if dtype.itemsize != len(data):
        raise ValueError("the type does not match the number of bytes")
    return numpy.frombuffer(data, dtype)[0] if data else dtype.type()


def _dtype(name: str) -> tuple[Any, Any]:
    numpy = load("numpy", "a NumPy array")
    if not _DTYPE.fullmatch(name):
        raise ValueError("an unsupported dtype")
    return numpy, numpy.dtype(name)


class _Carrier(NamedTuple):
    """Functions that take apart and restore objects of one class. Its `name` in payloads is `module:Class`."""

    name: str
    fingerprint: int
    take_apart: Callable[[Any], Any]
    put_together: Callable[[Any], Any]


# Without these, type checkers narrow Any to partially unknown types.
_is_a: Callable[[Any, type[Any]], bool] = issubclass
_is_dataclass: Callable[[Any], bool] = dataclasses.is_dataclass
_new_tuple: Any = tuple.__new__  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

_UNDEFINED = "PydanticUndefinedType"
_STATE = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")


def _carrier(kind: Any) -> _Carrier:
    name = f"{kind.__module__}:{kind.__qualname__}"
    if _is_a(kind, enum.Flag):  # A combination of flags has no name.
        return _Carrier(name, 0, attrgetter("value"), kind)
    if _is_a(kind, enum.Enum):  # Names, unlike values, survive renumbering.
        return _Carrier(name, 0, attrgetter("name"), kind.__getitem__)
    if hasattr(kind, "__pydantic_fields__") and hasattr(kind, "model_fields"):
        return _model(name, kind)
    if _is_dataclass(kind):
        return _dataclass(name, kind)
    if _is_a(kind, tuple) and hasattr(kind, "_fields"):
        return _named_tuple(name, kind)
    raise CacheConfigurationError(
        f"cannot register {type_name(kind)}: expected a dataclass, pydantic model, enum or named tuple"
    )


def _fingerprint(fields: Mapping[str, Any]) -> int:
    hints = [(name, type_name(hint) if isinstance(hint, type) else str(hint)) for name, hint in fields.items()]
    return zlib.crc32(repr(hints).encode())


def _check_attributes(kind: type[Any], held: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    if not fields.keys() >= held.keys():
        raise CacheSerializationError(f"a {type_name(kind)} has attributes that are not fields and would be lost")


def _named_tuple(name: str, kind: Any) -> _Carrier:
    fields: tuple[str, ...] = kind._fields

    def put_together(content: list[Any]) -> Any:
        if len(content) != len(fields):
            raise ValueError("a different number of fields")
        return _new_tuple(kind, content)

    return _Carrier(name, _fingerprint(dict.fromkeys(fields)), list, put_together)


def _dataclass(name: str, kind: type[Any]) -> _Carrier:
    hints = {each.name: each.type for each in dataclasses.fields(kind)}

    def take_apart(value: Any) -> list[Any]:
        _check_attributes(kind, getattr(value, "__dict__", {}), hints)
        try:
            return [getattr(value, each) for each in hints]
        except AttributeError:
            raise CacheSerializationError(f"a {type_name(kind)} has a field without a value") from None

    def put_together(content: list[Any]) -> Any:
        made = object.__new__(kind)
        for each, inner in zip(hints, content, strict=True):
            object.__setattr__(made, each, inner)
        return made

    return _Carrier(name, _fingerprint(hints), take_apart, put_together)


def _model(name: str, kind: Any) -> _Carrier:
    hints = {field: info.annotation for field, info in kind.model_fields.items()}

    def take_apart(value: Any) -> list[Any]:
        held: dict[str, Any] = value.__dict__
        _check_attributes(kind, held, hints)
        private: dict[str, Any] | None = value.__pydantic_private__
        if private is not None:
            # pydantic marks attributes that are not set yet with a private sentinel.
            private = {name: each for name, each in private.items() if type_of(each).__name__ != _UNDEFINED}
        return [dict(held), set(value.__pydantic_fields_set__), value.__pydantic_extra__, private]

    def put_together(content: list[Any]) -> Any:
        state: dict[str, Any] = dict(zip(_STATE, content, strict=True))
        if type_of(state["__dict__"]) is not dict or state["__dict__"].keys() != hints.keys():
            raise ValueError("different fields")
        made = kind.__new__(kind)
        for each, inner in state.items():
            object.__setattr__(made, each, inner)
        return made

    return _Carrier(name, _fingerprint(hints), take_apart, put_together)
