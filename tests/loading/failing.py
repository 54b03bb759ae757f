"""Loaders that raise, and the outcomes of their callers."""

from __future__ import annotations

from typing import Any

from cachebus import Cache


class NotFound(LookupError):
    def __init__(self, number: int) -> None:
        super().__init__(f"no row {number}")
        self.number = number


class Gone(NotFound):
    """Subclass of the error."""


class Failing:
    """Loader that raises `error` until `works` is set, and then returns its number of calls."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = NotFound(7) if error is None else error
        self.works = False
        self.calls = 0

    async def __call__(self) -> int:
        self.calls += 1
        if self.works:
            return self.calls
        raise self.error


KEPT: dict[str, Any] = {"cache_errors": (NotFound,), "error_ttl": 60}


async def raised(cache: Cache, loader: Any, key: str = "k", **options: Any) -> Exception:
    try:
        value = await cache.get_or_load(key, loader, **options)
    except Exception as error:
        return error
    raise AssertionError(f"{value!r} was returned")
