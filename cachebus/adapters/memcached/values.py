"""Entries of values, and commands that store them. A value over the server's limit is stored in chunks, by a manifest:

    1 byte    form     that of the value: B or M
    16 bytes  id       of this very write, at random
    4 bytes   count    of the chunks, big-endian
    8 bytes   size     of the value, big-endian
    16 bytes  digest   BLAKE2b of the value

A chunk is the id, its number (4 bytes, big-endian), and its part of the value. It stands under a name with the id in it,
so that a reader never sees parts of two writes: a missing chunk, or one that does not fit the manifest, makes the value a
miss. Chunks of a value that was written over stay until their time is up, or until the server needs the room.
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
"""The form of a value and its bytes."""

CHUNKED_MAX = 64 << 20
"""Bytes of a value in chunks, at most: a reader must have it in one piece."""

CHUNKS_MAX = CHUNKED_MAX // 512
"""Chunks of a value, at most: a server's items may have 1,024 bytes or more."""


@dataclass(frozen=True, slots=True)
class Values:
    """How a store's values stand at a server."""

    keys: Keys
    default_ttl: float | None
    chunked: bool
    memory: TagMemory = field(default_factory=TagMemory)

    def expiry(self, ttl: Ttl, now: float) -> float:
        """Return the time at which a value's time is up; 0 for never. Raises `BadMessage` as `time_to_live` does."""
        seconds = self.default_ttl if ttl == "default" else ttl
        return 0.0 if seconds is None else now + math.ceil(time_to_live(seconds))

    def plain(self, connection: Connection, head: str, request: Set) -> bytes | None:
        """Return the command of a write without tags or conditions; `None` if it takes more than one. Raises `CacheError`."""
        tail, kept = self.keys.tail(request.key)
        # As `encode_form` and `expiry` have it, which cost two calls.
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
        """Return the commands that store a value, given as its form and bytes: chunks first, the entry last, under
        `condition`. Raises `CacheCapacityError` for a value that there is no room for."""
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
    """Return the entry that an answer holds, if it is live at `now`. Raises `CacheError`."""
    if isinstance(answer, CacheError):
        raise answer
    if not isinstance(answer, tuple):
        return None
    return read_entry(answer[0], answer[1], kept, connection.epoch, now)


def not_found(answer: Any) -> Missing | Failed:
    """Return the reply to a request that wanted something else than this answer."""
    if isinstance(answer, CacheError):
        return Failed.of(answer)
    return MISSING if type(answer) is int and answer < 0 else Failed.of(unlike())


# Chunks


def split(form_and_body: bytes, room: int) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The entry of a large value, form and body, and its chunks with their names; an item has `room` bytes."""
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
    """The names of the chunks, without what they begin with. None for what is no manifest."""
    if len(manifest) != MANIFEST.size:
        return []
    _, identity, count, size, _ = MANIFEST.unpack(manifest)
    # A manifest that was not written by us may claim anything, but not more chunks than a value can have.
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
    """Return the content of an entry whose chunks are these, if it has any; `None` if they are not. Raises `CacheError`."""
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
