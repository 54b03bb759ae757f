"""Fuzzing: for any bytes, `decode` returns messages or raises `BadMessage`. Decoded messages can be encoded again."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachebus.bus.codec.messages import JSON, MSGPACK, decode, encode
from cachebus.messages import WIRE_NAMES, BadMessage

from ...golden.examples import example as golden_example
from ..strategies import any_message, values

PAYLOADS = int(os.environ.get("CACHEBUS_FUZZ", "20000")) // 2  # For each content type.
BOTH = pytest.mark.parametrize("content_type", [MSGPACK, JSON])

pack: Any = msgpack.packb  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
unpack: Any = msgpack.unpackb  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
extension: Any = msgpack.ExtType
timestamp: Any = msgpack.Timestamp


def survives(data: bytes, content_type: str) -> bool:
    """Return `True` if the bytes are a message. Any error other than `BadMessage` reaches the test."""
    try:
        decoded = decode(data, content_type)
    except BadMessage:
        return False
    encode(decoded, content_type)
    return True


class Spoiler:
    """Seeded generator of random damage to bytes and to trees."""

    def __init__(self, seed: int, content_type: str) -> None:
        self.random = random.Random(seed)
        self.content_type = content_type
        self.seeds = [encode(golden_example(cls), content_type) for cls in WIRE_NAMES.values()]
        self.trees = [self.read(data) for data in self.seeds]

    def read(self, data: bytes) -> Any:
        return unpack(data) if self.content_type == MSGPACK else json.loads(data)

    def write(self, tree: Any) -> bytes:
        return pack(tree) if self.content_type == MSGPACK else json.dumps(tree).encode()

    def payload(self) -> bytes:
        make = self.random.choice([self.noise, self.damaged, self.damaged, self.spliced, self.other_tree])
        return make()

    def noise(self) -> bytes:
        if self.content_type == JSON and self.random.random() < 0.8:
            return bytes(self.random.choices(b'{}[]",:\\u019deE+-.tfn $', k=self.random.randrange(40)))
        return self.random.randbytes(self.random.randrange(60))

    def damaged(self) -> bytes:
        data = bytearray(self.random.choice(self.seeds))
        for _ in range(self.random.randrange(1, 5)):
            at = self.random.randrange(len(data) + 1)
            match self.random.randrange(5):
                case 0 if at < len(data):
                    data[at] ^= 1 << self.random.randrange(8)
                case 1 if at < len(data):
                    data[at] = self.random.choice(b"\x00\x7f\x80\x90\xa0\xc0\xc1\xc4\xc7\xcf\xd6\xd9\xdb\xdd\xdf\xff")
                case 2:
                    data[at:at] = self.random.randbytes(self.random.randrange(1, 6))
                case 3:
                    del data[at : at + self.random.randrange(8)]
                case _:
                    del data[at:]
        return bytes(data)

    def spliced(self) -> bytes:
        first, second = self.random.choices(self.seeds, k=2)
        return first[: self.random.randrange(len(first))] + second[self.random.randrange(len(second)) :]

    def other_tree(self) -> bytes:
        tree = self.spoil(self.random.choice(self.trees))
        return self.write([tree] * self.random.randrange(3) if self.random.random() < 0.2 else tree)

    def spoil(self, tree: Any) -> Any:
        if self.random.random() < 0.08:
            return self.thing()
        if isinstance(tree, dict):
            fields: dict[Any, Any] = tree  # pyright: ignore[reportUnknownVariableType]
            spoilt = {name: self.spoil(each) for name, each in fields.items()}
            if self.random.random() < 0.2:
                spoilt.pop(self.random.choice(["key", "kind", "value", "tags"]), None)
            if self.random.random() < 0.1:
                names: list[Any] = [1, None, "", "$base64", "more"]
                names += [] if self.content_type == JSON else [b"kind", b"\xff"]
                spoilt[self.random.choice(names)] = self.thing()
            return spoilt
        if isinstance(tree, list):
            elements: list[Any] = tree  # pyright: ignore[reportUnknownVariableType]
            return [self.spoil(each) for each in elements]
        return tree

    def thing(self) -> Any:
        things: list[Any] = [
            None,
            True,
            0,
            -1,
            2,
            2**63,
            2**64 - 1,
            1.5,
            1e308,
            "",
            "default",
            "size",
            "\x00",
            [],
            {},
            [[]],
        ]
        things += [{"$base64": "AA"}, {"$base64": {}}, {"": None}, ["a", 1], {"a": {"value": 1}}, "backend.get"]
        if self.content_type == JSON:
            things += [2**64, 10**30, float("nan"), float("inf"), "\ud800", {"$$base64": {"$base64": 5}}]
        else:
            things += [b"", b"\xff", extension(3, b"x"), timestamp(1), float("nan"), {b"a": 1}, {1: 1}, [b"a"]]
        return self.random.choice(things)


@BOTH
def test_nothing_but_bad_message_escapes_seeded_garbage(content_type: str) -> None:
    spoiler = Spoiler(20_240_229, content_type)
    fine = sum(survives(spoiler.payload(), content_type) for _ in range(PAYLOADS))
    assert (
        PAYLOADS / 100 < fine < PAYLOADS / 2
    )  # Some damaged payloads must still decode, so that the damage reaches past the first byte.


@BOTH
def test_nothing_but_bad_message_escapes_any_bytes(content_type: str) -> None:
    @settings(max_examples=300)
    @given(st.binary(max_size=200))
    @example(b"\xc1")
    def check(data: bytes) -> None:
        survives(data, content_type)

    check()


@BOTH
def test_nothing_but_bad_message_escapes_any_fields_under_a_real_kind(content_type: str) -> None:
    @settings(max_examples=150)
    @given(any_message(content_type), st.data())
    def check(message: Any, data: st.DataObject) -> None:
        tree = unpack(encode(message)) if content_type == MSGPACK else json.loads(encode(message, JSON))
        name = data.draw(st.sampled_from(sorted(tree)))
        other = data.draw(values(content_type))
        tree[name] = other
        written = pack(tree) if content_type == MSGPACK else json.dumps(tree, default=str).encode()
        survives(written, content_type)

    check()
