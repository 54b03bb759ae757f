"""Signatures: HMAC-SHA256 over header, tenant, namespace, key and content."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from cachebus.messages import CacheConfigurationError

SIGNATURE_SIZE = 32
KEY_SIZE_MIN = 32


class Signer:
    """A list of keys: the first one signs, all of them verify."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys: tuple[bytes, ...] = ()
        for key in reversed(tuple(keys)):
            self.rotate(key)
        if not self._keys:
            raise CacheConfigurationError("signing needs at least one key")

    def __repr__(self) -> str:
        return f"<Signer with {len(self._keys)} keys>"

    def rotate(self, key: bytes) -> None:
        """Sign with `key` from now on; what the older keys signed is still taken. Raises `CacheConfigurationError` for a key
        of less than 32 bytes."""
        if len(key) < KEY_SIZE_MIN:
            raise CacheConfigurationError(f"a signing key has at least {KEY_SIZE_MIN} bytes, not {len(key)}")
        self._keys = (key, *(each for each in self._keys if each != key))

    def sign(self, binding: bytes, header: bytes, content: bytes) -> bytes:
        """The signature of content."""
        return _mac(self._keys[0], binding, header, content)

    def verify(self, signature: bytes, binding: bytes, header: bytes, content: bytes | memoryview) -> bool:
        """Whether one of the keys made the signature. Takes the same time for every wrong one."""
        good = False
        for key in self._keys:
            good |= hmac.compare_digest(_mac(key, binding, header, content), signature)
        return good


def _mac(key: bytes, binding: bytes, header: bytes, content: bytes | memoryview) -> bytes:
    mac = hmac.new(key, header, hashlib.sha256)
    mac.update(binding)
    mac.update(content)
    return mac.digest()
