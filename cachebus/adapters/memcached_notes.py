"""What an entry says of its value besides: how it was loaded, and of which generation its tags were.

Such an entry has the form `o`. Its value is

    4 bytes   size    of the notes, big-endian
    size      notes   msgpack: [[load time, stale for, etag, lifetime] or nil, [[tag, generation], ...]]
    rest      the form that the value has by itself, and the value
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from cachebus.messages import CacheKeyError, CacheSerializationError, LoadMetadata

from .durations import time_stale
from .forms import pack_plain, unpack_plain

NOTED = b"o"[0]
Marks = tuple[tuple[str, bytes], ...]
"""Tags, each with the generation that it had."""

_SIZE = struct.Struct(">I")
_unpack_size: Callable[[memoryview], tuple[int]] = _SIZE.unpack_from


class Notes:
    """The notes of an entry. `lifetime` is the seconds that a loaded value was given, `None` for ever."""

    __slots__ = ("lifetime", "marks", "metadata")

    def __init__(self, marks: Marks = (), metadata: LoadMetadata | None = None, lifetime: float | None = None) -> None:
        self.marks = marks
        self.metadata = metadata
        self.lifetime = lifetime

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple([tag for tag, _ in self.marks])

    @property
    def stale_for(self) -> float:
        """Seconds for which the value may be served when its time is up."""
        return time_stale(self.metadata)


NO_NOTES = Notes()


def pack_noted(notes: Notes, form_and_body: bytes) -> bytes:
    """The form and the value of an entry with notes."""
    metadata = notes.metadata
    loaded = None if metadata is None else [metadata.load_time, metadata.stale_for, metadata.etag, notes.lifetime]
    packed = pack_marked([loaded, [list(mark) for mark in notes.marks]])
    return b"".join((b"o", _SIZE.pack(len(packed)), packed, form_and_body))


def split_noted(body: memoryview) -> tuple[Notes, int, memoryview]:
    """The notes of an entry, and its value's own form and bytes. Raises `CacheSerializationError`."""
    begin = _SIZE.size
    try:
        end = begin + _unpack_size(body)[0]
        loaded, marks = unpack_plain(bytes(body[begin:end]))
        notes = Notes(marks_of(marks))
        if loaded is not None:
            load_time, stale_for, etag, notes.lifetime = loaded
            notes.metadata = LoadMetadata(load_time, stale_for, etag)
        return notes, body[end], body[end + 1 :]
    except (struct.error, ValueError, TypeError, IndexError):
        raise CacheSerializationError("the stored value is damaged") from None


def pack_marked(value: Any) -> bytes:
    """As `pack_plain`, of something with tags in it. Raises `CacheKeyError` for a tag that is no valid Unicode."""
    try:
        return pack_plain(value)
    except UnicodeEncodeError as error:
        raise CacheKeyError("a tag must be valid Unicode", ascii(error.object)[:60]) from None


def marks_of(pairs: Any) -> Marks:
    """Marks as they were packed. Raises `ValueError` or `TypeError` for anything else."""
    return tuple([(tag, generation) for tag, generation in pairs])
