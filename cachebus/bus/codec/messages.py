"""Wire codec for messages. No other module encodes or decodes them.

A message is a map with `"kind"`, its wire name, followed by its fields by name. A body is one message or an array of
messages, in MessagePack, or in JSON for clients without MessagePack. The version of the wire format is part of the
subject. Unknown fields, which a newer sender of the same version may add, are ignored.

msgspec does the encoding. This module adds three things:

- Error messages that name fields, kinds and types but never a value, because msgspec's messages may repeat input.
- `BadMessage` and `CacheSerializationError` in place of all exceptions of msgspec.
- Checks of values, because msgspec changes some of them silently. See `values` for the types and their form in JSON.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec

from cachebus.messages import WIRE_NAMES, BadMessage, CacheSerializationError, Message

from .values import (
    JSON_IN,
    JSON_OUT,
    MSGPACK_IN,
    MSGPACK_OUT,
    Direction,
    Unfit,
    map_each,
    map_values,
    name_of_type,
)

VERSION = 1
MSGPACK = "application/msgpack"
JSON = "application/json"

MAX_MESSAGES = 10_000
"""Maximum number of messages in an array. An element of one byte takes about a hundred bytes if it is rejected."""


def encode(message: Message | Sequence[Message], content_type: str = MSGPACK) -> bytes:
    """Encode a message, or a non-empty array of them, in one call.

    Raises `CacheSerializationError` for a value that needs a serializer to leave the process, `BadMessage` for an
    unknown content type or an empty array, and `TypeError` for an object that is not a message.
    """
    form = _FORMATS.get(content_type) or _format(content_type)
    try:
        out = form.out
        if isinstance(message, Message):
            return form.encode(map_values(message, out) if out.places[type(message)] else message)
        if message:
            return form.encode(map_each(message, out))
        problem = ""
    except Unfit as unfit:
        problem = str(unfit)
    except UnicodeEncodeError:
        problem = "a str contains half of a surrogate pair, which UTF-8 cannot encode"
    except OverflowError:
        problem = "an int needs more than 64 bits"
    except (ValueError, RecursionError, MemoryError) as error:
        problem = f"the message cannot be encoded ({name_of_type(error)})"
    # Raised outside of the handlers, as in `_decoded`, so that no exception context keeps the values alive.
    if problem:
        raise CacheSerializationError(problem)
    raise BadMessage("an array of messages is empty")


def encode_each(messages: Sequence[Message], content_type: str = MSGPACK) -> list[bytes | CacheSerializationError]:
    """Encode each message as a separate body. A message that cannot be encoded is replaced by its error."""
    form = _FORMATS.get(content_type) or _format(content_type)
    places, encode_one = form.out.places, form.encode
    done: list[bytes | CacheSerializationError] = []
    for each in messages:
        try:
            done.append(encode_one(map_values(each, form.out) if places[type(each)] else each))
        except Exception:
            try:
                done.append(encode(each, content_type))
            except CacheSerializationError as error:
                done.append(error)
    return done


def decode(data: bytes, content_type: str = MSGPACK) -> Message | list[Message]:
    """Decode a body, and return its message, or a list of messages if the body is an array.

    Raises `BadMessage` and no other exception, for any bytes.
    """
    messages, is_array = decode_each(data, content_type)
    for each in messages:
        if isinstance(each, BadMessage):
            raise each
    done: list[Any] = messages
    return done if is_array else done[0]


def decode_each(data: bytes, content_type: str = MSGPACK) -> tuple[list[Message | BadMessage], bool]:
    """Decode a body, and return its messages and `True` if it is an array.

    An element that cannot be decoded is replaced by a `BadMessage`. Raises `BadMessage` if the body as a whole cannot
    be decoded.
    """
    form = _FORMATS.get(content_type) or _format(content_type)
    if not form.is_array(data):
        return [decode_one(data, content_type)], False
    messages = _decoded(form, form.decode_array, data)
    if isinstance(messages, BadMessage):
        parts = _decoded(form, form.decode_parts, data)
        if isinstance(parts, BadMessage):
            raise parts
        messages = [
            BadMessage(f"message {place} of {len(parts)}: {each.detail}") if isinstance(each, BadMessage) else each
            for place, each in enumerate((_decoded(form, form.decode_one, part) for part in parts), 1)
        ]
    if not messages:
        raise BadMessage("an array of messages is empty")
    return messages, True


def decode_one(data: bytes, content_type: str = MSGPACK) -> Message:
    """Decode a body that is a single message. Raises `BadMessage`, also for an array."""
    form = _FORMATS.get(content_type) or _format(content_type)
    try:
        message = form.one(data)
        return message if form.incoming.places[type(message)] is None else map_values(message, form.incoming)  # type: ignore[no-any-return]
    except Exception:
        pass  # The slow path below finds the reason.
    message = _decoded(form, form.decode_one, data)
    if isinstance(message, BadMessage):
        raise message
    return cast("Message", message)


class _Format:
    """Content type, with its msgspec encoder and decoders and its conversion of values."""

    def __init__(self, library: Any, out: Direction, incoming: Direction, arrays: frozenset[bytes]) -> None:
        self.out = out
        self.incoming = incoming
        self.encode: Callable[[Any], bytes] = library.Encoder(enc_hook=_plain).encode
        self._parts: Callable[[bytes], Any] = library.Decoder(list[msgspec.Raw]).decode
        self._library = library
        self._arrays = arrays
        self._kinds: frozenset[str] = frozenset()
        self.one: Callable[[bytes], Any]
        self._array: Callable[[bytes], Any]

    def is_array(self, data: bytes) -> bool:
        """Return `True` if a body is an array, judging by its first byte."""
        return data[:1] in self._arrays or (data[:1].isspace() and data.lstrip()[:1] in self._arrays)

    def decode_parts(self, data: bytes) -> Any:
        """Split an array into the bytes of its elements. Raises the exceptions of msgspec, and `Unfit`."""
        if self._library is msgspec.msgpack:
            size = 4 if data[0] == 0xDD else 2 if data[0] == 0xDC else 0
            if int.from_bytes(data[1 : 1 + size], "big") > MAX_MESSAGES:
                raise Unfit(_TOO_MANY)
        parts = self._parts(data)
        if len(parts) > MAX_MESSAGES:
            raise Unfit(_TOO_MANY)
        return parts

    def decode_one(self, data: bytes) -> Any:
        """Decode a message. Raises the exceptions of msgspec, and `Unfit`."""
        if not self._kinds:
            self.learn()
        message = self.one(data)
        return map_values(message, self.incoming) if self.incoming.places[type(message)] else message

    def decode_array(self, data: bytes) -> Any:
        """Decode an array of messages in one call. Raises the exceptions of msgspec, and `Unfit`."""
        if not self._kinds:
            self.learn()
        return map_each(self._array(data), self.incoming)

    def learn(self) -> bool:
        """Rebuild the decoders for the current message classes. Return `False` if there are no new classes."""
        kinds = dict(WIRE_NAMES)
        if kinds.keys() == self._kinds:
            return False
        union: Any = _union[tuple(kinds.values())]
        self.one = self._library.Decoder(union).decode
        self._array = self._library.Decoder(types.GenericAlias(list, (union,))).decode
        self._kinds = frozenset(kinds)
        return True


def _decoded(form: _Format, read: Callable[[bytes], Any], data: bytes) -> Any:
    """Return the result of `read` for a body, or a `BadMessage` with the reason if it cannot be decoded."""
    try:
        try:
            return read(data)
        except msgspec.ValidationError as error:
            if not (_KIND.fullmatch(str(error)) and form.learn()):
                raise
        return read(data)  # The message class was defined after the decoder was built.
    except Unfit as unfit:
        problem = str(unfit)
    except msgspec.ValidationError as error:
        problem = _validation_problem(str(error))
    except msgspec.DecodeError as error:
        problem = _decoding_problem(str(error))
    except RecursionError:
        problem = "the body is nested too deeply"
    except (ValueError, MemoryError) as error:
        problem = f"the body cannot be decoded ({name_of_type(error)})"
    return BadMessage(problem)


def _validation_problem(text: str) -> str:
    """Return an error message for a validation error of msgspec, whose text may repeat input."""
    if match := _EXPECTED.fullmatch(text):
        wanted, got, where = match.groups("")
        if not where:
            return f"a message must be a map, not {got}"
        return f"field {where!r} should be {wanted}" + (f", not {got}" if got else "")
    if match := _MISSING.fullmatch(text):
        name, where = match.groups()
        return f"field {name!r} is missing" + (f" in {where!r}" if where else "")
    if match := _KIND.fullmatch(text):
        # Untrusted text enters an error message only if it has the form of a kind.
        return f"unknown message kind {match[1]!r}"
    where = match[1] if (match := _INVALID.fullmatch(text)) else ""
    return "field 'kind' is not a message kind" if where == "kind" else f"field {where!r} has an invalid value"


def _decoding_problem(text: str) -> str:
    """Return an error message for a decoding error of msgspec, whose text may repeat input."""
    for sign, problem in _MALFORMED.items():
        if sign in text:
            return problem
    return "the body cannot be decoded"


def _plain(held: Any) -> Any:
    """Convert a field of a type that msgspec does not support. Raises `Unfit`."""
    if isinstance(held, Mapping):
        return dict(cast("Mapping[str, Any]", held))
    if isinstance(held, str):
        return str.__str__(held)  # For example an `Address`: msgspec does not encode subclasses of str.
    raise Unfit(f"a field has type {name_of_type(held)}, which a message cannot contain")


def _format(content_type: str) -> _Format:
    form = _FORMATS.get(content_type)
    if form is None:
        # Media types are case-insensitive, and parameters such as "; charset=utf-8" have no meaning here.
        form = _FORMATS.get(content_type.partition(";")[0].strip().lower())
    if form is None:
        raise BadMessage(f"content type {content_type[:80]!r} is neither {MSGPACK} nor {JSON}")
    return form


_EXPECTED = re.compile(r"Expected `?([^`]+?)`?(?:, got `?([^`]+?)`?)?(?: - at `\$\.?([^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `(\w+)`(?: - at `\$\.?([^`]*)`)?")
_INVALID = re.compile(r".* - at `\$\.?([^`]*)`", re.DOTALL)
_KIND = re.compile(r"Invalid value '([a-z_.]{1,64})' - at `\$(?:\[\d+\]|\[\.\.\.\])?\.kind`")
_MALFORMED = {
    "truncated": "the body is truncated",
    "trailing": "the body has trailing bytes",
    "UTF-8": "a string is not UTF-8",
    "JSON": "the body is not JSON",
    "MessagePack": "the body is not MessagePack",
}

_TOO_MANY = f"an array has more than {MAX_MESSAGES:,} messages"
_union: Any = typing.Union  # To the type checker, a type made at run time is a value.

_FORMATS = {
    MSGPACK: _Format(
        msgspec.msgpack,
        MSGPACK_OUT,
        MSGPACK_IN,
        frozenset(bytes((first,)) for first in (*range(0x90, 0xA0), 0xDC, 0xDD)),
    ),
    JSON: _Format(msgspec.json, JSON_OUT, JSON_IN, frozenset({b"["})),
}
