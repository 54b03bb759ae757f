"""Signatures (HMAC-SHA256) and seals (AES-256-GCM with a separate key for each tenant).

Both are bound to the header, tenant, namespace and key of a payload.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import itertools
import os
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from cachebus.messages import CacheConfigurationError

from .format import load

SIGNATURE_SIZE = 32
KEY_SIZE_MIN = 32

_NONCE_SIZE, _TAG_SIZE = 12, 16
_LARGE = 16 * 1024
_KEY_ID = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_INFO = b"cachebus payload v1 aes-256-gcm"
_COUNTER = struct.Struct(">I")


class Signer:
    """Signing keys. The first key signs, and all keys verify."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys: tuple[bytes, ...] = ()
        for key in reversed(tuple(keys)):
            self.rotate(key)
        if not self._keys:
            raise CacheConfigurationError("signing requires at least one key")

    def __repr__(self) -> str:
        return f"<Signer with {len(self._keys)} keys>"

    def rotate(self, key: bytes) -> None:
        """Use `key` for new signatures. Older keys still verify.

        Raises `CacheConfigurationError` if the key has fewer than 32 bytes.
        """
        if len(key) < KEY_SIZE_MIN:
            raise CacheConfigurationError(f"expected a signing key of at least {KEY_SIZE_MIN} bytes, not {len(key)}")
        self._keys = (key, *(each for each in self._keys if each != key))

    def sign(self, binding: bytes, header: bytes, content: bytes) -> bytes:
        """Return the signature of content."""
        return _mac(self._keys[0], binding, header, content)

    def verify(self, signature: bytes, binding: bytes, header: bytes, content: bytes | memoryview) -> bool:
        """Return true if one of the keys made the signature. The comparison takes constant time."""
        good = False
        for key in self._keys:
            good |= hmac.compare_digest(_mac(key, binding, header, content), signature)
        return good


def _mac(key: bytes, binding: bytes, header: bytes, content: bytes | memoryview) -> bytes:
    mac = hmac.new(key, header, hashlib.sha256)
    mac.update(binding)
    mac.update(content)
    return mac.digest()


class Nonces:
    """Generator of unique nonces, each 8 random bytes of the process and object and a 4-byte counter. Thread-safe.

    The random bytes are drawn again after a fork and when the counter reaches 2^32.
    """

    def __init__(self) -> None:
        self._state: tuple[int, bytes, itertools.count[int]] = (0, b"", itertools.count())

    def next(self) -> bytes:
        """Return the next nonce of 12 bytes."""
        while True:
            pid, prefix, counter = self._state
            if pid == os.getpid():
                number = next(counter)  # Atomic, so two threads never get the same number.
                if number < 2**32:
                    return prefix + _COUNTER.pack(number)
            # Two threads may reach this line at once. Each draws random bytes, and either result is new.
            self._state = (os.getpid(), os.urandom(8), itertools.count())


class Sealer:
    """Encryption keys of one tenant. The key `key_id` seals, and all keys open.

    `keys` maps ids to master keys of at least 32 bytes. HKDF-SHA256 (RFC 5869) derives the tenant's keys from them, so
    a tenant cannot open payloads of another tenant.
    """

    def __init__(self, keys: Mapping[str, bytes], *, key_id: str | None = None, tenant: str = "") -> None:
        self.tenant = tenant
        self._aead = load("cryptography.hazmat.primitives.ciphers.aead", "encryption")
        self._hkdf = load("cryptography.hazmat.primitives.kdf.hkdf", "encryption")
        self._hashes = load("cryptography.hazmat.primitives.hashes", "encryption")
        self._invalid: type[Exception] = load("cryptography.exceptions", "encryption").InvalidTag
        if not keys:
            raise CacheConfigurationError("encryption requires at least one key")
        first = next(iter(keys)) if key_id is None else key_id
        if first not in keys:
            raise CacheConfigurationError(f"no encryption key has the id {first!r}")
        # The first cipher seals. The dict is replaced as a whole, so that a thread sees either the old or the new keys.
        self._ciphers = {name: self._cipher(name, keys[name]) for name in dict.fromkeys((first, *keys))}
        self._nonces = Nonces()

    def __repr__(self) -> str:
        return f"<Sealer of {self.tenant!r} with {', '.join(self._ciphers)}>"

    @property
    def key_id(self) -> str:
        """Id of the key that seals."""
        return next(iter(self._ciphers))

    def rotate(self, key_id: str, key: bytes) -> None:
        """Use `key` for new seals. Older keys still open. Thread-safe.

        Raises `CacheConfigurationError` if the key is too short or the id is already used.
        """
        if key_id in self._ciphers:
            raise CacheConfigurationError(f"the id {key_id!r} is already used by another key")
        self._ciphers = {key_id: self._cipher(key_id, key), **self._ciphers}

    def seal(self, content: bytes, header: bytes, binding: bytes) -> bytes:
        """Return the sealed payload, including the header."""
        key_id, cipher = next(iter(self._ciphers.items()))
        start = bytes((len(key_id),)) + key_id.encode()
        nonce = self._nonces.next()
        about = header + start + binding
        before = b"".join((header, start, nonce))
        if len(content) < _LARGE or not hasattr(cipher, "encrypt_into"):
            sealed: bytes = cipher.encrypt(nonce, content, about)
            return before + sealed
        # Encrypt in place: allocating and freeing a second large object costs more than the cipher. BytesIO.getvalue()
        # does not copy.
        out = io.BytesIO(bytes(len(before) + len(content) + _TAG_SIZE))
        out.write(before)
        with out.getbuffer() as whole, whole[len(before) :] as place:
            cipher.encrypt_into(nonce, content, about, place)
        return out.getvalue()

    def open(self, sealed: memoryview, header: bytes, binding: bytes) -> bytes | None:
        """Return the sealed content, or `None` if it was modified or sealed with another key or binding."""
        at = 1 + sealed[0] if len(sealed) else 1
        if len(sealed) < at + _NONCE_SIZE + _TAG_SIZE:
            return None
        start = bytes(sealed[:at])
        cipher = self._ciphers.get(start[1:].decode("ascii", "replace"))
        if cipher is None:
            return None
        nonce, content = bytes(sealed[at : at + _NONCE_SIZE]), sealed[at + _NONCE_SIZE :]
        try:
            opened: bytes = cipher.decrypt(nonce, content, header + start + binding)
        except self._invalid:
            return None
        return opened

    def _cipher(self, key_id: str, key: bytes) -> Any:
        if not _KEY_ID.fullmatch(key_id):
            raise CacheConfigurationError("expected a key id of 1 to 32 letters, digits, and _ . -")
        if len(key) < KEY_SIZE_MIN:
            raise CacheConfigurationError(
                f"expected an encryption key of at least {KEY_SIZE_MIN} bytes, not {len(key)}"
            )
        derive = self._hkdf.HKDF(
            algorithm=self._hashes.SHA256(), length=32, salt=None, info=_INFO + b"\x00" + self.tenant.encode()
        )
        return self._aead.AESGCM(derive.derive(key))
