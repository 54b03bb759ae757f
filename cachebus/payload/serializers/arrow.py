"""DataFrames as Arrow IPC streams, and the serializer `arrow`.

Arrow allocates what a stream claims, so a stream is checked before it is read: no compressed buffers (the pipeline compresses),
no types whose rows may share their bytes, at most `CELLS_MAX` cells, and offsets that stay inside. Signed and sealed streams
are not validated again.
"""

from __future__ import annotations

import struct
from typing import Any, cast

from cachebus.messages import CacheSerializationError

from ..format import load
from .scalars import refuse, type_name, type_of

CELLS_MAX = 2**26
"""Rows times columns of one frame. A column of nulls takes no bytes in the stream, and 8 for each row in pandas."""

_FORMS = {b"d": "frame", b"r": "ranged", b"t": "table"}
_CODES = {form: code for code, form in _FORMS.items()}
_INT32, _UINT16 = struct.Struct("<i"), struct.Struct("<H")


class ArrowSerializer:
    """pandas DataFrames and pyarrow Tables, and nothing else."""

    name = "arrow"

    def __init__(self) -> None:
        self._table: type[Any] = load("pyarrow", "the serializer 'arrow'").Table

    def dumps(self, value: Any) -> bytes:
        """Return the bytes of a frame. Raises `CacheSerializationError` that names the type in the way."""
        form = "table" if type(value) is self._table else None
        if type_of(value).__module__.partition(".")[0] == "pandas":
            form = form_of(value)
        if form not in _CODES:
            refuse(value, self.name)
        return _CODES[form] + write_frame(value, form)

    def loads(self, data: bytes | memoryview, *, trusted: bool = False) -> Any:
        """Return the frame of bytes. Raises whatever Arrow and pandas raise."""
        return read_frame(memoryview(data)[1:], _FORMS[bytes(data[:1])], trusted=trusted)


def form_of(value: Any) -> str | None:
    """Return the kind of pandas object that a value is; `None` if it is none that can be carried."""
    pandas = load("pandas", "a DataFrame")
    if type(value) is pandas.Series:
        return "unnamed" if value.name is None else "series"
    if type(value) is not pandas.DataFrame:
        return None
    columns = value.columns
    ranged = type(columns) is pandas.RangeIndex and columns.identical(pandas.RangeIndex(len(columns)))
    return "ranged" if ranged else "frame"


def write_frame(value: Any, form: str) -> bytes:
    """Return the Arrow stream of a pandas object, or of a table. Raises `CacheSerializationError` for what Arrow would change."""
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
        problem = "its columns have names that are no text"
    else:
        try:
            data = _stream(arrow, arrow.Table.from_pandas(frame))
            # Where Arrow has no equal of what pandas holds, what comes back is compared.
            if not _may_change(frame) or _identical(frame, read_frame(data, "frame", trusted=True)):
                return data
            problem = "it would come back otherwise"
        except CacheSerializationError:
            raise
        except (arrow.ArrowException, TypeError, ValueError, NotImplementedError) as error:
            problem = f"Arrow has no form for what is in it ({type(error).__name__})"
    raise CacheSerializationError(
        f"this {type_name(type_of(value))} cannot be written: {problem}; the serializer 'pickle' carries it"
    )


def read_frame(data: bytes | memoryview, form: str, *, trusted: bool = False) -> Any:
    """Return the object that a stream holds. Raises whatever Arrow and pandas raise."""
    arrow = load("pyarrow", "a DataFrame")
    buffer = arrow.py_buffer(data)
    if not trusted:
        messages = arrow.ipc.MessageReader.open_stream(buffer)
        if any(_is_compressed(memoryview(message.metadata)) for message in messages):
            raise ValueError("a compressed buffer")
    with arrow.ipc.open_stream(buffer) as reader:
        if not all(_is_allowed(arrow.types, each) for each in reader.schema.types):
            raise ValueError("a type that is not carried")
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
        raise ValueError("no form of ours")
    series = frame.iloc[:, 0]
    if form == "unnamed":
        series.name = None
    return series


def _stream(arrow: Any, table: Any) -> bytes:
    for each in table.schema.types:
        if not _is_allowed(arrow.types, each):
            raise CacheSerializationError(f"a column of the Arrow type {each} is not carried; 'pickle' carries it")
    if table.num_rows * max(table.num_columns, 1) > CELLS_MAX:
        raise CacheSerializationError(f"a frame of more than {CELLS_MAX:,} cells is not carried")
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
    """Whether a message of a stream has compressed buffers, as its FlatBuffers table says (Arrow's format/Message.fbs)."""
    message = _uoffset(metadata, 0)
    kind = _field(metadata, message, 1)
    header = _field(metadata, message, 2)
    if kind is None or header is None:
        return False
    batch = _uoffset(metadata, header)
    if metadata[kind] == 2:  # DictionaryBatch: its second field is the RecordBatch
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
    """Where a field of a table is; `None` if it has none."""
    vtable = table - _INT32.unpack_from(data, table)[0]
    size: int = _UINT16.unpack_from(data, vtable)[0]
    at = 4 + 2 * number
    if at + 2 > size:
        return None
    offset: int = _UINT16.unpack_from(data, vtable + at)[0]
    return table + offset if offset else None
