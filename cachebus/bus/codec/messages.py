"""Messages as bytes: the only place that makes and reads them.

A message is a map: `"kind"`, its wire name, then its fields by name. A body is one message or an array of them, in
MessagePack, or in JSON for people without MessagePack. The version of the wire format is a word of the subject. A newer
sender of the same version may send more fields, which are ignored.

msgspec does the work. Three things are ours: its error texts repeat input, so `_misfit` writes others, which name fields,
kinds and types and never a value; everything that it raises becomes `BadMessage` or `CacheSerializationError`;
and it changes some values silently, so `codec_values` says what a value may be and how JSON says bytes.
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
"""Messages of an array at most: an element may take one byte, and takes a hundred when it is refused."""


def encode(message: Message | Sequence[Message], content_type: str = MSGPACK) -> bytes:
    """Encode a message, or a non-empty array of them, in one call.

    Raises `CacheSerializationError` for a value that cannot leave the process without a serializer, `BadMessage` for an
    unknown content type and for an empty array, and `TypeError` for an object that is not a message.
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
        problem = "a str holds half of a surrogate pair, which UTF-8 cannot say"
    except OverflowError:
        problem = "an int needs more than 64 bits"
    except (ValueError, RecursionError, MemoryError) as error:
        problem = f"the message cannot be written ({name_of_type(error)})"
    # Raised out here, and in `_decoded` too, so that no context holds on to what the message held.
    if problem:
        raise CacheSerializationError(problem)
    raise BadMessage("an array of messages is empty")


def encode_each(messages: Sequence[Message], content_type: str = MSGPACK) -> list[bytes | CacheSerializationError]:
    """Encode messages one by one, each as a body of its own: a message that cannot be encoded is an error in its place."""
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
    """Decode a body: a message, or the list of them if the body is an array.

    Raises `BadMessage`, and nothing else whatever the bytes are.
    """
    messages, is_array = decode_each(data, content_type)
    for each in messages:
        if isinstance(each, BadMessage):
            raise each
    done: list[Any] = messages
    return done if is_array else done[0]


def decode_each(data: bytes, content_type: str = MSGPACK) -> tuple[list[Message | BadMessage], bool]:
    """Decode a body, and say if it is an array: an element that cannot be read is a `BadMessage` in its own place.

    Raises `BadMessage` if the body as a whole cannot be read.
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
    """Decode a body that is one message. Raises `BadMessage`, also for an array."""
    form = _FORMATS.get(content_type) or _format(content_type)
    try:
        message = form.one(data)
        return message if form.incoming.places[type(message)] is None else map_values(message, form.incoming)  # type: ignore[no-any-return]
    except Exception:
        pass  # The other path says what it is.
    message = _decoded(form, form.decode_one, data)
    if isinstance(message, BadMessage):
        raise message
    return cast("Message", message)


class _Format:
    """A content type: msgspec's encoder and decoders for it, and how it says values."""

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
        """Say if a body is an array, from its first byte."""
        return data[:1] in self._arrays or (data[:1].isspace() and data.lstrip()[:1] in self._arrays)

    def decode_parts(self, data: bytes) -> Any:
        """Divide an array into the bytes of its elements. Raises what msgspec raises, and `Unfit`."""
        if self._library is msgspec.msgpack:
            size = 4 if data[0] == 0xDD else 2 if data[0] == 0xDC else 0
            if int.from_bytes(data[1 : 1 + size], "big") > MAX_MESSAGES:
                raise Unfit(_TOO_MANY)
        parts = self._parts(data)
        if len(parts) > MAX_MESSAGES:
            raise Unfit(_TOO_MANY)
        return parts

    def decode_one(self, data: bytes) -> Any:
        """Decode a message. Raises what msgspec raises, and `Unfit`."""
        if not self._kinds:
            self.learn()
        message = self.one(data)
        return map_values(message, self.incoming) if self.incoming.places[type(message)] else message

    def decode_array(self, data: bytes) -> Any:
        """Decode an array of messages in one call. Raises what msgspec raises, and `Unfit`."""
        if not self._kinds:
            self.learn()
        return map_each(self._array(data), self.incoming)

    def learn(self) -> bool:
        """Make the decoders for the message classes that there are now; say if there are more than the last time."""
        kinds = dict(WIRE_NAMES)
        if kinds.keys() == self._kinds:
            return False
        union: Any = _union[tuple(kinds.values())]
        self.one = self._library.Decoder(union).decode
        self._array = self._library.Decoder(types.GenericAlias(list, (union,))).decode
        self._kinds = frozenset(kinds)
        return True


