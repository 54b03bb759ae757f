"""Arrays with single bad elements, and arrays joined from encoded messages."""

from __future__ import annotations

import json

import msgpack  # type: ignore[import-untyped]
import pytest

from cachebus.bus.codec.messages import JSON, MAX_MESSAGES, MSGPACK, decode, decode_each, encode
from cachebus.messages import BadMessage, Get

CONTENT_TYPES = pytest.mark.parametrize("content_type", [MSGPACK, JSON])


@CONTENT_TYPES
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, MAX_MESSAGES])
def test_an_array_comes_back_with_each_message_in_its_place(content_type: str, count: int) -> None:
    messages = [Get(str(number % 7)) for number in range(count)]
    assert decode_each(encode(messages, content_type), content_type) == (messages, True)


@CONTENT_TYPES
def test_a_single_message_is_no_array(content_type: str) -> None:
    assert decode_each(encode(Get("k"), content_type), content_type) == ([Get("k")], False)


@CONTENT_TYPES
def test_a_bad_element_is_named_in_its_place_and_hurts_no_other(content_type: str) -> None:
    tree = [
        {"kind": "backend.get", "key": "a"},
        {"kind": "backend.gut", "key": "a"},
        {"kind": "reply.found", "value": {"$base64": 1} if content_type == JSON else {1: 1}},
        5,
        {"kind": "backend.get", "key": 5},
        {"kind": "backend.get", "key": "b"},
    ]
    body: bytes = json.dumps(tree).encode() if content_type == JSON else msgpack.packb(tree)
    found, is_array = decode_each(body, content_type)
    assert is_array
    assert (found[0], found[5]) == (Get("a"), Get("b"))
    held = "$base64 of type int" if content_type == JSON else "dict with a key of type int"
    assert [str(each) for each in found[1:5]] == [
        "message 2 of 6: unknown message kind 'backend.gut'",
        f"message 3 of 6: field 'value' of reply.found contains a {held}, not str",
        "message 4 of 6: a message must be a map, not int",
        "message 5 of 6: field 'key' should be str, not int",
    ]
    with pytest.raises(BadMessage, match="message 2 of 6"):
        decode(body, content_type)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x90", b"junk", encode(Get("k"))[:-1]])
def test_a_body_that_cannot_be_read_is_refused_as_a_whole(body: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_each(body)
    with pytest.raises(BadMessage, match="neither"):
        decode_each(body, "text/html")


@CONTENT_TYPES
def test_an_array_has_a_bound(content_type: str) -> None:
    nothing: bytes = b"[" + b",".join([b"1"] * (MAX_MESSAGES + 1)) + b"]"
    if content_type == MSGPACK:
        nothing = b"\xdc" + (MAX_MESSAGES + 1).to_bytes(2, "big") + b"\x01" * (MAX_MESSAGES + 1)
    with pytest.raises(BadMessage, match="an array has more than 10,000 messages"):
        decode_each(nothing, content_type)
