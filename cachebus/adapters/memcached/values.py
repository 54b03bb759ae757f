"""Entries of values, and the commands that store them. Large values are stored in chunks, with a manifest:

    1 byte    type tag  of the value: B or M
    16 bytes  id        random, one per write
    4 bytes   count     number of chunks, big-endian
    8 bytes   size      size of the value, big-endian
    16 bytes  digest    BLAKE2b of the value

A chunk consists of the id, its number (4 bytes, big-endian), and a part of the value. Its item name contains the id,
so a reader never combines the parts of two writes. If a chunk is missing or does not match the manifest, the value is
a miss. When a value is overwritten, its old chunks stay until they expire or the server needs the memory.
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from hmac import compare_digest
from typing import Any

from cachebus.messages import CacheCapacityError, CacheError, Failed, Missing, Set, Ttl

from ..common.encoding import INT, encode_form
from ..common.validation import time_to_live
from .connection import Answer, Connection, Exchange, first_error, read, store, unlike
from .entry import (
    CHUNKED,
    HEADER,
    MISSING,
    NO_METADATA,
    Entry,
    EntryMetadata,
    kept_until,
    pack_entry,
    read_entry,
    server_expiry,
)
from .keys import Keys
from .session import Session, TagMemory

MANIFEST = struct.Struct(">c16sIQ16s")
_CHUNK = struct.Struct(">16sI")

Content = tuple[int, bytes | memoryview]
"""The type tag of a value and its bytes."""

CHUNKED_MAX = 64 << 20
"""Maximum size in bytes of a chunked value: a reader must hold it in memory."""

CHUNKS_MAX = CHUNKED_MAX // 512
"""Maximum number of chunks of a value: the item limit of a server is at least 1,024 bytes."""


@dataclass(frozen=True, slots=True)
class Values:
    """The encoding of a store's values as items."""

    keys: Keys
    default_ttl: float | None
    chunked: bool
    memory: TagMemory = field(default_factory=TagMemory)

    def expiry(self, ttl: Ttl, now: float) -> float:
        """Return the expiry time of a value; 0 means never. Raises `BadMessage` if `ttl` is not valid."""
        seconds = self.default_ttl if ttl == "default" else ttl
        return 0.0 if seconds is None else now + math.ceil(time_to_live(seconds))

    def plain(self, connection: Connection, head: str, request: Set) -> bytes | None:
        """Return the command for a write without tags or conditions, or `None` if it needs several.

        Raises `CacheError`.
        """
        tail, kept = self.keys.tail(request.key)
        # `encode_form` and `expiry` are inlined to save two calls.
        value, now = request.value, connection.now()
        form = b"B" + value if type(value) is bytes else encode_form(value)
        ttl = self.default_ttl if request.ttl == "default" else request.ttl
        expiry = 0.0 if ttl is None else now + math.ceil(time_to_live(ttl))
        if len(form) + len(kept) + HEADER.size > connection.entry_max:
            return None
        entry = HEADER.pack(form[:1], len(kept), expiry, now, 0.0) + kept + form[1:]
        seconds = server_expiry(expiry, now) if expiry else 0
        return f"ms {head}{tail} {len(entry)} T{seconds} c\r\n".encode() + entry + b"\r\n"

    def commands(
        self,
        connection: Connection,
        head: str,
        name: tuple[str, bytes],
        form: bytes,
        expiry: float,
        metadata: EntryMetadata = NO_METADATA,
        condition: bytes = b"",
    ) -> list[bytes]:
        """Return the commands that store a value: the chunks first, then the entry, under `condition`.

        `form` is the type tag and the bytes of the value. Raises `CacheCapacityError` if the value is too large.
        """
        tail, kept = name
        now = connection.now()
        seconds = server_expiry(kept_until(expiry, metadata), now)
        room = connection.entry_max - HEADER.size - len(kept)
        if metadata is not NO_METADATA:
            room -= len(metadata.packed())
        chunks: list[bytes] = []
        if len(form) - 1 > room:
            limit = CHUNKED_MAX if self.chunked else max(room, 0)
            if len(form) - 1 > limit or form[0] == INT:
                raise CacheCapacityError("the value is too large for Memcached", len(form) - 1, limit)
            form, parts = split(form, connection.entry_max)
            chunks = [store(head + chunk, body, seconds) for chunk, body in parts]
        return [*chunks, store(head + tail, pack_entry(form, kept, expiry, now, 0.0, metadata), seconds, condition)]


