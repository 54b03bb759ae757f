"""The AsyncAPI 3 document of a worker, generated from the message classes of its requests and events."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast, get_args, get_origin

import msgspec

from cachebus.messages import WIRE_NAMES, Event, Failed, Message, Request, reply_types

from ..address import NO_BACKEND, ROOT, event_word
from ..codec.messages import JSON, encode

Schema = dict[str, Any]
_is_a: Callable[[Any, Any], bool] = issubclass  # Keeps type checkers from narrowing to a less precise type.

_ADDRESSES = {"backend": "backend.{backend}"}
"""Address patterns by the first word of a request's wire name. Other requests use `{address}`."""

_PARAMETERS = {
    "namespace": {
        "description": "The namespace of the application: one word of letters, digits, _ and -.",
        "default": "default",
    },
    "backend": {"description": f"The name of the backend, one word; {NO_BACKEND} for an event without a backend."},
    "address": {"description": "The address of the actor: words joined by dots, such as backend.primary."},
}

_VALUE = {
    "description": "The cached value: null, a boolean, a number, a string, an array or an object. Bytes are "
    'represented by an object whose only key is "$base64". Integers have at most 64 bits.',
    "examples": [{"name": "Ada"}, {"$base64": "AAEC"}, 1],
}
"""The schema of a value: any JSON."""

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


def document(version: str) -> Schema:
    """Return the document, in types that JSON and YAML can represent. `version` is the package version."""
    # Sorted, and limited to this package, because an application may define its own messages.
    kinds: list[Any] = [cls for _, cls in sorted(WIRE_NAMES.items()) if cls.__module__.startswith("cachebus.")]
    requests = [cls for cls in kinds if _is_a(cls, Request)]
    events = [cls for cls in kinds if _is_a(cls, Event)]
    replies = [cls for cls in kinds if cls not in requests and cls not in events]
    made = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "cachebus worker",
            "version": version,
            "description": "A worker answers cache requests and publishes cache events over NATS. A body is one "
            "message as JSON, or an array of requests, which is answered by an array. MessagePack is the alternative "
            "content type.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": JSON,
        "servers": {"nats": {"host": "localhost:4222", "protocol": "nats"}},
        "channels": {
            **_request_channels(requests),
            "replies": _channel(None, "Replies", "Replies are sent to the reply subject of the request.", replies),
            **{
                _event_channel(cls): _channel(
                    f"{ROOT}v1.{{namespace}}.evt.{event_word(cls)}.{{backend}}", cls.__name__, _line(cls.__doc__), [cls]
                )
                for cls in events
            },
        },
        "operations": {
            **{f"{_prefix(cls)}{cls.__name__}": _request_operation(cls) for cls in requests},
            **{f"tell{cls.__name__}": _operation("send", _event_channel(cls), cls) for cls in events},
        },
        "components": {
            "messages": {cls.__name__: _message(cls) for cls in kinds},
            "schemas": {
                "Value": _VALUE,
                **_schemas(kinds),
                **{f"{kind}Headers": _headers(own) for kind, own in _HEADERS.items()},
            },
        },
    }
    # Converts enum members to text and copies shared parts, for which YAML would write references.
    return cast("Schema", json.loads(json.dumps(made)))


def _header(text: str, **more: Any) -> Schema:
    return {"type": "string", "description": text, **more}


_HEADERS: Mapping[str, Schema] = {
    "Request": {
        "Cachebus-Budget": _header("Seconds that are left for the reply.", examples=["2.5"]),
        "Cachebus-Sent": _header(
            "The name of the sender, and the send time on its monotonic clock. Requests that were delayed beyond their "
            "budget are not handled.",
            examples=["a1b2c3 1234.567"],
        ),
        "Cachebus-Partial": _header("Any value. Allows several messages as the reply to an array.", examples=["1"]),
        "Cachebus-Request-Id": _header("An id that is returned with the reply.", examples=["a1"]),
    },
    "Reply": {
        "Cachebus-Request-Id": _header("The id of the request.", examples=["a1"]),
        "Cachebus-Index": _header("The indexes, from 0, of the requests that this message answers.", examples=["0,2"]),
        "Nats-Service-Error": _header("The error message, if the reply is Failed."),
        "Nats-Service-Error-Code": _header("The error code, if the reply is Failed.", examples=["timeout"]),
    },
    "Event": {
        "Nats-Msg-Id": _header("The id of the event, by which a stream drops duplicates. Set if a stream is used.")
    },
}


