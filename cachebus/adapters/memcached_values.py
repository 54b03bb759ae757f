"""Making entries of values, and commands of entries."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cachebus.messages import CacheBackendError, CacheCapacityError, CacheError, Failed, Missing, Ttl

from .forms import INT
from .memcached_chunks import CHUNKED_MAX, split
from .memcached_connection import EXISTS, MISS, NOT_STORED, Answer, Connection
from .memcached_entries import HEADER, MISSING, Entry, expiry_of, kept_until, pack_entry, read_entry, server_expiry
from .memcached_errors import BACKEND
from .memcached_keys import Keys
from .memcached_notes import NO_NOTES, Notes, pack_noted
from .memcached_tags import TagMemory


@dataclass(frozen=True, slots=True)
class Packed:
    """An entry on its way to the server: what is sent before it, its bytes, and how long the server shall keep it."""

    entry: bytes
    seconds: int
    chunks: tuple[tuple[str, bytes], ...] = ()

    def commands(self, head: str, tail: str, condition: bytes = b"") -> list[bytes]:
        """The commands that store it, the entry's last; `condition` is that of the entry."""
        return [
            *(store(head + name, chunk, self.seconds) for name, chunk in self.chunks),
            store(head + tail, self.entry, self.seconds, condition),
        ]


@dataclass(frozen=True, slots=True)
class Values:
    """How a store's values stand at a server."""

    keys: Keys
    default_ttl: float | None
    chunked: bool
    memory: TagMemory = field(default_factory=TagMemory)

    def expiry(self, ttl: Ttl, now: float) -> float:
        """The time at which a value's time is up; 0 for never."""
        return expiry_of(self.default_ttl if ttl == "default" else ttl, now)

    def lifetime(self, ttl: Ttl) -> float | None:
        """The seconds that a value is given, which the server counts whole; `None` for ever."""
        seconds = self.default_ttl if ttl == "default" else ttl
        return None if seconds is None else float(math.ceil(seconds))

    def pack(self, form: bytes, kept: bytes, expiry: float, connection: Connection, notes: Notes = NO_NOTES) -> Packed:
        """A value, by its form and bytes, as an entry. Raises `CacheCapacityError` for what there is no room for."""
        now = connection.now()
        seconds = server_expiry(kept_until(expiry, notes), now)
        room = connection.entry_max - HEADER.size - len(kept)
        if notes is not NO_NOTES:
            room -= len(pack_noted(notes, b""))
        if len(form) - 1 <= room:
            return Packed(pack_entry(form, kept, expiry, now, 0.0, notes), seconds)
        limit = CHUNKED_MAX if self.chunked else max(room, 0)
        if len(form) - 1 > limit or form[0] == INT:
            raise CacheCapacityError("the value is too large for Memcached", len(form) - 1, limit)
        manifest, chunks = split(form, connection.entry_max)
        return Packed(pack_entry(manifest, kept, expiry, now, 0.0, notes), seconds, tuple(chunks))


def entry_of(connection: Connection, kept: bytes, answer: Answer) -> Entry | None:
    """The live entry that an answer holds. Raises `CacheError`."""
    if isinstance(answer, CacheError):
        raise answer
    if not isinstance(answer, tuple):
        return None
    return read_entry(answer[0], answer[1], kept, connection.epoch, connection.now())


def store(name: str, entry: bytes, seconds: int, condition: bytes = b"") -> bytes:
    """The command that stores an entry and says its CAS token."""
    return b"".join((f"ms {name} {len(entry)} T{seconds} c".encode(), condition, b"\r\n", entry, b"\r\n"))


def not_found(answer: Answer) -> Missing | Failed:
    """The reply to whoever wanted something else than this answer."""
    if isinstance(answer, CacheError):
        return Failed.of(answer)
    if answer in (MISS, NOT_STORED, EXISTS):
        return MISSING
    return Failed.of(CacheBackendError("the server gave an answer to something else; Memcached 1.6 is needed", BACKEND))
