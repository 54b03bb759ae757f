"""The options of events: how keys leave, and which share of a kind of events goes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, cast

from pydantic import BeforeValidator, SecretStr, field_serializer, model_validator

from cachebus.bus import EventPolicy, KeyForm, shares
from cachebus.messages import CacheConfigurationError

from .options import Options, refuse_wrong
from .payload_settings import key_bytes, read_key

_EXPECTED_SAMPLE = "expected shares from 0 to 1 by kinds of events, such as cache_hit: 0.01"
_read_hash_key = read_key(32, 64)  # BLAKE2b takes no longer key.


def _sample(value: object) -> tuple[tuple[str, float], ...]:
    # The environment has a mapping as JSON. Kept as pairs, because settings can be hashed.
    try:
        given: Any = json.loads(value) if isinstance(value, str) else value
        sample = dict(cast("Any", given)) if isinstance(given, Mapping | tuple) else None
    except (TypeError, ValueError):
        sample = None
    if sample is None or not all(
        isinstance(glob, str) and isinstance(share, int | float) and not isinstance(share, bool)
        for glob, share in sample.items()
    ):
        raise ValueError(_EXPECTED_SAMPLE)
    sample = {str(glob): float(share) for glob, share in sample.items()}
    try:
        shares(sample)
    except ValueError as error:
        problem = str(error)
    else:
        return tuple(sample.items())
    raise CacheConfigurationError(problem)


HashKey: TypeAlias = Annotated[
    SecretStr | None, "secret", BeforeValidator(lambda value: None if value is None else _read_hash_key(value))
]
Sample: TypeAlias = Annotated[tuple[tuple[str, float], ...], "shares by kind", BeforeValidator(_sample)]


class EventSettings(Options):
    """What events say, and how many of them go out."""

    keys: KeyForm = "plain"
    """Keys in events: `plain`; `hash`, 32 hexadecimal digits of BLAKE2b; or `none`, the empty string. Tags stay plain."""
    hash_key: HashKey = None
    """The secret of hashed keys, 32 to 64 bytes, the same for all processes. Without it, keys can be guessed from their hashes."""
    sample: Sample = ()
    """The share of a kind of events that goes out, by globs: `{cache_hit: 0.01}`. Of several that fit, the first counts; the
    counters of `statistics()` stay exact. What changes values (`cache_set`, `cache_deleted`, ...) is not sampled."""

    @model_validator(mode="after")
    def _secret_is_used(self) -> EventSettings:
        unused = self.hash_key is not None and self.keys != "hash"
        refuse_wrong((unused, f"hash_key: only keys: hash has a use for it, not keys: {self.keys}"))
        return self

    @field_serializer("sample")
    def _by_glob(self, sample: Sample) -> dict[str, float]:
        return dict(sample)

    @property
    def policy(self) -> EventPolicy:
        """The same options, for the bus."""
        return EventPolicy(self.keys, b"" if self.hash_key is None else key_bytes(self.hash_key), dict(self.sample))