def _decoded(form: _Format, read: Callable[[bytes], Any], data: bytes) -> Any:
    """What `read` makes of a body, or the `BadMessage` that says why it makes nothing of it."""
    try:
        try:
            return read(data)
        except msgspec.ValidationError as error:
            if not (_KIND.fullmatch(str(error)) and form.learn()):
                raise
        return read(data)  # Of a kind that was defined since the decoder was made.
    except Unfit as unfit:
        problem = str(unfit)
    except msgspec.ValidationError as error:
        problem = _misfit(str(error))
    except msgspec.DecodeError as error:
        problem = _malformed(str(error))
    except RecursionError:
        problem = "the body is nested too deep"
    except (ValueError, MemoryError) as error:
        problem = f"the body cannot be read ({name_of_type(error)})"
    return BadMessage(problem)


def _misfit(text: str) -> str:
    """Say what msgspec found wrong with a message: which field, and which types. Its own text may repeat input."""
    if match := _EXPECTED.fullmatch(text):
        wanted, got, where = match.groups("")
        if not where:
            return f"a message is a map, not this {got}"
        return f"field {where!r} should be {wanted}" + (f", not {got}" if got else "")
    if match := _MISSING.fullmatch(text):
        name, where = match.groups()
        return f"field {name!r} is missing" + (f" in {where!r}" if where else "")
    if match := _KIND.fullmatch(text):
        # A stranger's text goes into a sentence only if it cannot be anything but a kind.
        return f"no message is of kind {match[1]!r}"
    where = match[1] if (match := _INVALID.fullmatch(text)) else ""
    return "field 'kind' is no wire name" if where == "kind" else f"field {where!r} has a value that it cannot have"


def _malformed(text: str) -> str:
    """Say why a body is not of its content type. msgspec's own text may repeat input."""
    for sign, problem in _MALFORMED.items():
        if sign in text:
            return problem
    return "the body cannot be read"


def _plain(held: Any) -> Any:
    """Turn into what msgspec knows what it does not know. Raises `Unfit`."""
    if isinstance(held, Mapping):
        return dict(cast("Mapping[str, Any]", held))
    if isinstance(held, str):
        return str.__str__(held)  # An `Address`, for one: msgspec knows no subclasses.
    raise Unfit(f"a field is of type {name_of_type(held)}, which no message may hold")


def _format(content_type: str) -> _Format:
    form = _FORMATS.get(content_type)
    if form is None:
        # Media types are compared without case, and "; charset=utf-8" says nothing new.
        form = _FORMATS.get(content_type.partition(";")[0].strip().lower())
    if form is None:
        raise BadMessage(f"content type {content_type[:80]!r} is neither {MSGPACK} nor {JSON}")
    return form


_EXPECTED = re.compile(r"Expected `?([^`]+?)`?(?:, got `?([^`]+?)`?)?(?: - at `\$\.?([^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `(\w+)`(?: - at `\$\.?([^`]*)`)?")
_INVALID = re.compile(r".* - at `\$\.?([^`]*)`", re.DOTALL)
_KIND = re.compile(r"Invalid value '([a-z_.]{1,64})' - at `\$(?:\[\d+\]|\[\.\.\.\])?\.kind`")
_MALFORMED = {
    "truncated": "the body ends too early",
    "trailing": "bytes follow the message",
    "UTF-8": "a string is not UTF-8",
    "JSON": "the body is not JSON",
    "MessagePack": "the body is not MessagePack",
}

_TOO_MANY = f"an array has more than {MAX_MESSAGES:,} messages"
_union: Any = typing.Union  # A type made at run time is a value to the type checker.

_FORMATS = {
    MSGPACK: _Format(
        msgspec.msgpack,
        MSGPACK_OUT,
        MSGPACK_IN,
        frozenset(bytes((first,)) for first in (*range(0x90, 0xA0), 0xDC, 0xDD)),
    ),
    JSON: _Format(msgspec.json, JSON_OUT, JSON_IN, frozenset({b"["})),
}
