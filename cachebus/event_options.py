"""The types of the options of events: a secret for hashed keys, and shares by kind."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, cast

from pydantic import BeforeValidator, SecretStr

from cachebus.bus import shares
from cachebus.messages import CacheConfigurationError

from .payload_settings import key_bytes

_SHORTEST, _LONGEST = 32, 64  # Bytes; BLAKE2b takes no longer key.
_EXPECTED_SAMPLE = "expected shares from 0 to 1 by kinds of events, such as cache_hit: 0.01"


def _hash_key(value: object) -> SecretStr | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        value = f"base64:{base64.b64encode(value).decode()}"
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    size = 0
    if isinstance(text, str):
        try:
            size = len(key_bytes(SecretStr(text)))
        except binascii.Error:
            size = 0
    if not _SHORTEST <= size <= _LONGEST:
        raise CacheConfigurationError(
            f"expected a key of {_SHORTEST} to {_LONGEST} bytes, as text or as base64: and base64"
        )
    return SecretStr(str(text))


def _sample(value: object) -> tuple[tuple[str, float], ...]:
    # The environment has a mapping as JSON. Kept as pairs, because settings can be hashed.
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if isinstance(value, tuple):
        try:
            value = dict(cast("Any", value))
        except TypeError:
            value = None
    if not isinstance(value, Mapping):
        raise ValueError(_EXPECTED_SAMPLE)
    given: dict[Any, Any] = dict(value)  # pyright: ignore[reportUnknownArgumentType]
    for glob, share in given.items():
        if not isinstance(glob, str) or isinstance(share, bool) or not isinstance(share, int | float):
            raise ValueError(_EXPECTED_SAMPLE)
    sample = {str(glob): float(share) for glob, share in given.items()}
    try:
        shares(sample)
    except ValueError as error:
        problem = str(error)
    else:
        return tuple(sample.items())
    raise CacheConfigurationError(problem)


HashKey: TypeAlias = Annotated[SecretStr | None, BeforeValidator(_hash_key)]
Sample: TypeAlias = Annotated[tuple[tuple[str, float], ...], BeforeValidator(_sample)]
