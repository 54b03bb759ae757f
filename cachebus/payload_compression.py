"""Compression of payloads: above a threshold, only where it helps, and never unpacked beyond a bound.

Compressed content has its size before compression in front of it: 4 bytes, big-endian. So what would be too large is refused
before anything is unpacked, and what does not unpack to exactly that size is damaged.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from .payload_extras import load
from .payload_format import COMPRESSION_CODES, CompressionName

LEVELS: dict[str, tuple[int, int, int]] = {"zlib": (1, 9, 6), "gzip": (1, 9, 6), "lz4": (0, 12, 0), "zstd": (1, 19, 3)}
"""The lowest and the highest level of each, and the usual one."""

_WINDOW_MAX = 2**23
"""What zstd needs for its levels up to 19."""


class Compressor(Protocol):
    """One way to compress. `unpack` raises `ValueError` unless the data unpack to exactly `size` bytes."""

    code: int

    def pack(self, data: bytes) -> bytes: ...

    def unpack(self, data: memoryview, size: int) -> bytes: ...


class _Zlib:
    def __init__(self, level: int, *, gzip: bool) -> None:
        self.code = COMPRESSION_CODES["gzip" if gzip else "zlib"]
        self._level = level
        self._wbits = 31 if gzip else 15

    def pack(self, data: bytes) -> bytes:
        return zlib.compress(data, self._level, self._wbits)

    def unpack(self, data: memoryview, size: int) -> bytes:
        unpacker = zlib.decompressobj(self._wbits)
        try:
            # A byte more than there should be, to see the end of the stream and to notice what goes on.
            out = unpacker.decompress(data, size + 1)
        except zlib.error:
            raise ValueError("damaged") from None
        if not unpacker.eof or unpacker.unused_data or len(out) != size:
            raise ValueError("not of the size that it claims")
        return out


class _Lz4:
    code = COMPRESSION_CODES["lz4"]

    def __init__(self, level: int) -> None:
        self._frame = load("lz4.frame", "the compression 'lz4'")
        self._level = level

    def pack(self, data: bytes) -> bytes:
        packed: bytes = self._frame.compress(data, compression_level=self._level, store_size=False)
        return packed

    def unpack(self, data: memoryview, size: int) -> bytes:
        unpacker = self._frame.LZ4FrameDecompressor()
        try:
            out: bytes = unpacker.decompress(data, size + 1)
        except (RuntimeError, EOFError):
            raise ValueError("damaged") from None
        if not unpacker.eof or unpacker.unused_data or len(out) != size:
            raise ValueError("not of the size that it claims")
        return out


class _Zstd:
    code = COMPRESSION_CODES["zstd"]

    def __init__(self, level: int) -> None:
        self._zstd = load("zstandard", "the compression 'zstd'")
        self._level = level
        # Neither a compressor nor a decompressor may be used by two threads at a time.
        self._mine = threading.local()

    def pack(self, data: bytes) -> bytes:
        try:
            compressor = self._mine.compressor
        except AttributeError:
            compressor = self._mine.compressor = self._zstd.ZstdCompressor(level=self._level)
        packed: bytes = compressor.compress(data)
        return packed

    def unpack(self, data: memoryview, size: int) -> bytes:
        try:
            unpacker = self._mine.decompressor
        except AttributeError:
            unpacker = self._mine.decompressor = self._zstd.ZstdDecompressor(max_window_size=_WINDOW_MAX)
        try:
            # The library makes room for what the frame says, so that must be what the header says.
            if self._zstd.frame_content_size(data) != size:
                raise ValueError("not of the size that it claims")
            out: bytes = unpacker.decompress(data, max_output_size=size, allow_extra_data=False)
        except self._zstd.ZstdError:
            raise ValueError("damaged") from None
        if len(out) != size:
            raise ValueError("not of the size that it claims")
        return out


_MAKERS: dict[str, Callable[[int], Any]] = {
    "zlib": lambda level: _Zlib(level, gzip=False),
    "gzip": lambda level: _Zlib(level, gzip=True),
    "lz4": _Lz4,
    "zstd": _Zstd,
}
_NAMES = {code: name for name, code in COMPRESSION_CODES.items() if name != "none"}


def make_compressor(name: CompressionName, level: int | None = None) -> Compressor | None:
    """The compressor of a name, at its usual level if none is given. Raises `CacheConfigurationError` where its library is
    not installed."""
    if name == "none":
        return None
    made: Compressor = _MAKERS[name](LEVELS[name][2] if level is None else level)
    return made


def compressor_of(code: int) -> Compressor | None:
    """The compressor that a header names, to unpack with; `None` for a code that nobody knows."""
    name = _NAMES.get(code)
    return None if name is None else make_compressor(name)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
