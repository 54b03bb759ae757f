"""The serializer `auto`: msgpack, and NumPy, pandas and the classes that the application registered.

| code | type | items after the marker |
| --- | --- | --- |
| 32 | numpy.ndarray | dtype, order (`C` or `F`), shape, bytes |
| 33 | NumPy scalar | dtype, bytes |
| 34 | pandas DataFrame, Series | `frame` (`ranged` if its columns are 0, 1, ...) or `series` (`unnamed`), Arrow IPC stream |
| 35 | registered class | name, fingerprint, content |

An array comes back read-only, because it looks into the payload: `copy()` makes one that can be written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from cachebus.messages import CacheSerializationError

from .payload_extras import load
from .payload_frames import Frames
from .payload_msgpack import CONTAINER_READERS, ContainerReader, Ext, MsgpackSerializer
from .payload_scalars import refuse, type_of
from .payload_types import TypeRegistry

ARRAY, SCALAR, FRAME, OBJECT = 32, 33, 34, 35
_MARKERS = {code: Ext(code, b"") for code in (ARRAY, SCALAR, FRAME, OBJECT)}
_DTYPE = re.compile(r"[<>|=][biufcSUmMV?][0-9]{1,9}(\[[0-9]{0,6}[A-Za-z]{1,2}\])?")


class AutoSerializer(MsgpackSerializer):
    """What `msgpack` carries and more. `types` are the classes that may be put together from a payload."""

    name = "auto"

    def __init__(self, types: Iterable[type[Any]] = ()) -> None:
        super().__init__()
        self.types = TypeRegistry(types)
        self._frames = Frames()
        self._readers: Mapping[int, ContainerReader] = {
            **CONTAINER_READERS,
            ARRAY: _read_array,
            SCALAR: _read_scalar,
            FRAME: self._read_frame,
            OBJECT: self.types.put_together,
        }

    def write_other(self, value: Any) -> Any:
        parts = self.types.take_apart(value)
        if parts is not None:
            return [_MARKERS[OBJECT], *parts]
        kind = type_of(value)
        family = kind.__module__.partition(".")[0]
        if family == "numpy":
            return _write_numpy(value, kind)
        if family == "pandas" and (form := self._frames.form(value)) is not None:
            return [_MARKERS[FRAME], form, self._frames.write(value, form)]
        return refuse(value, self.name)

    def _read_frame(self, items: list[Any]) -> Any:
        form, data = items
        return self._frames.read(data, form)


def _write_numpy(value: Any, kind: type[Any]) -> list[Any]:
    numpy = load("numpy", "a NumPy array")
    if kind is not numpy.ndarray and not isinstance(value, numpy.generic):
        refuse(value, "auto")
    dtype: str = value.dtype.str
    if value.dtype.names is not None or not _DTYPE.fullmatch(dtype):
        raise CacheSerializationError(
            f"the serializer 'auto' does not carry a NumPy dtype {value.dtype}; 'pickle' does"
        )
    if kind is not numpy.ndarray:
        return [_MARKERS[SCALAR], dtype, value.tobytes()]
    if not value.dtype.itemsize:
        raise CacheSerializationError("the serializer 'auto' does not carry a NumPy array of items without a size")
    order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    return [_MARKERS[ARRAY], dtype, order, list(value.shape), value.tobytes(order)]


def _read_array(items: list[Any]) -> Any:
    dtype, order, shape, data = items
    numpy = load("numpy", "a NumPy array")
    made = numpy.dtype(_checked(dtype))
    if order not in ("C", "F") or any(type(each) is not int or each < 0 for each in shape):
        raise ValueError("no order or no shape")
    if math.prod(shape) * made.itemsize != len(data):
        raise ValueError("not as many bytes as the shape says")
    if not made.itemsize:
        raise ValueError("items without a size take memory all the same")
    if not data:
        return numpy.zeros(shape, made, order)
    return numpy.frombuffer(data, made).reshape(shape, order=order)


def _read_scalar(items: list[Any]) -> Any:
    dtype, data = items
    numpy = load("numpy", "a NumPy scalar")
    made = numpy.dtype(_checked(dtype))
    if made.itemsize != len(data):
        raise ValueError("not as many bytes as the type has")
    return numpy.frombuffer(data, made)[0] if data else made.type()


def _checked(dtype: str) -> str:
    if not _DTYPE.fullmatch(dtype):
        raise ValueError("no dtype of ours")
    return dtype
