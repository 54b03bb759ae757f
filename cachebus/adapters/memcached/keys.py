"""Names on the wire: nothing raw gets there, and no two namespaces share a name.

    <namespace>:<generation>:<key>      a key that Memcached can hold as it is
    <namespace>:<generation>#<hash>     any other: the hash is BLAKE2b with 32 bytes, in hexadecimal
    <namespace>:<generation>+<id>+<n>   the n-th chunk of a large value
    <namespace>:<generation>!<hash>     the lease of a live value that is being refreshed, by its key
    <namespace>:<generation>=<tag>      the generation of a tag that Memcached can hold as it is
    <namespace>:<generation>%<hash>     that of any other tag
    <namespace>:<generation>@           the generation of all tags, which each invalidation of one replaces
    <namespace>::                       the generation of the namespace
    <namespace>:~<name>                 a rate limit, whatever the generation; `<namespace>:~#<hash>` as above

A namespace has no `:`, and a generation only hexadecimal digits, so that the character behind it says what follows.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from hashlib import blake2b

from cachebus.messages import CacheConfigurationError, CacheKeyError

WIRE_MAX = 250
"""Bytes of a name on the wire, at most: Memcached's own limit."""

GENERATION_DIGITS = 17
KEPT_MAX = 1024
"""Bytes of a hashed key that are kept in the entry as they are; of a longer one another hash is kept."""

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")
is_generation = re.compile(rb"[0-9a-f]{%d}" % GENERATION_DIGITS).fullmatch
"""Match bytes that are a generation of ours."""

Hasher = Callable[[bytes], bytes]

ALL_TAGS = "@"
"""What follows the namespace's generation in the name of the generation of all tags."""


def blake(raw: bytes) -> bytes:
    """Return the hash that stands for a key on the wire."""
    return blake2b(raw, digest_size=32, person=b"cachebus.wire").digest()


class Keys:
    """The names of a namespace's keys. `hasher` makes at most 32 bytes of any number of bytes."""

    def __init__(self, namespace: str, hasher: Hasher = blake) -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise CacheConfigurationError(
                f"memcached: a namespace is 1 to 64 letters, digits, _ and -, unlike {namespace!r}"
            )
        self.namespace = namespace
        self.generation_name = f"{namespace}::".encode()
        self._room = WIRE_MAX - len(namespace) - GENERATION_DIGITS - 2
        self._hasher = hasher

    def __repr__(self) -> str:
        return f"<Keys of {self.namespace!r}>"

    def tail(self, key: str, what: str = "a cache key") -> tuple[str, bytes]:
        """Return what follows the generation, and what an entry keeps of the key: nothing if the name says it all.

        Raises `CacheKeyError` for a key that is no valid Unicode.
        """
        # Printable ASCII is what lies between the control characters and DEL; a space is printable too.
        if key.isascii() and key.isprintable() and " " not in key and len(key) <= self._room:
            return f":{key}", b""
        try:
            raw = key.encode()
        except UnicodeEncodeError:
            raise CacheKeyError(f"{what} must be valid Unicode", ascii(key)[:60]) from None
        kept = raw if len(raw) <= KEPT_MAX else blake2b(raw, person=b"cachebus.kept").digest()
        return f"#{self._hasher(raw).hex()}", kept

    def limit(self, name: str) -> str:
        """Return the name of a rate limit on the wire. Raises `CacheKeyError` as `tail` does."""
        tail, kept = self.tail(name)
        if tail[0] == ":":
            return f"{self.namespace}:~{tail}"
        # An item of a limit keeps no name to compare, so that not any hash will do.
        return f"{self.namespace}:~#{blake(kept).hex()}"

    def refresh(self, key: str) -> str:
        """Return what follows the generation in the name of the lease of a live value, whose key has a tail."""
        return f"!{self._hasher(key.encode()).hex()}"

    def tag(self, tag: str) -> str:
        """Return what follows the generation in the name of a tag's generation. Raises `CacheKeyError` as `tail` does."""
        # Two tags with one hash would be invalidated together, and no worse.
        tail, _ = self.tail(tag, "a tag")
        return f"={tag}" if tail[0] == ":" else f"%{tail[1:]}"

    def head(self, generation: bytes) -> str:
        """Return what stands before the tail."""
        return f"{self.namespace}:{generation.decode()}"


def new_generation(now: float) -> bytes:
    """Return a generation that never was: microseconds of Unix time, and 16 random bits in case the clock was set back."""
    return b"%013x%04x" % (int(now * 1e6) & (1 << 52) - 1, secrets.randbits(16))
