"""Compression of payloads: above a threshold, only where it helps, and never unpacked beyond a bound.

Compressed content follows its size before compression: 4 bytes, big-endian. Content that would be too large is refused before
it is unpacked, and content that does not unpack to exactly that size is damaged.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .payload_format import COMPRESSION_CODES, CompressionName, load

LEVELS: dict[str, tuple[int, int, int]] = {"zlib": (1, 9, 6), "gzip": (1, 9, 6), "lz4": (0, 12, 0), "zstd": (1, 19, 3)}
"""The lowest, the highest and the usual level of each."""

_ZSTD_WINDOW_MAX = 2**23
"""What zstd needs for its levels up to 19."""


class Compressor(NamedTuple):
    """An algorithm at a level. `unpack` raises `ValueError` unless the data unpack to exactly `size` bytes."""

    code: int
    pack: Callable[[bytes], bytes]
    unpack: Callable[[memoryview, int], bytes]


def make_compressor(name: CompressionName, level: int | None = None) -> Compressor | None:
    """Return the compressor of a name, at its usual level if `level` is `None`.

    Raises `CacheConfigurationError` if its library is not installed.
    """
    if name == "none":
        return None
    level = LEVELS[name][2] if level is None else level
    if name == "zstd":
        zstd = _Zstd(level)
        return Compressor(COMPRESSION_CODES[name], zstd.pack, zstd.unpack)
    pack: Callable[[bytes], bytes]
    if name == "lz4":
        frame = load("lz4.frame", "the compression 'lz4'")
        pack = partial(frame.compress, compression_level=level, store_size=False)
        unpack = partial(_unpack, frame.LZ4FrameDecompressor, (RuntimeError, EOFError))
    else:
        wbits = 31 if name == "gzip" else 15
        pack = partial(zlib.compress, level=level, wbits=wbits)
        unpack = partial(_unpack, partial(zlib.decompressobj, wbits), (zlib.error,))
    return Compressor(COMPRESSION_CODES[name], pack, unpack)


def _unpack(
    make_unpacker: Callable[[], Any], damaged: tuple[type[Exception], ...], data: memoryview, size: int
) -> bytes:
    unpacker = make_unpacker()
    try:
        # One byte more than expected shows the end of the stream, and a stream that goes on.
        out: bytes = unpacker.decompress(data, size + 1)
    except damaged:
        raise ValueError("damaged") from None
    if not unpacker.eof or unpacker.unused_data or len(out) != size:
        raise ValueError("not of the size that it claims")
    return out


class _Zstd(threading.local):
    """The compressor and the decompressor of each thread: neither may be used by two at a time."""

    def __init__(self, level: int) -> None:
        self._zstd = load("zstandard", "the compression 'zstd'")
        self._compressor = self._zstd.ZstdCompressor(level=level)
        self._decompressor = self._zstd.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)

    def pack(self, data: bytes) -> bytes:
        packed: bytes = self._compressor.compress(data)
        return packed

    def unpack(self, data: memoryview, size: int) -> bytes:
        try:
            # The library allocates what the frame says, so that must be what the header says.
            if self._zstd.frame_content_size(data) != size:
                raise ValueError("not of the size that it claims")
            out: bytes = self._decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
        except self._zstd.ZstdError:
            raise ValueError("damaged") from None
        if len(out) != size:
            raise ValueError("not of the size that it claims")
        return out
