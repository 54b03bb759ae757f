"""Random and mutated payloads: decoding returns a value or raises `CacheSerializationError`.

It never executes code, and its memory is bounded. `make fuzz` tries a million payloads:
`CACHEBUS_FUZZ=1000000 python -m pytest tests/payload/test_fuzz.py --timeout 0`.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import tracemalloc
import zlib
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pandas as pd
import pytest

from cachebus.messages import CacheSerializationError
from cachebus.payload.pipeline import PayloadPipeline

from .pipelines import COMPRESSIONS, EXAMPLE, SERIALIZERS, Color, Point, combinations, pipeline

COUNT = int(os.environ.get("CACHEBUS_FUZZ", "50000"))
LIMIT = 2**16
SEED = 5


def readers() -> list[PayloadPipeline]:
    return [
        pipeline(name, "signed" if name == "pickle" else "none", max_size=LIMIT, types=[Point, Color])
        for name in (*SERIALIZERS, "arrow")
    ] + [pipeline("msgpack", protection, max_size=LIMIT) for protection in ("checksum", "signed", "sealed")]


def seeds() -> list[bytes]:
    made = [
        pipeline(serializer, protection, compression=compression, threshold=0).encode("k", EXAMPLE)
        for serializer, compression, protection in combinations()
    ]
    auto = pipeline("auto", types=[Point, Color])
    made += [auto.encode("k", value) for value in (Point(1, Color.RED), np.arange(9).reshape(3, 3), [np.float64(1)])]
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"], "c": pd.Categorical(["p", "q"])})
    return [*made, auto.encode("k", frame), pipeline("arrow").encode("k", frame)]


def mutated(chance: random.Random, payload: bytes) -> bytes:
    data = bytearray(payload)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(data):
                data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xC1, 0xC7, 0xDD, 0xDF, 0xFF))
            case 2:
                del data[at : at + chance.choice((1, 2, 8, 100))]
            case 3:
                data[at:at] = chance.randbytes(chance.choice((1, 4, 32)))
            case 4:
                data[at : at + 4] = struct.pack(">I", chance.choice((0, 1, 0xFFFF, 2**31, 2**32 - 1)))
            case _:
                data[at:at] = data[: chance.randrange(64)]
    # Most keep a valid header, so that they reach the serializer.
    return bytes(data) if chance.random() < 0.3 else payload[:4] + bytes(data[4:])


def test_nothing_but_a_value_or_our_error_comes_out() -> None:
    chance = random.Random(SEED)
    reading, from_seeds = readers(), seeds()
    outcomes: dict[str, int] = {}
    for number in range(COUNT):
        if number % 4:
            payload = mutated(chance, chance.choice(from_seeds))
        else:
            header = bytes(
                (1, chance.choice(b"mjadp"), chance.choice(b"-zgls"), chance.choice((0, 0, 1, 2, 4, 6, 255)))
            )
            payload = header[: chance.choice((4, 4, 4, 2, 0))] + chance.randbytes(chance.randrange(80))
        # Mostly the reader with the serializer of the header, because the others refuse at once.
        fitting = [each for each in reading if payload[1:2] == bytes((each._code,))]
        made = chance.choice(fitting if fitting and chance.random() < 0.9 else reading)
        try:
            made.decode("k", payload)
            outcome = "read"
        except CacheSerializationError as error:
            outcome = error.reason
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    # Every outcome occurred.
    expected = {
        "read",
        "format",
        "serializer",
        "protection",
        "compression",
        "capacity",
        "content",
        "checksum",
        "signature",
        "seal",
    }
    assert outcomes.keys() == expected, outcomes


def test_no_mutated_payload_is_executed() -> None:
    """Count the audit events that mean execution of foreign code while payloads are decoded."""
    seen: list[str] = []
    watching = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in {
            "exec",
            "compile",
            "os.system",
            "subprocess.Popen",
            "pickle.find_class",
            "os.exec",
            "marshal.loads",
        }:
            seen.append(event)

    reading, from_seeds = readers(), seeds()
    for payload in from_seeds:  # One-time imports happen before the count.
        for made in reading:
            _read(made, payload)
    chance, whole = random.Random(SEED), set(from_seeds)
    sys.addaudithook(audit)
    try:
        for _ in range(5000):
            payload = mutated(chance, chance.choice(from_seeds))
            if payload in whole:  # Mutated back to the original: a valid signed pickle.
                continue
            for made in reading:
                _read(made, payload)
    finally:
        watching = False
    assert seen == []


def _read(made: PayloadPipeline, payload: bytes) -> Any:
    try:
        return made.decode("k", payload)
    except CacheSerializationError as error:
        return error.reason


def _packed(compression: str, size: int) -> bytes:
    """Return a payload of zeros with a matching header."""
    return pipeline(compression=compression, threshold=0, max_size=2**31).encode("k", bytes(size))


BOMBS: dict[str, bytes] = {
    **{f"{name} ratio": _packed(name, 20 * 2**20) for name in COMPRESSIONS if name != "none"},
    "a size that is not true": b"\x01mz\x00" + struct.pack(">I", 10) + zlib.compress(bytes(20 * 2**20)),
    "a gzip size that is not true": b"\x01mg\x00" + struct.pack(">I", 10) + zlib.compress(bytes(20 * 2**20), wbits=31),
    "a size of 4 GiB": b"\x01mz\x00\xff\xff\xff\xff" + zlib.compress(bytes(100)),
    "arrays that claim 2^32": b"\x01m-\x00" + b"\xdd\xff\xff\xff\xff" * 1000,
    "arrays that claim as many as there are bytes": b"\x01m-\x00" + b"\xdd\x00\x00\xea\x60" * 1000 + b"\x01" * 60_000,
    "maps that claim 2^32": b"\x01m-\x00" + b"\xdf\xff\xff\xff\xff" * 1000,
    "bytes that claim 2^32": b"\x01m-\x00\xc6\xff\xff\xff\xff",
    "an extension that claims 2^32": b"\x01m-\x00\xc9\xff\xff\xff\xff\x04",
    "depth": b"\x01m-\x00" + b"\x91" * 60_000,
    "depth of json": b"\x01j-\x00" + b"[" * 60_000,
    "depth of json tags": b"\x01j-\x00" + b'{"$tuple":[' * 500 + b"]}" * 500,
    "digits": b"\x01j-\x00" + b'{"$int":"' + b"f" * 60_000 + b'"}',
    "decimal digits": b"\x01m-\x00\xc9\x00\x00\xea\x60\x09" + b"9" * 60_000,
    "an array of numpy": b"\x01a-\x00" + msgpack.packb([msgpack.ExtType(32, b""), "<i8", "C", [2**40], b"x"]),
    "an empty array of numpy": b"\x01a-\x00" + msgpack.packb([msgpack.ExtType(32, b""), "<i8", "C", [0, 2**62], b""]),
    "a type of numpy without size": b"\x01a-\x00" + msgpack.packb([msgpack.ExtType(32, b""), "<U0", "C", [2**40], b""]),
}
"""Larger than the actual size."""


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_no_more_than_the_bound(name: str) -> None:
    payload = BOMBS[name]
    made = next(each for each in readers() if bytes((each._code,)) == payload[1:2])
    _read(made, payload)
    tracemalloc.start()
    try:
        _read(made, payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # msgpack allocates arrays in advance: up to 1024 levels of 1024 items of 8 bytes.
    assert peak < 8 * 2**20 + 4 * LIMIT + 2**16, f"{peak:,}"