def entry_of(connection: Connection, kept: bytes, answer: Answer, now: float) -> Entry | None:
    """Return the entry in an answer if it is live at `now`, or `None`. Raises `CacheError`."""
    if isinstance(answer, CacheError):
        raise answer
    if not isinstance(answer, tuple):
        return None
    return read_entry(answer[0], answer[1], kept, connection.epoch, now)


def not_found(answer: Any) -> Missing | Failed:
    """Return the reply for an answer that is not the expected one: `Missing` for a miss, otherwise `Failed`."""
    if isinstance(answer, CacheError):
        return Failed.of(answer)
    return MISSING if type(answer) is int and answer < 0 else Failed.of(unlike())


# Chunks


def split(form_and_body: bytes, room: int) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Split a large value into the content of its entry and its chunks with their names. An item holds `room` bytes."""
    body = memoryview(form_and_body)[1:]
    identity = secrets.token_bytes(16)
    step = room - _CHUNK.size
    chunks = [
        (_tail(identity, number), b"".join((_CHUNK.pack(identity, number), body[at : at + step])))
        for number, at in enumerate(range(0, len(body), step))
    ]
    manifest = MANIFEST.pack(form_and_body[:1], identity, len(chunks), len(body), _digest(body))
    return b"C" + manifest, chunks


def chunk_tails(manifest: bytes | memoryview) -> list[str]:
    """Return the name suffixes of the chunks, or an empty list if `manifest` is not valid."""
    if len(manifest) != MANIFEST.size:
        return []
    _, identity, count, size, _ = MANIFEST.unpack(manifest)
    # A foreign manifest may contain any number, but a value cannot have more chunks than this.
    return [_tail(identity, number) for number in range(count)] if count <= min(size, CHUNKS_MAX) else []


def content_of(session: Session, entry: Entry) -> Exchange[Content | None]:
    """Return the content of an entry; `None` if a chunk is missing. Raises `CacheError` and `NamespaceChanged`."""
    if entry.form != CHUNKED:
        return entry.form, entry.body
    head = yield from session.head()
    return joined(entry, (yield from session.ask(chunk_reads(head, entry))))


def chunk_reads(head: str, entry: Entry) -> list[bytes]:
    """Return the commands that read the chunks of an entry."""
    return [read(head + name) for name in chunk_tails(entry.body)]


def joined(entry: Entry, answers: Sequence[Answer]) -> Content | None:
    """Return the content of an entry from its chunks, if it has any, or `None` if they do not match.

    Raises `CacheError`.
    """
    if entry.form != CHUNKED:
        return entry.form, entry.body
    if (error := first_error(answers)) is not None:
        raise error
    if not answers:
        return None
    form, identity, _, size, digest = MANIFEST.unpack(entry.body)
    pieces: list[memoryview] = []
    for number, answer in enumerate(answers):
        if not isinstance(answer, tuple) or answer[0][: _CHUNK.size] != _CHUNK.pack(identity, number):
            return None
        pieces.append(memoryview(answer[0])[_CHUNK.size :])
    body = b"".join(pieces)
    if len(body) != size or not compare_digest(_digest(body), digest):
        return None
    return form[0], body


def _tail(identity: bytes, number: int) -> str:
    return f"+{identity.hex()}+{number}"


def _digest(body: bytes | memoryview) -> bytes:
    return blake2b(body, digest_size=16).digest()
