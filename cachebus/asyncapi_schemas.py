"""JSON schemas and examples of messages, made from their type hints: what a body looks like in JSON."""

from __future__ import annotations

import enum
import json
import types
import typing
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

from cachebus.bus.codec import JSON, VERSION, encode
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


def fields_schema(cls: type[Message]) -> Schema:
    """The schema of a message inside a message: its fields alone."""
    hints = typing.get_type_hints(cls)
    properties: Schema = {}
    required: list[str] = []
    for each in fields(typing.cast("Any", cls)):
        schema = schema_of(hints[each.name])
        if each.default is not MISSING and isinstance(each.default, str | int | float | bool | None):
            # A $ref may have nothing beside it, so it stays alone.
            if "$ref" not in schema:
                schema = {**schema, "default": each.default}
        elif each.default is MISSING and each.default_factory is MISSING:
            required.append(each.name)
        properties[each.name] = schema
    made: Schema = {"type": "object", "description": description(cls), "properties": properties}
    return made | ({"required": required} if required else {})


def payload_schema(cls: type[Message]) -> Schema:
    """The schema of a message as a body holds it: the version of the wire format and its kind come first."""
    made = fields_schema(cls)
    first = {
        "v": {"type": "integer", "const": VERSION, "description": "The version of the wire format."},
        "kind": {"type": "string", "const": cls.WIRE_NAME},
    }
    made["properties"] = first | made["properties"]
    made["required"] = [*first, *made.get("required", ())]
    return made


def schema_of(hint: Any) -> Schema:
    """The schema of a type hint. Raises `TypeError` for one that messages cannot have."""
    simple: dict[Any, Schema] = {
        Any: {"$ref": "#/components/schemas/Value"},
        str: {"type": "string"},
        int: {"type": "integer"},
        float: {"type": "number"},
        bool: {"type": "boolean"},
        types.NoneType: {"type": "null"},
    }
    if hint in simple:
        return simple[hint]
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return {"type": "string", "enum": [each.value for each in hint]}
    if isinstance(hint, type) and issubclass(hint, Message):
        return {"$ref": f"#/components/schemas/{hint.__name__}"}
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"type": "string", "enum": list(args)}
    if origin in (list, tuple):
        return {"type": "array", "items": schema_of(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(args[1])}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(each) for each in args]}
    raise TypeError(f"there is no schema for {hint}")


def inner_messages(cls: type[Message]) -> set[type[Message]]:
    """The classes of messages inside a message."""
    found: set[type[Message]] = set()
    waiting: list[Any] = list(typing.get_type_hints(cls).values())
    while waiting:
        hint = waiting.pop()
        if isinstance(hint, type) and issubclass(hint, Message):
            found.add(hint)
        waiting.extend(get_args(hint))
    return found


def example(cls: type[Message]) -> dict[str, Any]:
    """A message of a class, with every field filled, as a JSON body holds it."""
    told: dict[str, Any] = json.loads(encode(_instance(cls), JSON))
    return told


def description(cls: type[Message]) -> str:
    """What the docstring of a class says, as one line."""
    return " ".join((cls.__doc__ or "").replace("`", "").split())


def _instance(cls: type[Message]) -> Message:
    hints = typing.get_type_hints(cls)
    return cls(**{each.name: _sample(hints[each.name], each.name) for each in fields(typing.cast("Any", cls))})


def _sample(hint: Any, name: str) -> Any:
    if hint is Any:
        return _VALUES.get(name, {"name": "Ada"})
    if hint is str:
        return _TEXTS.get(name, name)
    if hint is bool:
        return True
    if hint is int:
        return _NUMBERS.get(name, 1)
    if hint is float:
        return _NUMBERS.get(name, 1.5)
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return next(iter(hint))
    if isinstance(hint, type) and issubclass(hint, Message):
        return _instance(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return args[0]
    if origin in (list, tuple):
        samples = [_sample(args[0], name)]
        return samples if origin is list else tuple(samples)
    if origin is dict:
        return {_TEXTS.get(name, name): _sample(args[1], name)}
    return _sample(args[0], name)