def _headers(own: Schema) -> Schema:
    types, text = [JSON, "application/msgpack"], "The content type of the body. The default is MessagePack."
    return {"type": "object", "properties": {"Content-Type": _header(text, enum=types, examples=[JSON]), **own}}


def _message(cls: Any) -> Schema:
    kind = "Request" if _is_a(cls, Request) else "Event" if _is_a(cls, Event) else "Reply"
    example = json.loads(encode(_instance(cls), JSON))
    return {
        "name": cls.WIRE_NAME,
        "title": cls.__name__,
        "summary": _summary(cls),
        "description": _line(cls.__doc__),
        "contentType": JSON,
        "headers": {"$ref": f"#/components/schemas/{kind}Headers"},
        "payload": {"$ref": f"#/components/schemas/{cls.__name__}"},
        "examples": [{"name": "every field", "headers": {"Content-Type": JSON}, "payload": example}],
    }


def _channel(address: str | None, title: str, text: str, classes: list[type[Message]]) -> Schema:
    messages = {cls.__name__: {"$ref": f"#/components/messages/{cls.__name__}"} for cls in classes}
    made: Schema = {"address": address, "title": title, "description": text, "messages": messages}
    parameters = {name: description for name, description in _PARAMETERS.items() if f"{{{name}}}" in (address or "")}
    return made | ({"parameters": parameters} if parameters else {})


def _prefix(cls: type[Message]) -> str:
    return cls.WIRE_NAME.partition(".")[0]


def _request_channels(requests: list[type[Message]]) -> Schema:
    channels: Schema = {}
    for prefix in sorted({_prefix(cls) for cls in requests}):
        address = f"{ROOT}v1.{{namespace}}.req.{_ADDRESSES.get(prefix, '{address}')}"
        matching = [cls for cls in requests if _prefix(cls) == prefix]
        target = "a backend" if prefix == "backend" else "any actor" if prefix == "actor" else f"an actor for {prefix}"
        channels[f"{prefix}Requests"] = _channel(address, f"Requests to {target}", "NATS request and reply.", matching)
    return channels


def _event_channel(cls: type[Message]) -> str:
    return f"{cls.__name__[:1].lower()}{cls.__name__[1:]}Events"


def _operation(action: str, channel: str, cls: type[Message]) -> Schema:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": _summary(cls),
        "messages": [{"$ref": f"#/channels/{channel}/messages/{cls.__name__}"}],
    }


def _request_operation(cls: Any) -> Schema:
    replies: list[Any] = [*reply_types(cls), Failed]
    return {
        **_operation("receive", f"{_prefix(cls)}Requests", cls),
        # Workers that share an address use a queue group. A worker that is alone at its address uses none.
        "bindings": {"nats": {"queue": "q", "bindingVersion": "0.1.0"}},
        "reply": {
            "channel": {"$ref": "#/channels/replies"},
            "messages": [{"$ref": f"#/channels/replies/messages/{each.__name__}"} for each in replies],
        },
    }


def _schemas(classes: Iterable[type[Message]]) -> dict[str, Schema]:
    """Return the JSON schemas of the classes, and of the classes that they refer to, by name."""
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
    """Return the schema without discriminators, which OpenAPI has but AsyncAPI does not."""
    if isinstance(schema, dict):
        parts = cast("Schema", schema)
        return {name: _without_discriminators(each) for name, each in parts.items() if name != "discriminator"}
    return list(map(_without_discriminators, cast("Iterable[Any]", schema))) if isinstance(schema, list) else schema


def _summary(cls: type[Message]) -> str:
    return _line(cls.__doc__).partition(". ")[0].rstrip(".") + "."


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
