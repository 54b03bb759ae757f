"""JSON schemas and examples of messages, made from their type hints: what a body looks like in JSON."""

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
"""The schema of a value: it may be anything that JSON can say."""

_TEXTS = {
    "key": "user:1",
    "keys": "user:1",
    "pattern": "user:*",
    "cursor": "0",
    "tags": "users",
    "address": "backend.primary",
    "backend": "primary",
    "namespace": "default",
    "origin": "4711-9f86d081",
    "source": "4711-9f86d081",
    "id": "4711-9f86d081-18c2a7-42",
    "store": "redis",
    "code": "timeout",
    "detail": "backend.primary: no answer within 5 s",
    "trace": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "event": "event.cache_set",
    "request": "backend.get",
    "wire_name": "backend.get",
    "error": "timeout",
    "reason": "CacheConnectionError",
    "entries": "user:1",
    "items": "user:1",
    "removals": "expired",
    "fields": "timeout",
    "guard": "state",
    "limits": "max_key_bytes",
    "capabilities": "tags",
}
_NUMBERS = {"time": 1767225600.25, "stored_at": 1767225600.25, "version": 1767225600.25, "ttl": 60.0, "seq": 42}
_VALUES: dict[str, Any] = {"fields": 5.0, "guard": "closed"}


def schemas(classes: Iterable[type[Message]]) -> dict[str, Schema]:
    """Make the schema of each class, and of each class inside of these, by its name: what a body looks like in JSON."""
    _, made = msgspec.json.schema_components(classes, ref_template="#/components/schemas/{name}")
    for each in made.values():
        if "properties" not in each:  # An enum.
            continue
        each["description"] = " ".join(each.get("description", "").replace("`", "").split())
        each["properties"] = {
            name: {"$ref": "#/components/schemas/Value"} if schema == {} else _without_discriminators(schema)
            for name, schema in each["properties"].items()
        }
    return made


def _without_discriminators(schema: Any) -> Any:
    """Leave out what OpenAPI has and AsyncAPI has not."""
    if isinstance(schema, dict):
        parts = cast("Schema", schema)
        return {name: _without_discriminators(each) for name, each in parts.items() if name != "discriminator"}
    if isinstance(schema, list):
        several: Any = schema  # pyright: ignore[reportUnknownVariableType]
        return [_without_discriminators(each) for each in several]
    return schema


def example(cls: type[Message]) -> dict[str, Any]:
    """A message of a class, with every field filled, as a JSON body holds it."""
    told: dict[str, Any] = json.loads(encode(_instance(cls), JSON))
    return told


def description(cls: type[Message]) -> str:
    """What the docstring of a class says, as one line."""
    return " ".join((cls.__doc__ or "").replace("`", "").split())


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
