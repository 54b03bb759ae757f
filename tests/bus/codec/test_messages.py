"""The codec: round trips, the wire format, and refused messages with their error texts."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import json
import math
import tracemalloc
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachebus.bus import Address
from cachebus.bus.codec.messages import JSON, MSGPACK, decode, encode
from cachebus.bus.codec.values import MAX_DEPTH
from cachebus.messages import (
    WIRE_NAMES,
    BadMessage,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    CacheSerializationError,
    CacheTimeoutError,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    Increment,
    LeaseGranted,
    Message,
    Missing,
    Overloaded,
    Pong,
    RemovalCause,
    Reply,
    Set,
    SetMany,
    Stale,
    Touch,
)

from ..strategies import any_message, messages, values

EMPTY: list[Any] = []  # Typed for the type checkers.


def anything(cls: Any, *fields: Any, **named: Any) -> Message:
    """Create a message with fields that its class forbids."""
    made: Message = cls(*fields, **named)
    return made


BOTH = pytest.mark.parametrize("content_type", [MSGPACK, JSON])

pack: Any = msgpack.packb  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
extension: Any = msgpack.ExtType
timestamp: Any = msgpack.Timestamp


def body(content_type: str, **fields: Any) -> bytes:
    """Return a body as another sender would write it."""
    return pack(fields) if content_type == MSGPACK else json.dumps(fields).encode()


def refusal(data: bytes, content_type: str = MSGPACK) -> str:
    """Return the error text for refused bytes. The error must not refer to data of the sender."""
    with pytest.raises(BadMessage) as caught:
        decode(data, content_type)
    assert caught.value.__context__ is None
    return str(caught.value)


def encoding_refusal(message: Message | list[Message], content_type: str = MSGPACK) -> str:
    with pytest.raises(CacheSerializationError) as caught:
        encode(message, content_type)
    assert caught.value.__context__ is None
    return str(caught.value)


def comes_back(message: Message, content_type: str) -> None:
    back = decode(encode(message, content_type), content_type)
    assert back == message
    assert repr(back) == repr(message)  # `==` does not distinguish 1 from 1.0 or True.


# --- Round trips


@BOTH
@pytest.mark.parametrize("kind", sorted(WIRE_NAMES))
def test_every_kind_comes_back_the_same(kind: str, content_type: str) -> None:
    @settings(max_examples=25)
    @given(messages(WIRE_NAMES[kind], content_type))
    def check(message: Message) -> None:
        comes_back(message, content_type)

    check()


@BOTH
def test_an_array_comes_back_as_a_list_in_its_order(content_type: str) -> None:
    @settings(max_examples=50)
    @given(st.lists(any_message(content_type), min_size=1, max_size=4))
    def check(several: list[Message]) -> None:
        back = decode(encode(several, content_type), content_type)
        assert isinstance(back, list)
        assert repr(back) == repr(several)

    check()


@BOTH
def test_every_value_comes_back_with_its_types(content_type: str) -> None:
    @settings(max_examples=300)
    @given(values(content_type))
    def check(value: Any) -> None:
        comes_back(Found(value), content_type)

    check()


def test_an_array_of_one_stays_an_array() -> None:
    assert decode(encode([Missing()])) == [Missing()]
    assert decode(encode((Missing(),))) == [Missing()]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_msgpack_carries_nan_and_the_infinities(number: float) -> None:
    back = decode(encode(Found([number])))
    assert isinstance(back, Found)
    assert repr(back.value) == repr([number])


@pytest.mark.parametrize(
    "value",
    [
        {"$base64": "AA=="},
        {"$base64": b"\x00"},
        {"$base64": {"$base64": 1}},
        {"$$base64": None},
        {"$$$base64": [{"$base64": EMPTY}]},
        {"$base64": 1, "other": 2},
        {"base64": b""},
        {"x$base64": 1},
        {"$": 1},
        {"": b""},
    ],
)
def test_a_dict_that_looks_like_json_bytes_stays_a_dict(value: dict[str, Any]) -> None:
    comes_back(Found(value), JSON)
    comes_back(SetMany(value), JSON)


def test_json_says_bytes_in_base64_and_escapes_what_looks_like_it() -> None:
    for value, tree in (
        (b"\x00\xff", {"$base64": "AP8="}),
        ({"$base64": 1}, {"$$base64": 1}),
        ({"$$base64": 1}, {"$$$base64": 1}),
        ({"$base64": 1, "b": 2}, {"$base64": 1, "b": 2}),
    ):
        assert json.loads(encode(Found(value), JSON))["value"] == tree


@BOTH
def test_values_nest_to_the_limit_and_not_deeper(content_type: str) -> None:
    value: Any = b"bottom"
    for level in range(MAX_DEPTH):
        value = [value] if level % 2 else {"$base64": value}
    comes_back(Found(value), content_type)
    assert "nested deeper than 100 levels" in encoding_refusal(Found([value]), content_type)
    deep = b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)
    data = b'{"kind":"reply.found","value":' + deep + b"}"
    packed = body(MSGPACK, kind="reply.found", value=json.loads(deep))
    assert "nested deeper than 100 levels" in refusal(data if content_type == JSON else packed, content_type)


@BOTH
@pytest.mark.parametrize(
    "error",
    [
        CacheError("all is lost"),
        CacheConnectionError("refused", backend="primary"),
        CacheTimeoutError(address="backend.primary", timeout=0.25),
        Overloaded(address="backend.primary", capacity=7),
        CacheConfigurationError("no such option: « ttl »"),
    ],
)
def test_a_failed_reply_raises_the_same_error_with_the_same_sentence(error: CacheError, content_type: str) -> None:
    failed = decode(encode(Failed.of(error), content_type), content_type)
    assert isinstance(failed, Failed)
    back = failed.error()
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.wire_fields() == error.wire_fields()


# --- The wire format


def test_the_kind_comes_first_then_the_fields() -> None:
    assert encode(Get("k"), JSON) == b'{"kind":"backend.get","key":"k"}'
    assert encode(Get("k")) == b"\x82\xa4kind\xabbackend.get\xa3key\xa1k"


def test_a_message_inside_a_message_says_its_kind() -> None:
    tree = json.loads(encode(FoundMany({"k": Found(1, stored_at=2.0)}), JSON))
    found = {"kind": "reply.found", "value": 1, "version": 0.0, "ttl": None, "tags": [], "stored_at": 2.0}
    assert tree["entries"] == {"k": found}


@BOTH
def test_the_order_of_the_fields_does_not_matter_to_the_reader(content_type: str) -> None:
    tree = {"key": "k", "kind": "backend.get"}
    assert decode(pack(tree) if content_type == MSGPACK else json.dumps(tree).encode(), content_type) == Get("k")


@BOTH
def test_fields_of_a_newer_sender_are_ignored(content_type: str) -> None:
    assert decode(body(content_type, kind="backend.get", key="k", hurry=[{"a": 1}]), content_type) == Get("k")
    found = {"kind": "reply.found", "value": 1, "colour": "red"}
    data = body(content_type, kind="reply.found_many", entries={"k": found})
    assert decode(data, content_type) == FoundMany({"k": Found(1)})


@BOTH
def test_fields_with_a_default_may_be_missing(content_type: str) -> None:
    assert decode(body(content_type, kind="backend.touch", key="k"), content_type) == Touch("k")


@BOTH
def test_an_integer_will_do_for_a_float_and_becomes_one(content_type: str) -> None:
    message: Any = Touch("k", ttl=60)
    for data in (encode(message, content_type), body(content_type, kind="backend.touch", key="k", ttl=60)):
        back = decode(data, content_type)
        assert isinstance(back, Touch)
        assert repr(back.ttl) == "60.0"


@BOTH
def test_a_key_that_is_an_enum_goes_as_its_string(content_type: str) -> None:
    message = GetMany((RemovalCause.SIZE, "other"))
    back = decode(encode(message, content_type), content_type)
    assert repr(back) == repr(GetMany(("size", "other")))


@BOTH
def test_an_address_goes_as_its_string(content_type: str) -> None:
    back = decode(encode(Pong(Address("backend.primary")), content_type), content_type)
    assert repr(back) == repr(Pong("backend.primary"))


@pytest.mark.parametrize(
    "content_type", ["Application/JSON", "application/json; charset=utf-8", " application/json;charset=UTF-8"]
)
def test_a_content_type_is_read_without_case_and_parameters(content_type: str) -> None:
    assert decode(encode(Missing(), content_type), JSON) == Missing()


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/jsonx", "application/json\r\nX: y"])
def test_an_unknown_content_type_is_named_with_the_two_allowed(content_type: str) -> None:
    for use in (lambda: decode(b"", content_type), lambda: encode(Missing(), content_type)):
        with pytest.raises(BadMessage) as caught:
            use()
        assert str(caught.value) == f"content type {content_type!r} is neither application/msgpack nor application/json"


def test_a_kind_that_is_defined_later_is_read_too() -> None:
    encode(Missing())

    class Late(Reply, frozen=True, tag="test.defined_late"):
        """Message class defined after the decoder was made."""

        word: str

    assert decode(encode(Late("w"))) == Late("w")
    assert decode(encode([Late("w"), Missing()], JSON), JSON) == [Late("w"), Missing()]


# --- Messages that cannot be encoded


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


@BOTH
@pytest.mark.parametrize(
    ("value", "name"),
    [
        ((1,), "tuple"),
        ({1}, "set"),
        (dt.date(2024, 1, 1), "datetime.date"),
        (decimal.Decimal(1), "decimal.Decimal"),
        (bytearray(b"b"), "bytearray"),
        (memoryview(b"m"), "memoryview"),
        (Level.LOW, "Level"),
        (Text("t"), "Text"),
        (RemovalCause.SIZE, "cachebus.messages.events.RemovalCause"),
        (object(), "object"),
        (timestamp(1), "msgpack.ext.Timestamp"),
        (extension(5, b""), "msgpack.ext.ExtType"),
        (Get("secret"), "cachebus.messages.requests.Get"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name_and_points_to_a_serializer(
    value: Any, name: str, content_type: str
) -> None:
    for holder in (value, [value], {"secret": {"secret": [1, value]}}):
        sentence = encoding_refusal(Found(holder), content_type)
        assert sentence.startswith("field 'value' of reply.found contains a ")
        assert f"{name}; choose a serializer" in sentence
        assert "secret" not in sentence


@BOTH
@pytest.mark.parametrize("key", [1, b"k", None, Text("k"), (1,)])
def test_a_dict_key_that_is_not_a_str_is_refused(key: Any, content_type: str) -> None:
    assert f"a key of type {type(key).__name__}" in encoding_refusal(Found({key: 1}), content_type).replace(
        f"{__name__}.", ""
    )


@BOTH
@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400])
def test_an_int_of_more_than_64_bits_cannot_be_sent(number: int, content_type: str) -> None:
    for message in (Found(number), Found([number]), Increment("k", delta=number)):
        assert "64 bits" in encoding_refusal(message, content_type)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_refuses_nan_and_the_infinities(number: float) -> None:
    for message in (Found(number), Found([{"a": number}]), Found(1, ttl=number)):
        assert "NaN or an infinity, which JSON cannot represent" in encoding_refusal(message, JSON)


@BOTH
def test_half_a_surrogate_pair_cannot_be_sent(content_type: str) -> None:
    for message in (Found("\ud800"), Found({"\udfff": 1}), Get("\ud800"), FoundMany({"\ud800": Found(1)})):
        assert "surrogate" in encoding_refusal(message, content_type)


@BOTH
def test_a_value_that_holds_itself_is_refused(content_type: str) -> None:
    value: list[Any] = []
    value += [value, value]
    assert "nested deeper" in encoding_refusal(Found(value), content_type)


@BOTH
@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (anything(SetMany, {1: 1}), "field 'items' of backend.set_many has a key of type int, not str"),
        (anything(FoundMany, {"k": Found({1})}), "field 'value' of reply.found contains a set"),
        (anything(LeaseGranted, "t", Stale({1})), "field 'value' of reply.stale contains a set"),
        (anything(GetMany, object()), "a field has type object, which a message cannot contain"),
    ],
)
def test_what_a_message_may_not_hold_is_refused_at_the_sender(
    message: Message, sentence: str, content_type: str
) -> None:
    assert encoding_refusal(message, content_type).startswith(sentence)


def test_no_messages_are_no_message() -> None:
    with pytest.raises(BadMessage, match="an array of messages is empty"):
        encode([])


def test_what_is_no_message_is_a_type_error() -> None:
    nothing: Any = "text"
    strangers: Any = [Missing(), 5]
    for stray in (nothing, strangers):
        with pytest.raises(TypeError, match="expected a message, not a"):
            encode(stray)


# --- Bodies that are refused


@BOTH
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "backend.get"}, "field 'key' is missing"),
        ({"kind": "backend.get", "key": 5}, "field 'key' should be str, not int"),
        ({"kind": "backend.get", "key": None}, "field 'key' should be str, not "),
        ({"kind": "reply.incremented", "value": "1"}, "field 'value' should be int, not str"),
        ({"kind": "reply.incremented", "value": True}, "field 'value' should be int, not bool"),
        ({"kind": "reply.incremented", "value": 1.5}, "field 'value' should be int, not float"),
        ({"kind": "reply.found", "value": 1, "ttl": "1"}, "field 'ttl' should be float | null, not str"),
        ({"kind": "reply.found", "value": 1, "ttl": True}, "field 'ttl' should be float | null, not bool"),
        ({"kind": "backend.touch", "key": "k", "ttl": "60"}, "field 'ttl' has an invalid value"),
        ({"kind": "backend.get_many", "keys": "ab"}, "field 'keys' should be array, not str"),
        ({"kind": "backend.get_many", "keys": {"a": 1}}, "field 'keys' should be array, not object"),
        ({"kind": "backend.get_many", "keys": ["a", 1]}, "field 'keys[1]' should be str, not int"),
        ({"kind": "backend.set_many", "items": [["a", 1]]}, "field 'items' should be object, not array"),
        ({"kind": "backend.set", "key": "k", "value": 1, "only_if": "secret"}, "field 'only_if' has an invalid value"),
        ({"kind": "event.cache_evicted", "key": "k", "cause": "secret"}, "field 'cause' has an invalid value"),
        ({"kind": "reply.found_many", "entries": {"secret": 5}}, "field 'entries[...]' should be object, not int"),
        ({"kind": "reply.found_many", "entries": {"secret": {}}}, "field 'kind' is missing in 'entries[...]'"),
        ({"kind": "backend.secret_wish"}, "unknown message kind 'backend.secret_wish'"),
        ({"kind": "My secret\r\n"}, "field 'kind' is not a message kind"),
        ({"kind": "a" * 1000}, "field 'kind' is not a message kind"),
        ({"kind": ""}, "field 'kind' is not a message kind"),
        ({"kind": 5}, "field 'kind' should be str"),
        ({"kind": ["backend.get"]}, "field 'kind' should be str"),
        ({}, "field 'kind' is missing"),
    ],
)  # fmt: skip
def test_a_message_that_does_not_fit_is_refused(fields: dict[str, Any], sentence: str, content_type: str) -> None:
    assert refusal(body(content_type, **fields), content_type).startswith(sentence)


@BOTH
@pytest.mark.parametrize(("tree", "name"), [(1, "int"), (None, ""), (True, "bool"), (1.5, "float"), ("text", "str")])
def test_a_body_that_is_no_map_is_refused(tree: Any, name: str, content_type: str) -> None:
    def write(each: Any) -> bytes:
        return pack(each) if content_type == MSGPACK else json.dumps(each).encode()

    assert refusal(write(tree), content_type).startswith(f"a message must be a map, not {name}")
    assert refusal(write([tree]), content_type).startswith(f"message 1 of 1: a message must be a map, not {name}")
    assert refusal(write([[]]), content_type) == "message 1 of 1: a message must be a map, not array"
    assert refusal(write([]), content_type) == "an array of messages is empty"


@BOTH
def test_one_bad_message_in_an_array_is_named_by_its_place(content_type: str) -> None:
    trees = [{"kind": "reply.missing"}, {"kind": "reply.lost"}, {}]
    data = pack(trees) if content_type == MSGPACK else json.dumps(trees).encode()
    assert refusal(data, content_type) == "message 2 of 3: unknown message kind 'reply.lost'"


GOOD = encode(Set("key", [1, "two", {"three": b"3"}], tags=("a",)))
GOOD_JSON = encode(Set("key", [1, "two", {"three": b"3"}], tags=("a",)), JSON)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_msgpack_body_cut_short_is_refused(length: int) -> None:
    assert "is truncated" in refusal(GOOD[:length])


@pytest.mark.parametrize("length", range(len(GOOD_JSON)))
def test_a_json_body_cut_short_is_refused(length: int) -> None:
    assert refusal(GOOD_JSON[:length], JSON) in {"the body is truncated", "the body is not JSON"}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (GOOD + b"\x00", "the body has trailing bytes"),
        (GOOD + GOOD, "the body has trailing bytes"),
        (GOOD + bytes(1000), "the body has trailing bytes"),
        (b"\xc1", "the body is not MessagePack"),
        (b"\x82\xa4kind\xabbackend.get\xa3key\xa2\xff\xfe", "a string is not UTF-8"),
        (b"\x82\xa4kind\xabbackend.get\xa3key\xa3\xed\xa0\x80", "a string is not UTF-8"),
        (body(MSGPACK, kind="reply.found", value=extension(5, b"secret")), "field 'value' of reply.found contains a msgspec.msgpack.Ext; "),
        (body(MSGPACK, kind="reply.found", value=[timestamp(1)]), "field 'value' of reply.found contains a datetime.datetime; "),
        (body(MSGPACK, kind="backend.get", key=timestamp(1)), "field 'key' should be str, not "),
        (body(MSGPACK, kind="backend.get", key=b"k"), "field 'key' should be str, not bytes"),
        (body(MSGPACK, kind="event.cache_evicted", key="k", cause=b"size"), "field 'cause' should be "),
        (body(MSGPACK, kind="reply.found", value={b"secret": 1}), "field 'value' of reply.found contains a dict with a key of type bytes"),
        (body(MSGPACK, kind="backend.set_many", items={b"secret": 1}), "field "),
        (body(MSGPACK, kind="reply.found", value={1: 1}), "field 'value' of reply.found contains a dict with a key of type int"),
        (b"\x81\x90\x01", "field "),
        (b"\xd6\xff" + bytes(4), "a message must be a map, not "),
        (b"\xc7\x05\xff12345", "a message must be a map, not "),
        (b"\x91" * 100_000, "the body is nested too deeply"),
        (b"\x82\xa4kind\xabreply.found\xa5value" + b"\x91" * 100_000, "the body is nested too deeply"),
    ],
)  # fmt: skip
def test_msgpack_that_is_no_message_is_refused(data: bytes, sentence: str) -> None:
    found = refusal(data)
    assert found.startswith(sentence)
    assert "secret" not in found


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (GOOD_JSON + b"{}", "the body has trailing bytes"),
        (b"\xef\xbb\xbf" + GOOD_JSON, "the body is not JSON"),
        (GOOD_JSON.decode().encode("utf-16"), "the body is not JSON"),
        (b'{"kind":"backend.get","key":"\xff"}', "a string is not UTF-8"),
        (b'{"kind":"backend.get","key":"\xed\xa0\x80"}', "a string is not UTF-8"),
        (b'{"kind":"backend.get","key":"\\ud800"}', "the body "),
        (b'{"kind":"reply.found","value":{"\\uDFFF":1}}', "the body "),
        (b'{"kind":"reply.found","value":NaN}', "the body is not JSON"),
        (b'{"kind":"reply.found","value":[-Infinity]}', "the body is not JSON"),
        (b'{"kind":"reply.found","value":1e400}', "field 'value' has an invalid value"),
        (b'{"kind":"reply.found","value":18446744073709551616}', "field 'value' of reply.found contains an int of more than 64 bits"),
        (b'{"kind":"backend.increment","key":"k","delta":18446744073709551616}', "field 'delta' of backend.increment contains an int of more than 64 bits"),
        (b'{"kind":"reply.found","value":' + b"1" * 5000 + b"}", "field 'value' has an invalid value"),
        (b'{"kind":"reply.found","value":{"$base64":"secret!"}}', "field 'value' of reply.found contains a $base64 that is not valid base64"),
        (b'{"kind":"reply.found","value":{"$base64":"\xc3\xbc"}}', "field 'value' of reply.found contains a $base64 that is not valid base64"),
        (b'{"kind":"reply.found","value":[{"$base64":5}]}', "field 'value' of reply.found contains a $base64 of type int"),
        (b"[" * 100_000, "the body "),
        (b'{"a":' * 100_000, "the body "),
        (b"", "the body is truncated"),
        (b"{'v':1}", "the body is not JSON"),
        (GOOD, "the body is not JSON"),
    ],
)  # fmt: skip
def test_json_that_is_no_message_is_refused(data: bytes, sentence: str) -> None:
    found = refusal(data, JSON)
    assert found.startswith(sentence)
    assert "secret" not in found


def test_a_surrogate_pair_and_an_escaped_backslash_are_no_half_surrogates() -> None:
    data = b'{"kind":"backend.get","key":"\\ud83d\\ude00 \\\\ud800"}'
    assert decode(data, JSON) == Get("\U0001f600 \\ud800")


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xdb", b"\xc6"])
def test_a_length_that_the_body_does_not_have_makes_no_room(head: bytes) -> None:
    size = 200_000
    claims = [
        (head + (2**32 - 1).to_bytes(4, "big")).ljust(size, b"\xc0"),
        ((head + (size // 2 - 1).to_bytes(4, "big")) * 900).ljust(size, b"\xc0"),
    ]
    refusal(claims[0])  # Creates the objects that are made only once.
    tracemalloc.start()
    try:
        for data in claims:
            refusal(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * size  # Room for copies of the body and its parts, but not for its claimed size.
