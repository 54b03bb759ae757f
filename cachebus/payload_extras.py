"""Libraries that only some payloads need: loaded at first use, with an error that says how to install them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cachebus.messages import CacheConfigurationError

EXTRAS = {
    "orjson": "json",
    "pyarrow": "arrow",
    "pandas": "arrow",
    "numpy": "arrow",
    "lz4": "lz4",
    "zstandard": "zstd",
    "xxhash": "checksum",
    "cryptography": "crypto",
}
"""Which extra of cachebus brings a package."""


def load(module: str, what: str) -> Any:
    """A module of an extra. Raises `CacheConfigurationError` that names `what` asked for it, and the extra."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise CacheConfigurationError(f"{what} needs {package}: pip install 'cachebus[{EXTRAS[package]}]'") from None
