"""The serializer `arrow`, which stores DataFrames as Arrow IPC streams.

Arrow allocates as much memory as a stream declares, so a stream is checked before it is read. Compressed buffers (the
pipeline compresses), types whose rows can share bytes, and offsets outside of a buffer are rejected. A frame may have
at most `CELLS_MAX` cells. Signed and sealed streams are not validated again.
"""

from __future__ import annotations

import struct
from typing import Any, cast

from cachebus.messages import CacheSerializationError

from ..format import load
from .scalars import refuse, type_name, type_of

CELLS_MAX = 2**26
"""Maximum number of rows times columns.

A column of nulls takes no bytes in the stream, but 8 bytes per row in pandas.
"""

_FORMS = {b"d": "frame", b"r": "ranged", b"t": "table"}
_CODES = {form: code for code, form in _FORMS.items()}
_INT32, _UINT16 = struct.Struct("<i"), struct.Struct("<H")


class ArrowSerializer:
    """Serializer for pandas DataFrames and pyarrow Tables only."""

    name = "arrow"

    def __init__(self) -> None:
        self._table: type[Any] = load("pyarrow", "the serializer 'arrow'").Table

    def dumps(self, value: Any) -> bytes:
        """Serialize a frame. Raises `CacheSerializationError`, which names an unsupported type."""
        form = "table" if type(value) is self._table else None
        if type_of(value).__module__.partition(".")[0] == "pandas":
            form = form_of(value)
        if form not in _CODES:
            refuse(value, self.name)
        return _CODES[form] + write_frame(value, form)

    def loads(self, data: bytes | memoryview, *, trusted: bool = False) -> Any:
        """Deserialize a frame. Errors of Arrow and pandas propagate."""
        return read_frame(memoryview(data)[1:], _FORMS[bytes(data[:1])], trusted=trusted)


def form_of(value: Any) -> str | None:
    """Return the form in which a pandas object is stored, or `None` if it is not supported."""
    pandas = load("pandas", "a DataFrame")
    if type(value) is pandas.Series:
        return "unnamed" if value.name is None else "series"
    if type(value) is not pandas.DataFrame:
        return None
    columns = value.columns
    ranged = type(columns) is pandas.RangeIndex and columns.identical(pandas.RangeIndex(len(columns)))
    return "ranged" if ranged else "frame"


def write_frame(value: Any, form: str) -> bytes:
    """Serialize a pandas object or a table to an Arrow stream.

    Raises `CacheSerializationError` if the object could not be restored exactly.
    """
    arrow = load("pyarrow", "a DataFrame")
    match form:
        case "table":
            return _stream(arrow, value)
        case "ranged":
            frame = value.set_axis([str(number) for number in range(len(value.columns))], axis=1)
        case "unnamed":
            frame = value.to_frame("0")
        case "series":
            frame = value.to_frame()
        case _:
            frame = value
    if not all(type(name) is str for name in frame.columns):
        problem = "its column names are not all strings"
    else:
        try:
            data = _stream(arrow, arrow.Table.from_pandas(frame))
            # If Arrow has no exact equivalent of the pandas types, compare the round trip.
            if not _may_change(frame) or _identical(frame, read_frame(data, "frame", trusted=True)):
                return data
            problem = "it cannot be restored exactly"
        except CacheSerializationError:
            raise
        except (arrow.ArrowException, TypeError, ValueError, NotImplementedError) as error:
            problem = f"Arrow does not support its content ({type(error).__name__})"
    raise CacheSerializationError(
        f"cannot serialize this {type_name(type_of(value))}: {problem}; the serializer 'pickle' supports it"
    )


