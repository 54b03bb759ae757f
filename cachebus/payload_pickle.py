"""The serializer `pickle`: whatever Python can pickle, for payloads that are signed, and for no others.

Unpickling runs what the bytes say. `PayloadPipeline` refuses to exist with this serializer and without signing keys, and
verifies the signature of a payload before it asks this module to read it.
"""

from __future__ import annotations

import pickle
from typing import Any

from cachebus.messages import CacheSerializationError

from .payload_scalars import type_name, type_of


class PickleSerializer:
    """Values to pickle, protocol 5, and back."""

    name = "pickle"

    def dumps(self, value: Any) -> bytes:
        """The bytes of a value. Raises `CacheSerializationError` that names the type, whatever its own code raised."""
        try:
            return pickle.dumps(value, protocol=5)
        except Exception as error:
            raise CacheSerializationError(
                f"the serializer 'pickle' cannot write a {type_name(type_of(value))}: {type(error).__name__}"
            ) from None

    def loads(self, data: bytes | memoryview, *, trusted: bool = False) -> Any:
        """The value of bytes whose signature was verified. Raises whatever unpickling raises."""
        if not trusted:
            raise ValueError("a pickle is read only if its signature was verified")
        return pickle.loads(data)  # noqa: S301  # signed by one of our keys, for this key of this namespace
