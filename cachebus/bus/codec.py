"""Messages as bytes: wire format version 1. The only place that makes and reads them.

A message is a map: first `"v": 1`, the version of the wire format, then `"kind"`, the wire name, then the fields by
name. A body is one message or an array of them. It is msgpack, or JSON for people without msgpack; `codec_values`
says what a value may be and how JSON says bytes.

A newer sender of the same version may have more fields, which are ignored. Everything else that does not fit is a
`BadMessage` that names fields, kinds and types, and never repeats a value or a key: they may be secret.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import msgpack  # type: ignore[import-untyped]

from cachebus.messages import BadMessage, CacheSerializationError, Message

from .codec_fields import Plans
from .codec_values import JSON_VALUES, MAX_INT, MIN_INT, MSGPACK_VALUES, Unfit, name_of_type, type_of

VERSION = 1
MSGPACK = "application/msgpack"
JSON = "application/json"

_SMALL = 512  # bytes; in a body up to this, the lengths that headers claim cannot add up to much
_LONGEST_INT = len(str(MIN_INT))
# msgpack comes without type hints.
_packb: Callable[[Any], bytes] = msgpack.packb  # pyright: ignore[reportUnknownMemberType, reportAssignmentType, reportUnknownVariableType]
_unpackb: Callable[..., Any] = msgpack.unpackb  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_unpacker: Callable[..., Any] = msgpack.Unpacker  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

_KIND = re.compile(r"[a-z_.]{1,64}")
_JSON_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def encode(
    message: Message | Sequence[Message],
    content_type: str = MSGPACK,
    instead: Mapping[str, str | int] | None = None,
) -> bytes:
    """The body for a message, or for an array of at least one. `instead` replaces fields of a single message: on the hot
    path of events that is less than a copy.

    Raises `CacheSerializationError` for a value that cannot leave the process without a serializer, `BadMessage` for
    an unknown content type and for no messages, and `TypeError` for what is not a message.
    """
    form = _form(content_type)
    if not isinstance(message, Message) and not message:
        raise BadMessage("an array of messages is empty")
    try:
        if isinstance(message, Message):
            tree = _tree(message, form.plans)
            if instead is not None:
                tree.update(instead)
            return form.pack(tree)
        return form.pack([_tree(each, form.plans) for each in message])
    except Unfit as unfit:
        problem = str(unfit)
    except UnicodeEncodeError:
        problem = "a str holds half of a surrogate pair, which UTF-8 cannot say"
    except OverflowError:
        problem = "an int needs more than 64 bits"
    except (ValueError, RecursionError, MemoryError) as error:
        problem = f"the message cannot be written ({name_of_type(error)})"
    # Raised out here, and in `decode` too, so that no context holds on to what the message held.
    raise CacheSerializationError(problem)


def decode(data: bytes, content_type: str = MSGPACK) -> Message | list[Message]:
    """The message in a body, or the list of them where the body is an array.

    Raises `BadMessage`, and nothing else whatever the bytes are.
    """
    form = _form(content_type)
    done: list[Message] = []
    place = ""
    try:
        tree = form.unpack(data)
        if type_of(tree) is not list:
            return _message(tree, form.plans)
        for each in tree:
            place = f"message {len(done) + 1} of {len(tree)}: "
            done.append(_message(each, form.plans))
        if done:
            return done
        problem = "an array of messages is empty"
    except Unfit as unfit:
        problem = str(unfit)
    except (ValueError, RecursionError, MemoryError) as error:
        problem = f"the body cannot be read ({name_of_type(error)})"
    raise BadMessage(place + problem)


def decode_each(data: bytes, content_type: str = MSGPACK) -> tuple[list[Message | BadMessage], bool]:
    """What a body holds, each element judged for itself, and whether it is an array: one that cannot be read is a
    `BadMessage` in its place, and the others are none the worse.

    Raises `BadMessage` where the body as a whole cannot be read.
    """
    form = _form(content_type)
    try:
        tree = form.unpack(data)
        if type_of(tree) is not list:
            return [_message(tree, form.plans)], False
        if tree:
            return [_judged(each, place, len(tree), form.plans) for place, each in enumerate(tree, 1)], True
        problem = "an array of messages is empty"
    except Unfit as unfit:
        problem = str(unfit)
    except (ValueError, RecursionError, MemoryError) as error:
        problem = f"the body cannot be read ({name_of_type(error)})"
    raise BadMessage(problem)


def join(parts: Sequence[bytes], content_type: str = MSGPACK) -> bytes:
    """The body for an array of messages that were encoded one by one, at least one."""
    if _form(content_type) is _FORMS[JSON]:
        return b"[%b]" % b",".join(parts)
    count = len(parts)
    # The three headers of an array in msgpack: for up to 15 elements, up to 65,535, and up to four thousand million.
    if count < 16:
        header = bytes((0x90 | count,))
    elif count < 65_536:
        header = b"\xdc" + count.to_bytes(2, "big")
    else:
        header = b"\xdd" + count.to_bytes(4, "big")
    return header + b"".join(parts)


def _judged(tree: Any, place: int, count: int, plans: Plans) -> Message | BadMessage:
    try:
        return _message(tree, plans)
    except Unfit as unfit:
        problem = str(unfit)
    except (ValueError, RecursionError, MemoryError) as error:
        problem = f"it cannot be read ({name_of_type(error)})"
    return BadMessage(f"message {place} of {count}: {problem}")


def _tree(message: Message, plans: Plans) -> dict[str, Any]:
    plan = plans.of(type(message))
    return plan.write(message, {"v": VERSION, "kind": plan.kind})


def _message(tree: Any, plans: Plans) -> Message:
    if type_of(tree) is not dict:
        raise Unfit(f"a message is a map, not this {name_of_type(tree)}")
    version, kind = tree.get("v"), tree.get("kind")
    if version != VERSION or type(version) is not int:
        _refuse_version(tree)
    if type(kind) is not str:
        if "kind" not in tree:
            raise Unfit("field 'kind' is missing")
        raise Unfit(f"field 'kind' should be a string, not this {name_of_type(kind)}")
    if (plan := plans.named(kind)) is None:
        # A stranger's text goes into a sentence only where it cannot be anything but a kind.
        raise Unfit(f"no message is of kind {kind!r}" if _KIND.fullmatch(kind) else "field 'kind' is no wire name")
    return plan.read(tree)


def _refuse_version(tree: dict[str, Any]) -> NoReturn:
    if "v" not in tree:
        raise Unfit("field 'v', the wire version, is missing")
    if type(version := tree["v"]) is not int:
        raise Unfit(f"field 'v', the wire version, should be an integer, not this {name_of_type(version)}")
    age = "newer" if version > VERSION else "older"
    raise Unfit(f"wire version {version} is {age} than {VERSION}, the one that is spoken here")


class _Form(NamedTuple):
    """One content type: trees of plain objects to bytes and back, and the plans that make trees of messages."""

    pack: Callable[[Any], bytes]
    unpack: Callable[[bytes], Any]
    plans: Plans


def _form(content_type: str) -> _Form:
    form = _FORMS.get(content_type)
    if form is None:
        # Media types are compared without case, and "; charset=utf-8" says nothing new.
        form = _FORMS.get(content_type.partition(";")[0].strip().lower())
    if form is None:
        raise BadMessage(f"content type {content_type[:80]!r} is neither {MSGPACK} nor {JSON}")
    return form


def _pack_msgpack(tree: Any) -> bytes:
    return _packb(tree)


def _unpack_msgpack(data: bytes) -> Any:
    try:
        if len(data) > _SMALL:
            # A header may claim as many elements as the body has bytes, and room is made for them before they are
            # there, at each of a thousand levels. Walking over the body first makes nothing, and finds them missing.
            walker = _unpacker(max_buffer_size=len(data))
            walker.feed(data)
            walker.skip()
        # unpackb bounds every length by that of the data.
        return _unpackb(data, object_pairs_hook=_map, ext_hook=_refuse_extension)
    except Unfit:
        raise
    except msgpack.ExtraData:
        problem = "bytes follow the message"
    except msgpack.StackError:
        problem = "the body is nested too deep"
    except msgpack.FormatError:
        problem = "the body is not msgpack"
    except UnicodeDecodeError:
        problem = "a string is not UTF-8"
    except (ValueError, msgpack.OutOfData):
        problem = "the body is msgpack that ends too early, or has a map key that is not a string"
    raise Unfit(problem)


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise Unfit(f"the body has a msgpack extension, of type {code}")


def _map(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise Unfit("a map has the same field twice")
    return tree


def _pack_json(tree: Any) -> bytes:
    return _to_json(tree).encode()


def _unpack_json(data: bytes) -> Any:
    try:
        tree = _from_json(str(data, "utf-8"))
        if _JSON_SURROGATE.search(data):
            _to_json(tree).encode()
        return tree
    except Unfit:
        raise
    except json.JSONDecodeError as error:
        problem = f"the body is not JSON: {error.msg} at character {error.pos}"
    except UnicodeDecodeError:
        problem = "the body is not UTF-8"
    except UnicodeEncodeError:
        problem = "a string holds half of a surrogate pair"
    except RecursionError:
        problem = "the body is nested too deep"
    raise Unfit(problem)


def _json_int(digits: str) -> int:
    if len(digits) <= _LONGEST_INT and MIN_INT <= (number := int(digits)) <= MAX_INT:
        return number
    raise Unfit("an integer has more than 64 bits")


def _json_float(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise Unfit("a number is larger than a float can be")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise Unfit(f"{name} is not JSON")


_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode
_from_json = json.JSONDecoder(
    object_pairs_hook=_map, parse_int=_json_int, parse_float=_json_float, parse_constant=_refuse_constant
).decode

_FORMS = {
    MSGPACK: _Form(_pack_msgpack, _unpack_msgpack, Plans(MSGPACK_VALUES)),
    JSON: _Form(_pack_json, _unpack_json, Plans(JSON_VALUES)),
}
