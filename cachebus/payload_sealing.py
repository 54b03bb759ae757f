"""Sealing: AES-256-GCM with a key for each tenant, bound to header, tenant, namespace and key."""

from __future__ import annotations

import io
import itertools
import os
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from cachebus.messages import CacheConfigurationError

from .payload_extras import load

NONCE_SIZE, TAG_SIZE = 12, 16
KEY_SIZE_MIN = 32

_LARGE = 16 * 1024
_KEY_ID = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_INFO = b"cachebus payload v1 aes-256-gcm"
_COUNTER = struct.Struct(">I")


class Nonces:
    """Nonces that do not come twice: 8 random bytes of this process and of this object, and a count of 4 bytes.

    A child of a fork draws random bytes of its own, and so does whoever has counted to 2^32. Usable from any thread.
    """

    def __init__(self) -> None:
        self._state: tuple[int, bytes, itertools.count[int]] = (0, b"", itertools.count())

    def next(self) -> bytes:
        """One more nonce, of 12 bytes."""
        while True:
            state = self._state
            pid, prefix, counter = state
            if pid == os.getpid():
                number = next(counter)  # Atomic: no two threads get the same.
                if number < 2**32:
                    return prefix + _COUNTER.pack(number)
            # Two threads may both come here. Each then has random bytes of its own, of which one stays; both are new.
            self._state = (os.getpid(), os.urandom(8), itertools.count())


class _Keys(NamedTuple):
    writing: str
    by_id: Mapping[str, Any]


class Sealer:
    """A keyring for one tenant: `key_id` names the key that seals, all of them open.

    `keys` are master keys of at least 32 bytes by id. What a tenant's payloads are sealed with is derived from them with
    HKDF-SHA256 (RFC 5869), so that no tenant can open what another one sealed.
    """

    def __init__(self, keys: Mapping[str, bytes], *, key_id: str | None = None, tenant: str = "") -> None:
        self.tenant = tenant
        self._aead = load("cryptography.hazmat.primitives.ciphers.aead", "encryption")
        self._hkdf = load("cryptography.hazmat.primitives.kdf.hkdf", "encryption")
        self._hashes = load("cryptography.hazmat.primitives.hashes", "encryption")
        self._invalid: type[Exception] = load("cryptography.exceptions", "encryption").InvalidTag
        if not keys:
            raise CacheConfigurationError("encryption needs at least one key")
        writing = next(iter(keys)) if key_id is None else key_id
        if writing not in keys:
            raise CacheConfigurationError(f"there is no encryption key of the id {writing!r}")
        self._keys = _Keys(writing, {name: self._cipher(name, key) for name, key in keys.items()})
        self._nonces = Nonces()

    def __repr__(self) -> str:
        return f"<Sealer of {self.tenant!r} with {', '.join(self._keys.by_id)}>"

    @property
    def key_id(self) -> str:
        """The id of the key that seals."""
        return self._keys.writing

    def rotate(self, key_id: str, key: bytes) -> None:
        """Seal with `key` from now on; what the others sealed can still be opened. Usable from any thread.

        Raises `CacheConfigurationError` for a short key, and for an id that another key has.
        """
        if key_id in self._keys.by_id:
            raise CacheConfigurationError(f"the id {key_id!r} belongs to another key")
        self._keys = _Keys(key_id, {key_id: self._cipher(key_id, key), **self._keys.by_id})

    def seal(self, content: bytes, header: bytes, binding: bytes) -> bytes:
        """The whole of a sealed payload, header included."""
        keys = self._keys
        name = keys.writing.encode()
        start = bytes((len(name),)) + name
        nonce = self._nonces.next()
        cipher, about = keys.by_id[keys.writing], header + start + binding
        before = b"".join((header, start, nonce))
        if len(content) < _LARGE or not hasattr(cipher, "encrypt_into"):
            sealed: bytes = cipher.encrypt(nonce, content, about)
            return before + sealed
        # Into its place at once. Memory for a second large object, given back each time, costs more than the cipher: a
        # BytesIO hands out the very bytes that it was given.
        size = len(before) + len(content) + TAG_SIZE
        out = io.BytesIO(bytes(size))
        out.write(before)
        with out.getbuffer() as whole, whole[len(before) :] as place:
            cipher.encrypt_into(nonce, content, about, place)
        return out.getvalue()

    def open(self, sealed: memoryview, header: bytes, binding: bytes) -> bytes | None:
        """What was sealed; `None` if it was not sealed by one of these keys, for this key of the cache, or was changed."""
        at = 1 + sealed[0] if len(sealed) else 1
        if len(sealed) < at + NONCE_SIZE + TAG_SIZE:
            return None
        start = bytes(sealed[:at])
        cipher = self._keys.by_id.get(key_id_of(sealed) or "")
        if cipher is None:
            return None
        try:
            content: bytes = cipher.decrypt(
                bytes(sealed[at : at + NONCE_SIZE]), sealed[at + NONCE_SIZE :], header + start + binding
            )
        except self._invalid:
            return None
        return content

    def _cipher(self, key_id: str, key: bytes) -> Any:
        if not _KEY_ID.fullmatch(key_id):
            raise CacheConfigurationError("the id of a key is 1 to 32 letters, digits, and _ . -")
        if len(key) < KEY_SIZE_MIN:
            raise CacheConfigurationError(f"an encryption key has at least {KEY_SIZE_MIN} bytes, not {len(key)}")
        derive = self._hkdf.HKDF(
            algorithm=self._hashes.SHA256(), length=32, salt=None, info=_INFO + b"\x00" + self.tenant.encode()
        )
        return self._aead.AESGCM(derive.derive(key))


def key_id_of(sealed: memoryview) -> str | None:
    """The id of the key that a sealed payload names, if it can be one."""
    if not len(sealed):
        return None
    name = bytes(sealed[1 : 1 + sealed[0]]).decode("ascii", "replace")
    return name if _KEY_ID.fullmatch(name) else None
