"""Values checked against a type that the caller asks for."""

from __future__ import annotations

import functools
from typing import Any

from cachebus.messages import CacheSerializationError


def fit(value: Any, kind: Any) -> Any:
    """Return the value as a `kind`: a builtin, generic, dataclass, TypedDict or pydantic model.

    Raises `CacheSerializationError` with the reason `type` if it does not fit. The sentence names places and shows no values.
    """
    from pydantic import ValidationError  # Takes longer to import than all of cachebus.

    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        places = [".".join(map(str, each["loc"])) or "the value" for each in error.errors(include_input=False)]
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    raise CacheSerializationError(
        f"the cached value is no {getattr(kind, '__qualname__', kind)}: {', '.join(places[:3])}{more} does not fit",
        "type",
    )


@functools.lru_cache(maxsize=256)
def _hashable_adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _adapter(kind: Any) -> Any:
    try:
        return _hashable_adapter(kind)
    except TypeError:  # Annotated[int, [...]] and the like cannot be hashed.
        from pydantic import TypeAdapter

        return TypeAdapter(kind)
