"""Values over the server's limit for items, in several of them.

The entry of the key is a manifest:

    1 byte    form     that of the value: B or M
    16 bytes  id       of this very write, at random
    4 bytes   count    of the chunks, big-endian
    8 bytes   size     of the value, big-endian
    16 bytes  digest   BLAKE2b of the value

A chunk is the id, its number (4 bytes, big-endian), and its part of the value. It stands under a name with the id in it,
so that a reader sees one write or another, and never parts of both: a missing chunk, or one that is not what the manifest
says, makes the value a miss. Chunks of a value that was written over stay until their time is up or the server needs the
room.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence
from hashlib import blake2b
from hmac import compare_digest

from .memcached_connection import Answer, Exchange, first_error, read
from .memcached_entry import CHUNKED, Entry
from .memcached_session import Session

MANIFEST = struct.Struct(">c16sIQ16s")
_CHUNK = struct.Struct(">16sI")

Content = tuple[int, bytes | memoryview]
"""The form of a value and its bytes."""

CHUNKED_MAX = 64 << 20
"""Bytes of a value in chunks, at most: a reader must have it in one piece."""

CHUNKS_MAX = CHUNKED_MAX // 512
"""Chunks of a value, at most: a server's items may have 1,024 bytes or more."""


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