def read_frame(data: bytes | memoryview, form: str, *, trusted: bool = False) -> Any:
    """Deserialize an Arrow stream. Errors of Arrow and pandas propagate."""
    arrow = load("pyarrow", "a DataFrame")
    buffer = arrow.py_buffer(data)
    if not trusted:
        messages = arrow.ipc.MessageReader.open_stream(buffer)
        if any(_is_compressed(memoryview(message.metadata)) for message in messages):
            raise ValueError("a compressed buffer")
    with arrow.ipc.open_stream(buffer) as reader:
        if not all(_is_allowed(arrow.types, each) for each in reader.schema.types):
            raise ValueError("an unsupported type")
        table = reader.read_all()
    if table.num_rows * max(table.num_columns, 1) > CELLS_MAX:
        raise ValueError("too many cells")
    if not trusted:
        table.validate(full=True)
    if form == "table":
        return table
    frame = table.to_pandas()
    if form == "frame":
        return frame
    if form == "ranged":
        frame.columns = load("pandas", "a DataFrame").RangeIndex(len(frame.columns))
        return frame
    if form not in ("series", "unnamed") or len(frame.columns) != 1:
        raise ValueError("an unknown form")
    series = frame.iloc[:, 0]
    if form == "unnamed":
        series.name = None
    return series


def _stream(arrow: Any, table: Any) -> bytes:
    for each in table.schema.types:
        if not _is_allowed(arrow.types, each):
            raise CacheSerializationError(f"columns of the Arrow type {each} are not supported; 'pickle' supports them")
    if table.num_rows * max(table.num_columns, 1) > CELLS_MAX:
        raise CacheSerializationError(f"frames of more than {CELLS_MAX:,} cells are not supported")
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return cast("bytes", sink.getvalue().to_pybytes())


def _is_allowed(types: Any, kind: Any, *, nested: bool = False) -> bool:
    if types.is_dictionary(kind):
        return not nested and _is_allowed(types, kind.value_type, nested=True)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_allowed(types, kind.value_type, nested=True)
    if types.is_struct(kind):
        return all(_is_allowed(types, field.type, nested=True) for field in kind)
    if types.is_run_end_encoded(kind) or types.is_string_view(kind) or types.is_binary_view(kind):
        return False
    names = ("primitive", "null", "string", "large_string", "binary", "large_binary", "fixed_size_binary", "decimal")
    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _may_change(frame: Any) -> bool:
    index = frame.index
    columns = [*frame.dtypes, *(level.dtype for level in (index.levels if hasattr(index, "levels") else [index]))]
    if any(type_of(each).__name__ in ("ObjectDType", "CategoricalDtype") for each in columns):
        return True
    return bool(frame.attrs) or type_of(frame.columns).__name__ != "Index" or frame.columns.name is not None


def _identical(left: Any, right: Any) -> bool:
    if (
        left.shape != right.shape
        or list(left.dtypes) != list(right.dtypes)
        or type(left.index) is not type(right.index)
        or left.attrs != right.attrs
        or list(map(type, left.columns)) != list(map(type, right.columns))
        or not (left.columns.identical(right.columns) and left.index.identical(right.index) and left.equals(right))
    ):
        return False
    held = [
        (left.iloc[:, at], right.iloc[:, at])
        for at, dtype in enumerate(left.dtypes)
        if type_of(dtype).__name__ == "ObjectDType"
    ]
    held += [(left.index, right.index)] if type_of(left.index.dtype).__name__ == "ObjectDType" else []
    return all(list(map(type, a)) == list(map(type, b)) for a, b in held)


def _is_compressed(metadata: memoryview) -> bool:
    """Return true if a message has compressed buffers, according to its FlatBuffers table.

    Arrow's `format/Message.fbs` defines the table.
    """
    message = _uoffset(metadata, 0)
    kind = _field(metadata, message, 1)
    header = _field(metadata, message, 2)
    if kind is None or header is None:
        return False
    batch = _uoffset(metadata, header)
    if metadata[kind] == 2:  # DictionaryBatch, whose second field is the RecordBatch.
        at = _field(metadata, batch, 1)
        if at is None:
            return False
        batch = _uoffset(metadata, at)
    elif metadata[kind] != 3:  # RecordBatch
        return False
    return _field(metadata, batch, 3) is not None


def _uoffset(data: memoryview, at: int) -> int:
    return at + cast("int", _INT32.unpack_from(data, at)[0])


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Return the position of a field of a table, or `None` if the field is absent."""
    vtable = table - _INT32.unpack_from(data, table)[0]
    size: int = _UINT16.unpack_from(data, vtable)[0]
    at = 4 + 2 * number
    if at + 2 > size:
        return None
    offset: int = _UINT16.unpack_from(data, vtable + at)[0]
    return table + offset if offset else None
