"""The AsyncAPI 3 document of a worker: its requests and its events, made from the message classes."""

from __future__ import annotations

import json
from typing import Any

from cachebus.bus.address import NOBODY, ROOT, event_word
from cachebus.bus.codec import JSON
from cachebus.messages import WIRE_NAMES, Event, Failed, Message, Request, reply_types

from .asyncapi_schemas import VALUE, Schema, description, example, schemas, summary

_ADDRESSES = {"backend": "backend.{backend}"}
"""The address of an actor, by the first word of the wire name of its requests. Others have an address of their own."""

_PARAMETERS = {
    "namespace": {"description": "Of the application: one word of letters, digits, _ and -.", "default": "default"},
    "backend": {"description": f"The backend's name, one word; {NOBODY} in an event that belongs to none."},
    "address": {"description": "The actor's address: words joined by dots, such as backend.primary."},
}


def document(version: str) -> Schema:
    """Return the document, as JSON and YAML can say it. `version` is that of the package."""
    # Sorted, and only ours: an application may have messages of its own.
    kinds: list[Any] = [cls for _, cls in sorted(WIRE_NAMES.items()) if cls.__module__.startswith("cachebus.")]
    requests = [cls for cls in kinds if issubclass(cls, Request)]
    events = [cls for cls in kinds if issubclass(cls, Event)]
    replies = [cls for cls in kinds if cls not in requests and cls not in events]
    made = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "A worker of cachebus",
            "version": version,
            "description": "A worker answers requests to its cache and tells what happens in it, over NATS. A body is one "
            "message as JSON, or an array of requests, whose answer is an array too; MessagePack is the other content type.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": JSON,
        "servers": {"nats": {"host": "localhost:4222", "protocol": "nats"}},
        "channels": {
            **_request_channels(requests),
            "replies": _channel(None, "Answers", "They go to the reply subject of the request.", replies),
            **{
                _event_channel(cls): _channel(
                    f"{ROOT}v1.{{namespace}}.evt.{event_word(cls)}.{{backend}}", cls.__name__, description(cls), [cls]
                )
                for cls in events
            },
        },
        "operations": {
            **{f"{_room(cls)}{cls.__name__}": _request_operation(cls) for cls in requests},
            **{f"tell{cls.__name__}": _operation("send", _event_channel(cls), cls) for cls in events},
        },
        "components": {
            "messages": {cls.__name__: _message(cls) for cls in kinds},
            "schemas": {
                "Value": VALUE,
                **schemas(kinds),
                "RequestHeaders": _REQUEST_HEADERS,
                "ReplyHeaders": _REPLY_HEADERS,
                "EventHeaders": _EVENT_HEADERS,
            },
        },
    }
    # Members of an enum become text, and shared parts become copies: YAML would write a reference.
    whole: Schema = json.loads(json.dumps(made))
    return whole


def _header(text: str, **more: Any) -> Schema:
    return {"type": "string", "description": text, **more}


_CONTENT_TYPE = _header(
    "The content type of the body; MessagePack if it is left out.", enum=[JSON, "application/msgpack"], examples=[JSON]
)
_REQUEST_HEADERS: Schema = {
    "type": "object",
    "properties": {
        "Content-Type": _CONTENT_TYPE,
        "Cachebus-Budget": _header("Seconds that are left for the answer.", examples=["2.5"]),
        "Cachebus-Sent": _header(
            "A name of the sender, and the seconds of its monotonic clock: what was held up is not worked on.",
            examples=["a1b2c3 1234.567"],
        ),
        "Cachebus-Partial": _header("Any value: an array may be answered in several messages.", examples=["1"]),
        "Cachebus-Request-Id": _header("Comes back with the answer.", examples=["a1"]),
    },
}
_REPLY_HEADERS: Schema = {
    "type": "object",
    "properties": {
        "Content-Type": _CONTENT_TYPE,
        "Cachebus-Request-Id": _header("That of the request.", examples=["a1"]),
        "Cachebus-Index": _header("Which requests of the array this answers, from 0.", examples=["0,2"]),
        "Nats-Service-Error": _header("What went wrong, if the reply is Failed."),
        "Nats-Service-Error-Code": _header("The code of the error.", examples=["timeout"]),
    },
}
_EVENT_HEADERS: Schema = {
    "type": "object",
    "properties": {
        "Content-Type": _CONTENT_TYPE,
        "Nats-Msg-Id": _header("The id of the event, where a stream keeps events: each is kept once."),
    },
}


def _message(cls: Any) -> Schema:
    kind = "Request" if issubclass(cls, Request) else "Event" if issubclass(cls, Event) else "Reply"
    return {
        "name": cls.WIRE_NAME,
        "title": cls.__name__,
        "summary": summary(cls),
        "description": description(cls),
        "contentType": JSON,
        "headers": {"$ref": f"#/components/schemas/{kind}Headers"},
        "payload": {"$ref": f"#/components/schemas/{cls.__name__}"},
        "examples": [{"name": "every field", "headers": {"Content-Type": JSON}, "payload": example(cls)}],
    }


def _channel(address: str | None, title: str, text: str, classes: list[type[Message]]) -> Schema:
    messages = {cls.__name__: {"$ref": f"#/components/messages/{cls.__name__}"} for cls in classes}
    made: Schema = {"address": address, "title": title, "description": text, "messages": messages}
    parameters = {name: said for name, said in _PARAMETERS.items() if f"{{{name}}}" in (address or "")}
    return made | ({"parameters": parameters} if parameters else {})


def _room(cls: type[Message]) -> str:
    return cls.WIRE_NAME.partition(".")[0]


def _request_channels(requests: list[type[Message]]) -> Schema:
    channels: Schema = {}
    for room in sorted({_room(cls) for cls in requests}):
        address = f"{ROOT}v1.{{namespace}}.req.{_ADDRESSES.get(room, '{address}')}"
        asked = [cls for cls in requests if _room(cls) == room]
        who = "a backend" if room == "backend" else "any actor" if room == "actor" else f"an actor for {room}"
        channels[f"{room}Requests"] = _channel(address, f"What {who} can be asked", "NATS request and reply.", asked)
    return channels


def _event_channel(cls: type[Message]) -> str:
    return f"{cls.__name__[:1].lower()}{cls.__name__[1:]}Events"


def _operation(action: str, channel: str, cls: type[Message]) -> Schema:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary(cls),
        "messages": [{"$ref": f"#/channels/{channel}/messages/{cls.__name__}"}],
    }


def _request_operation(cls: Any) -> Schema:
    replies: list[Any] = [*reply_types(cls), Failed]
    return {
        **_operation("receive", f"{_room(cls)}Requests", cls),
        # Workers that share an address are a queue group; a worker that has its address for itself is in none.
        "bindings": {"nats": {"queue": "q", "bindingVersion": "0.1.0"}},
        "reply": {
            "channel": {"$ref": "#/channels/replies"},
            "messages": [{"$ref": f"#/channels/replies/messages/{each.__name__}"} for each in replies],
        },
    }
