"""DataFrames as Arrow IPC streams, and the serializer `arrow`.

Arrow makes room for what a stream claims, so a stream is looked at before it is believed: no compressed buffers (the pipeline
compresses), no types whose rows may all point at the same bytes, no more cells than `CELLS_MAX`, and offsets that stay inside. What
was signed or sealed is not validated again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from cachebus.messages import CacheSerializationError

from .payload_extras import load
from .payload_scalars import refuse, type_name, type_of

CELLS_MAX = 2**26
"""Rows times columns of one frame: a column of nulls takes no bytes, and 8 each as pandas has it."""

_CODES = {b"d": "frame", b"r": "ranged", b"t": "table"}
_INT32, _UINT16 = struct.Struct("<i"), struct.Struct("<H")


class Frames:
    """pandas objects to Arrow and back. Both libraries are loaded with the first one."""

    def form(self, value: Any) -> str | None:
        """What kind of pandas object a value is, if it is one that can be carried."""
        pandas = load("pandas", "a DataFrame")
        if type(value) is pandas.Series:
            return "unnamed" if value.name is None else "series"
        if type(value) is not pandas.DataFrame:
            return None
        columns = value.columns
        ranged = type(columns) is pandas.RangeIndex and columns.identical(pandas.RangeIndex(len(columns)))
        return "ranged" if ranged else "frame"

    def write(self, value: Any, form: str) -> bytes:
        """The Arrow stream of a pandas object. Raises `CacheSerializationError` for what Arrow would change."""
        arrow = load("pyarrow", "a DataFrame")
        if form == "table":
            return _stream(arrow, value)
        frame = _frame(value, form)
        if not all(type(name) is str for name in frame.columns):
            problem = "its columns have names that are no text"
        else:
            try:
                data = _stream(arrow, arrow.Table.from_pandas(frame))
                # These are where Arrow has no equal of what pandas holds: what comes back is compared.
                if not _may_change(frame) or _identical(frame, self.read(data, "frame", trusted=True)):
                    return data
                problem = "it would come back otherwise"
            except CacheSerializationError:
                raise
            except (arrow.ArrowException, TypeError, ValueError, NotImplementedError) as error:
                problem = f"Arrow has no form for what is in it ({type(error).__name__})"
        raise CacheSerializationError(
            f"this {type_name(type_of(value))} cannot be written: {problem}; the serializer 'pickle' carries it"
        )

    def read(self, data: bytes | memoryview, form: str, *, trusted: bool = False) -> Any:
        """The object that a stream holds. Raises whatever Arrow and pandas raise."""
        table = _read_stream(data, trusted=trusted)
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


class ArrowSerializer:
    """pandas DataFrames and pyarrow Tables, and nothing else."""

    name = "arrow"

    def __init__(self) -> None:
        self._table: type[Any] = load("pyarrow", "the serializer 'arrow'").Table
        self._frames = Frames()

    def dumps(self, value: Any) -> bytes:
        """The bytes of a frame. Raises `CacheSerializationError` that names the type in the way."""
        if type(value) is self._table:
            return b"t" + self._frames.write(value, "table")
        form = self._frames.form(value) if type_of(value).__module__.partition(".")[0] == "pandas" else None
        if form not in ("frame", "ranged"):
            refuse(value, self.name)
        return (b"d" if form == "frame" else b"r") + self._frames.write(value, form)

    def loads(self, data: bytes | memoryview, *, trusted: bool = False) -> Any:
        """The frame of bytes. Raises whatever Arrow and pandas raise."""
        return self._frames.read(memoryview(data)[1:], _CODES[bytes(data[:1])], trusted=trusted)


def _frame(value: Any, form: str) -> Any:
    if form == "ranged":
        return value.set_axis([str(number) for number in range(len(value.columns))], axis=1)
    if form == "unnamed":
        return value.to_frame("0")
    return value if form == "frame" else value.to_frame()


def _stream(arrow: Any, table: Any) -> bytes:
    for each in table.schema.types:
        if not _is_allowed(arrow.types, each):
            raise CacheSerializationError(f"a column of the Arrow type {each} is not carried; 'pickle' carries it")
    if table.num_rows * max(table.num_columns, 1) > CELLS_MAX:
        raise CacheSerializationError(f"a frame of more than {CELLS_MAX:,} cells is not carried")
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _read_stream(data: bytes | memoryview, *, trusted: bool) -> Any:
    arrow = load("pyarrow", "a DataFrame")
    buffer = arrow.py_buffer(data)
    if not trusted:
        for message in _messages(arrow, buffer):
            if _is_compressed(memoryview(message.metadata)):
                raise ValueError("a compressed buffer")
    with arrow.ipc.open_stream(buffer) as reader:
        if not all(_is_allowed(arrow.types, each) for each in reader.schema.types):
            raise ValueError("a type that is not carried")
        table = reader.read_all()
    if table.num_rows * max(table.num_columns, 1) > CELLS_MAX:
        raise ValueError("too many cells")
    if not trusted:
        table.validate(full=True)
    return table


def _messages(arrow: Any, buffer: Any) -> Iterator[Any]:
    reader = arrow.ipc.MessageReader.open_stream(buffer)
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        yield message


def _is_allowed(types: Any, kind: Any, *, nested: bool = False) -> bool:
    if types.is_dictionary(kind):
        return not nested and _is_allowed(types, kind.value_type, nested=True)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_allowed(types, kind.value_type, nested=True)
    if types.is_struct(kind):
        return all(_is_allowed(types, field.type, nested=True) for field in kind)
    if types.is_run_end_encoded(kind) or types.is_string_view(kind) or types.is_binary_view(kind):
        return False
    return bool(
        types.is_primitive(kind)
        or types.is_null(kind)
        or any(
            is_one(kind)
            for is_one in (
                types.is_string,
                types.is_large_string,
                types.is_binary,
                types.is_large_binary,
                types.is_fixed_size_binary,
                types.is_decimal,
            )
        )
    )


def _may_change(frame: Any) -> bool:
    columns = [*frame.dtypes, *(level.dtype for level in _levels(frame.index))]
    if any(type_of(each).__name__ in ("ObjectDType", "CategoricalDtype") for each in columns):
        return True
    return bool(frame.attrs) or type_of(frame.columns).__name__ != "Index" or frame.columns.name is not None


def _levels(index: Any) -> Any:
    return index.levels if hasattr(index, "levels") else [index]


def _identical(left: Any, right: Any) -> bool:
    if (
        left.shape != right.shape
        or list(left.dtypes) != list(right.dtypes)
        or type(left.index) is not type(right.index)
    ):
        return False
    if left.attrs != right.attrs or list(map(type, left.columns)) != list(map(type, right.columns)):
        return False
    if not (left.columns.identical(right.columns) and left.index.identical(right.index) and left.equals(right)):
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
    found: int = at + _INT32.unpack_from(data, at)[0]
    return found


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Where a field of a table is; `None` if it has none."""
    vtable = table - _INT32.unpack_from(data, table)[0]
    size: int = _UINT16.unpack_from(data, vtable)[0]
    at = 4 + 2 * number
    if at + 2 > size:
        return None
    offset: int = _UINT16.unpack_from(data, vtable + at)[0]
    return table + offset if offset else None
