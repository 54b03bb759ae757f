"""How a payload is laid out: one header, the same whatever is inside, and what a signature or a seal is bound to.

    1 byte   version      1
    1 byte   serializer   m msgpack, j json, a auto, d arrow, p pickle; e an exception (see `cached_errors`)
    1 byte   compression  - none, z zlib, g gzip, l lz4, s zstd
    1 byte   protection   bits: 1 checksum, 2 signature, 4 seal
    rest     sealed:      1 byte length of the key id, key id, 12 bytes nonce, ciphertext, 16 bytes tag
             signed:      32 bytes HMAC-SHA256, then the content
             checksummed: 8 bytes xxh3-64 of header and content, big-endian, then the content

The content is what the serializer wrote; if it is compressed, 4 bytes, big-endian, with its size before compression come
first. Signed and sealed, the signature is inside the seal.
"""

from __future__ import annotations

import struct
from typing import Literal, TypeAlias

VERSION = 1
HEADER_SIZE = 4
SIZE = struct.Struct(">I")
SIZE_MAX = 2**32 - 1

CHECKSUMMED, SIGNED, SEALED = 1, 2, 4

SerializerName: TypeAlias = Literal["msgpack", "json", "auto", "arrow", "pickle", "none"]
CompressionName: TypeAlias = Literal["none", "zlib", "gzip", "lz4", "zstd"]

SERIALIZER_CODES: dict[str, int] = {
    "msgpack": ord("m"),
    "json": ord("j"),
    "auto": ord("a"),
    "arrow": ord("d"),
    "pickle": ord("p"),
}
ERROR_CODE = ord("e")
COMPRESSION_CODES: dict[str, int] = {
    "none": ord("-"),
    "zlib": ord("z"),
    "gzip": ord("g"),
    "lz4": ord("l"),
    "zstd": ord("s"),
}

RejectReason: TypeAlias = Literal[
    "format", "serializer", "compression", "checksum", "signature", "seal", "protection", "capacity", "content", "type"
]
"""Why a stored payload is not taken: `format` it is none of ours or of another version; `serializer` another one wrote it;
`compression`, `checksum`, `signature`, `seal` that step failed; `protection` it is less or otherwise protected than the
settings demand; `capacity` it would unpack to more than `max_size`; `content` the serializer cannot read it; `type` it is
not of the type that the caller asked for."""


def binding(*parts: str) -> bytes:
    """What a signature and a seal are bound to: tenant, namespace and key. Each part has its length before it, so that no two
    bindings are the same. A binding of the first parts is the beginning of one of all parts."""
    return b"".join([SIZE.pack(len(part)) + part for part in map(str.encode, parts)])
