"""The layout of a payload: one header for every content, and what signatures and seals are bound to.

    1 byte   version      1
    1 byte   serializer   m msgpack, j json, a auto, d arrow, p pickle; e an exception (see `cached_errors`)
    1 byte   compression  - none, z zlib, g gzip, l lz4, s zstd
    1 byte   protection   bits: 1 checksum, 2 signature, 4 seal
    rest     sealed:      1 byte length of the key id, key id, 12 bytes nonce, ciphertext, 16 bytes tag
             signed:      32 bytes HMAC-SHA256, then the content
             checksummed: 8 bytes xxh3-64 of header and content, big-endian, then the content

The content is what the serializer wrote. Compressed content follows its size before compression: 4 bytes, big-endian.
With both a signature and a seal, the signature is inside the seal.
"""

from __future__ import annotations

import struct
from importlib import import_module
from typing import Any, Literal, TypeAlias

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
"""Which extra of cachebus brings a package."""


def binding(*parts: str) -> bytes:
    """Return what a signature and a seal are bound to: tenant, namespace and key, each after its length.

    No two bindings are the same, and the binding of the first parts is the beginning of the binding of all parts.
    """
    return b"".join([SIZE.pack(len(part)) + part for part in map(str.encode, parts)])


def load(module: str, what: str) -> Any:
    """Import a module of an extra. Raises `CacheConfigurationError` that names `what` needs it, and the extra."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise CacheConfigurationError(f"{what} needs {package}: pip install 'cachebus[{EXTRAS[package]}]'") from None
