"""Tags in Redis: generation counters, and what an entry keeps of them.

A namespace has one *sequence*: a random epoch and a number that each invalidation of a tag makes larger. A tag has a
*counter*: the epoch, and the number at its last invalidation. An entry with tags has a *stamp*: epoch and number at the start
of its load. It is valid while each of its tags has a counter of the stamp's epoch that is not larger than the stamp.

So an invalidation is one command whatever the number of entries, a counter that is lost makes entries invalid and not
valid, and a sequence that is lost begins with another epoch, by which nothing older is valid. How the sequence knows
without a counter when a tag was last invalidated, at most, is in `redis_tag_scripts`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from cachebus.messages import BadMessage, CacheError, CacheSerializationError, Failed, Found, Missing

from .forms import pack_plain, unpack_plain
from .redis_values import HEADER, TAGGED, VALUE_AT, read_or_fail

STAMP_BYTES = 16
NO_STAMP = bytes(STAMP_BYTES)
"""Of a load that began when its namespace had no sequence: nothing with tags may come of it."""

MOST_HINTS = 16_384
"""The keys whose tags a store remembers at most."""

_LENGTH = struct.Struct(">I")
_FORM = b"t"


class Claim(NamedTuple):
    """That none of some tags was invalidated since a stamp was taken."""

    stamp: bytes
    tags: tuple[str, ...]

    def holds(self, counters: Mapping[str, bytes | None]) -> bool:
        """Whether it is so, by the counters of the tags."""
        for tag in self.tags:
            counter = counters[tag]
            # Doubles above zero are in the order of their bytes.
            if counter is None or counter[:8] != self.stamp[:8] or counter > self.stamp:
                return False
        return True

    def verdict(self, holds: bool) -> bytes:
        """What a script is told that cannot look for itself."""
        return (b"+" if holds else b"-") + self.stamp + pack_tags(self.tags)


def new_epoch() -> bytes:
    """An epoch that no entry has, and no stamp without one."""
    return b"\x01" + os.urandom(7)


def pack_tags(tags: Sequence[str]) -> bytes:
    """Tags as they stand in an entry, nothing for none. Raises `BadMessage` for what is no valid Unicode."""
    try:
        return pack_plain(list(tags)) if tags else b""
    except UnicodeEncodeError:
        raise BadMessage("a tag must be valid Unicode") from None


def pack_tagged(body: bytes, tags: Sequence[str], stamp: bytes) -> bytes:
    """What stands behind the header of an entry with tags; `body` is its form and value."""
    packed = pack_tags(tags)
    return b"".join((_FORM, _LENGTH.pack(len(packed)), stamp, packed, body))


def split_tagged(raw: bytes) -> tuple[Claim, bytes]:
    """The claim that an entry with tags is valid by, and the entry without tags. Raises `CacheSerializationError`."""
    begin = VALUE_AT + _LENGTH.size + STAMP_BYTES
    try:
        end = begin + _LENGTH.unpack_from(raw, VALUE_AT)[0]
        tags = tuple(unpack_plain(raw[begin:end]))
    except (struct.error, ValueError, TypeError):
        raise CacheSerializationError("the stored value is damaged") from None
    if end > len(raw) or not all(isinstance(tag, str) for tag in tags):
        raise CacheSerializationError("the stored value is damaged")
    return Claim(raw[begin - STAMP_BYTES : begin], tags), raw[: HEADER.size] + raw[end:]


def read_tagged(raw: bytes, now: float, *, live: bool = False) -> tuple[Claim | None, Found | Missing | Failed]:
    """As `read_or_fail`, of an entry with tags: what it is valid by, and what it is then."""
    try:
        claim, plain = split_tagged(raw)
        if len(plain) > HEADER.size and plain[HEADER.size] == TAGGED:
            raise CacheSerializationError("the stored value is damaged")
    except CacheError as error:
        return None, Failed.of(error)
    answer = read_or_fail(plain, now, live=live)
    if not isinstance(answer, Found):
        return None, answer
    return claim, replace(answer, tags=claim.tags)


@dataclass(slots=True)
class TagSpace:
    """The tags of a namespace, as a store sees them: the names of their keys, and which key had which tags.

    `here` says that scripts get at the counters, `seen` that the namespace has tags as far as this store knows. All
    names are in one slot of a cluster.
    """

    namespace: str
    here: bool
    seen: bool = False
    _hints: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def new_stamp(self, tags: Sequence[str]) -> bytes:
        """The 16 bytes that a request with tags begins with where scripts get at the counters: an epoch for a sequence that
        is not there."""
        self.seen = self.seen or bool(tags)
        return new_epoch() + NO_STAMP[8:]

    @property
    def sequence(self) -> str:
        """The key of the sequence."""
        return f"{self.namespace}#tags:{{{self.namespace}}}"

    def counter(self, tag: str) -> str:
        """The key of a tag's counter."""
        return f"{self.sequence}:{tag}"

    def hint(self, key: str) -> tuple[str, ...]:
        """The tags that a key had the last time."""
        return self._hints.get(key, ())

    def learn(self, key: str, tags: tuple[str, ...]) -> None:
        """Remember the tags of a key, so that their counters are asked for with it."""
        self.seen = True
        if not self.here:
            if key not in self._hints and len(self._hints) >= MOST_HINTS:
                del self._hints[next(iter(self._hints))]
            self._hints[key] = tags


def all_tags(claims: Iterable[Claim]) -> dict[str, None]:
    """The tags of claims, each once."""
    return {tag: None for claim in claims for tag in claim.tags}
