"""The names of items in Memcached. Unsafe keys are never sent raw, and names of different namespaces never collide.

    <namespace>:<generation>:<key>      a key that Memcached accepts unchanged
    <namespace>:<generation>#<hash>     any other key: its BLAKE2b hash with 32 bytes, in hexadecimal
    <namespace>:<generation>+<id>+<n>   the n-th chunk of a large value
    <namespace>:<generation>!<hash>     the lease of a live value that is being refreshed, by the hash of its key
    <namespace>:<generation>=<tag>      the generation of a tag that Memcached accepts unchanged
    <namespace>:<generation>%<hash>     the generation of any other tag
    <namespace>:<generation>@           the generation of all tags, which every tag invalidation replaces
    <namespace>::                       the generation of the namespace
    <namespace>:~<name>                 a rate limit, independent of the generation; `<namespace>:~#<hash>` as above

A namespace contains no `:`, and a generation only hexadecimal digits, so the next character determines the kind of
name.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from hashlib import blake2b

from cachebus.messages import CacheConfigurationError, CacheKeyError

WIRE_MAX = 250
"""Maximum length of an item name in bytes: the limit of Memcached."""

GENERATION_DIGITS = 17
KEPT_MAX = 1024
"""Maximum size in bytes of a hashed key that the entry stores unchanged. For a longer key it stores a second hash."""

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")
is_generation = re.compile(rb"[0-9a-f]{%d}" % GENERATION_DIGITS).fullmatch
"""Match bytes that are a valid generation."""

Hasher = Callable[[bytes], bytes]

ALL_TAGS = "@"
"""Suffix, after the namespace's generation, of the item with the generation of all tags."""


def blake(raw: bytes) -> bytes:
    """Return the hash that replaces a key in an item name."""
    return blake2b(raw, digest_size=32, person=b"cachebus.wire").digest()


class Keys:
    """The item names of a namespace. `hasher` returns a hash of at most 32 bytes."""

    def __init__(self, namespace: str, hasher: Hasher = blake) -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise CacheConfigurationError(
                f"memcached: a namespace must be 1 to 64 letters, digits, '_' and '-', not {namespace!r}"
            )
        self.namespace = namespace
        self.generation_name = f"{namespace}::".encode()
        self._room = WIRE_MAX - len(namespace) - GENERATION_DIGITS - 2
        self._hasher = hasher

    def __repr__(self) -> str:
        return f"<Keys of {self.namespace!r}>"

    def tail(self, key: str, what: str = "a cache key") -> tuple[str, bytes]:
        """Return the name's suffix for a key, and the part of the key that the entry stores for comparison.

        That part is empty if the suffix contains the key itself. Raises `CacheKeyError` if the key is not valid
        Unicode.
        """
        # Printable ASCII excludes control characters and DEL, but includes the space.
        if key.isascii() and key.isprintable() and " " not in key and len(key) <= self._room:
            return f":{key}", b""
        try:
            raw = key.encode()
        except UnicodeEncodeError:
            raise CacheKeyError(f"{what} must be valid Unicode", ascii(key)[:60]) from None
        kept = raw if len(raw) <= KEPT_MAX else blake2b(raw, person=b"cachebus.kept").digest()
        return f"#{self._hasher(raw).hex()}", kept

    def limit(self, name: str) -> str:
        """Return the item name of a rate limit. Raises `CacheKeyError` if `name` is not valid Unicode."""
        tail, kept = self.tail(name)
        if tail[0] == ":":
            return f"{self.namespace}:~{tail}"
        # The item of a limit does not store the name for comparison, so this does not use a custom hasher.
        return f"{self.namespace}:~#{blake(kept).hex()}"

    def refresh(self, key: str) -> str:
        """Return the name's suffix for the lease of a live value. `tail` must have accepted the key."""
        return f"!{self._hasher(key.encode()).hex()}"

    def tag(self, tag: str) -> str:
        """Return the name's suffix for the generation of a tag. Raises `CacheKeyError` if it is not valid Unicode."""
        # If two tags have the same hash, they are invalidated together, which is harmless.
        tail, _ = self.tail(tag, "a tag")
        return f"={tag}" if tail[0] == ":" else f"%{tail[1:]}"

    def head(self, generation: bytes) -> str:
        """Return the prefix of names under this generation."""
        return f"{self.namespace}:{generation.decode()}"


def new_generation(now: float) -> bytes:
    """Return a unique generation: Unix time in microseconds, and 16 random bits in case the clock was set back."""
    return b"%013x%04x" % (int(now * 1e6) & (1 << 52) - 1, secrets.randbits(16))
