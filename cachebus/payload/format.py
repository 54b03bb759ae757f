"""Binary layout of payloads, compression, and the binding of signatures and seals.

    1 byte   version      1
    1 byte   serializer   m msgpack, j json, a auto, d arrow, p pickle; e an exception (see `cached_errors`)
    1 byte   compression  - none, z zlib, g gzip, l lz4, s zstd
    1 byte   protection   bits: 1 checksum, 2 signature, 4 seal
    rest     sealed:      1 byte length of the key id, key id, 12 bytes nonce, ciphertext, 16 bytes tag
             signed:      32 bytes HMAC-SHA256, then the content
             checksummed: 8 bytes xxh3-64 of header and content, big-endian, then the content

The content is the output of the serializer. If it is compressed, its uncompressed size precedes it (4 bytes,
big-endian). Content that would be too large is rejected before decompression. Content whose decompressed size differs
is damaged. With both a signature and a seal, the signature is inside the seal.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple, TypeAlias

from cachebus.messages import CacheConfigurationError

VERSION = 1
HEADER_SIZE = 4
SIZE = struct.Struct(">I")
SIZE_MAX = 2**32 - 1

CHECKSUMMED, SIGNED, SEALED = 1, 2, 4

SerializerName: TypeAlias = Literal["msgpack", "json", "auto", "arrow", "pickle", "none"]
CompressionName: TypeAlias = Literal["none", "zlib", "gzip", "lz4", "zstd"]

SERIALIZER_CODES = {
    name: ord(code) for name, code in zip(("msgpack", "json", "auto", "arrow", "pickle"), "mjadp", strict=True)
}
ERROR_CODE = ord("e")
COMPRESSION_CODES = {
    name: ord(code) for name, code in zip(("none", "zlib", "gzip", "lz4", "zstd"), "-zgls", strict=True)
}

EXTRAS = {
    "orjson": "json",
    "lz4": "lz4",
    "zstandard": "zstd",
    "xxhash": "checksum",
    "cryptography": "crypto",
    **dict.fromkeys(("pyarrow", "pandas", "numpy"), "arrow"),
}
"""Extra of cachebus that installs a package."""


def binding(*parts: str) -> bytes:
    """Return the binding of signatures and seals: tenant, namespace and key, each preceded by its length.

    Different parts give different bindings. The binding of the first parts is a prefix of the binding of all parts.
    """
    return b"".join([SIZE.pack(len(part)) + part for part in map(str.encode, parts)])


def load(module: str, what: str) -> Any:
    """Import a module of an extra. Raises `CacheConfigurationError`, which names the extra and `what` requires it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise CacheConfigurationError(f"{what} requires {package}: pip install 'cachebus[{EXTRAS[package]}]'") from None


LEVELS: dict[str, tuple[int, int, int]] = {"zlib": (1, 9, 6), "gzip": (1, 9, 6), "lz4": (0, 12, 0), "zstd": (1, 19, 3)}
"""Minimum, maximum and default level by compression."""

_ZSTD_WINDOW_MAX = 2**23
"""Window size that zstd needs for levels up to 19, in bytes."""


class Compressor(NamedTuple):
    """A compression algorithm and level. `unpack` raises `ValueError` unless the result has exactly `size` bytes."""

    code: int
    pack: Callable[[bytes], bytes]
    unpack: Callable[[memoryview, int], bytes]


def make_compressor(name: CompressionName, level: int | None = None) -> Compressor | None:
    """Return the compressor with a name, at its default level if `level` is `None`.

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
        # One extra byte reveals whether the stream ends or continues.
        out: bytes = unpacker.decompress(data, size + 1)
    except damaged:
        raise ValueError("damaged") from None
    if not unpacker.eof or unpacker.unused_data or len(out) != size:
        raise ValueError("not of the size that it claims")
    return out


class _Zstd(threading.local):
    """Compressor and decompressor of each thread. Neither is thread-safe."""

    def __init__(self, level: int) -> None:
        self._zstd = load("zstandard", "the compression 'zstd'")
        self._compressor = self._zstd.ZstdCompressor(level=level)
        self._decompressor = self._zstd.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)

    def pack(self, data: bytes) -> bytes:
        packed: bytes = self._compressor.compress(data)
        return packed

    def unpack(self, data: memoryview, size: int) -> bytes:
        try:
            # The library allocates the size given in the frame, so it must match the size in the header.
            if self._zstd.frame_content_size(data) != size:
                raise ValueError("not of the size that it claims")
            out: bytes = self._decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
        except self._zstd.ZstdError:
            raise ValueError("damaged") from None
        if len(out) != size:
            raise ValueError("not of the size that it claims")
        return out
