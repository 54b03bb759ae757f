"""JSON schemas and examples of messages, made from their type hints."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, get_args, get_origin

import msgspec

from cachebus.bus.codec import JSON, encode
from cachebus.messages import Message

Schema = dict[str, Any]

VALUE = {
    "description": "What is cached: null, a boolean, a number, a string, an array or an object. Bytes are an object whose "
    'only key is "$base64". An integer has 64 bits at most.',
    "examples": [{"name": "Ada"}, {"$base64": "AAEC"}, 1],
}
"""The schema of a value: anything that JSON can say."""

_TEXTS = {
    **dict.fromkeys(("key", "keys", "entries", "items"), "user:1"),
    **dict.fromkeys(("origin", "source"), "4711-9f86d081"),
    **dict.fromkeys(("code", "error", "fields"), "timeout"),
    **dict.fromkeys(("request", "wire_name"), "backend.get"),
    "pattern": "user:*",
    "cursor": "0",
    "tags": "users",
    "address": "backend.primary",
    "backend": "primary",
    "namespace": "default",
    "id": "4711-9f86d081-18c2a7-42",
    "store": "redis",
    "detail": "backend.primary: no answer within 5 s",
    "trace": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "event": "event.cache_set",
    "reason": "CacheConnectionError",
    "removals": "expired",
    "guard": "state",
    "limits": "max_key_bytes",
    "capabilities": "tags",
}
_NUMBERS = {**dict.fromkeys(("time", "stored_at", "version"), 1767225600.25), "ttl": 60.0, "seq": 42}
_VALUES: dict[str, Any] = {"fields": 5.0, "guard": "closed"}


def schemas(classes: Iterable[type[Message]]) -> dict[str, Schema]:
    """Return the JSON schema of each class, and of each class inside of these, by its name."""
    _, made = msgspec.json.schema_components(classes, ref_template="#/components/schemas/{name}")
    for each in made.values():
        if "properties" not in each:  # An enum.
            continue
        each["description"] = _line(each.get("description"))
        each["properties"] = {
            name: {"$ref": "#/components/schemas/Value"} if schema == {} else _without_discriminators(schema)
            for name, schema in each["properties"].items()
        }
    return made


def _without_discriminators(schema: Any) -> Any:
    """Leave out what OpenAPI has and AsyncAPI has not."""
    match schema:
        case dict():
            parts = cast("Schema", schema)
            return {name: _without_discriminators(each) for name, each in parts.items() if name != "discriminator"}
        case list():
            several: Any = schema  # pyright: ignore[reportUnknownVariableType]
            return [_without_discriminators(each) for each in several]
        case _:
            return schema


def example(cls: type[Message]) -> dict[str, Any]:
    """Return a message of a class, with every field filled, as a JSON body holds it."""
    made: dict[str, Any] = json.loads(encode(_instance(cls), JSON))
    return made


def description(cls: type[Message]) -> str:
    """Return the docstring of a class as one line."""
    return _line(cls.__doc__)


def summary(cls: type[Message]) -> str:
    """Return the first sentence of the docstring of a class."""
    return description(cls).partition(". ")[0].rstrip(".") + "."


def _line(text: str | None) -> str:
    return " ".join((text or "").replace("`", "").split())


def _instance(cls: type[Any]) -> Any:
    return cls(**{each.name: _sample(each.type, each.name) for each in msgspec.structs.fields(cls)})


def _sample(hint: Any, name: str) -> Any:
    simple: dict[Any, Any] = {
        Any: _VALUES.get(name, {"name": "Ada"}),
        str: _TEXTS.get(name, name),
        bool: True,
        int: _NUMBERS.get(name, 1),
        float: _NUMBERS.get(name, 1.5),
    }
    if hint in simple:
        return simple[hint]
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return next(iter(hint))
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return _instance(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return args[0]
    if origin is tuple:
        return (_sample(args[0], name),)
    if origin is Mapping:
        return {_TEXTS.get(name, name): _sample(args[1], name)}
    return _sample(args[0], name)
