"""Values in stores of bytes: what anyone may have written there is read within bounds."""

from __future__ import annotations

import tracemalloc

import pytest

from cachebus.adapters.common.encoding import decode_form, encode_form, unpack_plain
from cachebus.messages import CacheSerializationError

CLAIMS = {
    "arrays in arrays": b"\xdc\xff\xff" * 22_000,
    "one array of four thousand million": b"\xdd\xff\xff\xff\xff" * 10_000,
    "maps in arrays": b"\xdc\xff\xff\xdf\x00\xff\xff\xff" * 8_000,
    "a string that is not there": b"\xdb\xff\xff\xff\xff",
}


@pytest.mark.parametrize("packed", CLAIMS.values(), ids=CLAIMS)
def test_what_msgpack_only_claims_takes_no_memory(packed: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CacheSerializationError):
            decode_form(ord("M"), packed)
        with pytest.raises((ValueError, CacheSerializationError)):
            unpack_plain(packed)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 16 << 20


@pytest.mark.parametrize(
    "value", [list(range(5_000)), [[0] * 3_000] * 3, {str(n): [n] for n in range(3_000)}, "x" * 100_000, [[], {}], 1.5]
)
def test_large_values_come_back_as_they_went(value: object) -> None:
    encoded = encode_form(value)
    assert decode_form(encoded[0], encoded[1:]) == value


def test_nesting_has_a_bound() -> None:
    with pytest.raises(CacheSerializationError):
        decode_form(ord("M"), b"\x91" * 100_000 + b"\x00")
