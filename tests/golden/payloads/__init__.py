"""The golden payloads: a file for each serializer, and for each compression and protection on top of msgpack."""

from __future__ import annotations

from pathlib import Path

from cachebus.payload.cached_errors import CachedError
from cachebus.payload.pipeline import PayloadPipeline

from ...payload.pipelines import COMPRESSIONS, PROTECTIONS, pipeline

FOLDER = Path(__file__).parent / "v1"
ERRORS = Path(__file__).parent / "v1-errors"
ERROR = CachedError(b'{"kind":"builtins.LookupError","args":["no row",7,null],"state":{"hint":[1.5,{"a":true}]}}')
"""The record of a cached exception, which the same pipelines carry."""


def golden_names() -> list[str]:
    """What there must be a file for: serializer, compression and protection, joined by hyphens."""
    names = [f"msgpack-{compression}-none" for compression in COMPRESSIONS]
    names += [f"msgpack-none-{protection.replace(' ', '_')}" for protection in PROTECTIONS[1:]]
    return [
        *names,
        "json-none-none",
        "auto-none-none",
        "json-none-signed",
        "pickle-none-signed",
        "json-zstd-signed_and_sealed",
    ]


def golden_pipeline(name: str) -> PayloadPipeline:
    """The pipeline that writes and reads a golden payload."""
    serializer, compression, protection = name.split("-")
    return pipeline(serializer, protection.replace("_", " "), compression=compression, threshold=0)
