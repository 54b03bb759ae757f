"""Entries of values, and commands that store them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from cachebus.messages import CacheCapacityError, CacheError, Failed, Missing, Set, Ttl

from .forms import INT, encode_form
from .memcached_chunks import CHUNKED_MAX, split
from .memcached_connection import Answer, Connection, store, unlike
from .memcached_entry import (
    HEADER,
    MISSING,
    NO_METADATA,
    Entry,
    EntryMetadata,
    expiry_of,
    kept_until,
    pack_entry,
    read_entry,
    server_expiry,
)
from .memcached_keys import Keys
from .memcached_tags import TagMemory


@dataclass(frozen=True, slots=True)
class Values:
    """How a store's values stand at a server."""

    keys: Keys
    default_ttl: float | None
    chunked: bool
    memory: TagMemory = field(default_factory=TagMemory)

    def expiry(self, ttl: Ttl, now: float) -> float:
        """Return the time at which a value's time is up; 0 for never."""
        return expiry_of(self.default_ttl if ttl == "default" else ttl, now)

    def lifetime(self, ttl: Ttl) -> float | None:
        """Return the seconds that a value is given, which the server counts whole; `None` for ever."""
        seconds = self.default_ttl if ttl == "default" else ttl
        return None if seconds is None else float(math.ceil(seconds))

    def plain(self, connection: Connection, head: str, request: Set) -> bytes | None:
        """Return the command of a write without tags or conditions; `None` if it takes more than one. Raises `CacheError`."""
        tail, kept = self.keys.tail(request.key)
        form = encode_form(request.value)
        now = connection.now()
        ttl = self.default_ttl if request.ttl == "default" else request.ttl
        expiry = 0.0 if ttl is None else expiry_of(ttl, now)
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
        if len(form) - 1 <= room:
            return [store(head + tail, pack_entry(form, kept, expiry, now, 0.0, metadata), seconds, condition)]
        limit = CHUNKED_MAX if self.chunked else max(room, 0)
        if len(form) - 1 > limit or form[0] == INT:
            raise CacheCapacityError("the value is too large for Memcached", len(form) - 1, limit)
        manifest, chunks = split(form, connection.entry_max)
        entry = pack_entry(manifest, kept, expiry, now, 0.0, metadata)
        return [
            *(store(head + chunk, body, seconds) for chunk, body in chunks),
            store(head + tail, entry, seconds, condition),
        ]


def entry_of(connection: Connection, kept: bytes, answer: Answer) -> Entry | None:
    """Return the live entry that an answer holds. Raises `CacheError`."""
    if isinstance(answer, CacheError):
        raise answer
    if not isinstance(answer, tuple):
        return None
    return read_entry(answer[0], answer[1], kept, connection.epoch, connection.now())


def not_found(answer: Any) -> Missing | Failed:
    """Return the reply to a request that wanted something else than this answer."""
    if isinstance(answer, CacheError):
        return Failed.of(answer)
    return MISSING if type(answer) is int and answer < 0 else Failed.of(unlike())
