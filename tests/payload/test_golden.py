"""Payloads of version 1 stay readable. `python -m tests.golden.write` adds missing golden files."""

from __future__ import annotations

import pytest

from cachebus.payload.cached_errors import CachedError

from ..golden.payloads import ERROR, ERRORS, FOLDER, golden_names, golden_pipeline
from .pipelines import EXAMPLE, same


@pytest.mark.parametrize("name", golden_names())
def test_a_golden_payload_is_still_read(name: str) -> None:
    payload = (FOLDER / f"{name}.bin").read_bytes()
    assert same(golden_pipeline(name).decode("golden", payload), EXAMPLE)


@pytest.mark.parametrize("name", ["msgpack-none-none", "json-none-none", "msgpack-none-checksum", "json-none-signed"])
def test_a_payload_is_still_written_as_the_golden_one(name: str) -> None:
    assert golden_pipeline(name).encode("golden", EXAMPLE) == (FOLDER / f"{name}.bin").read_bytes()


def test_every_golden_file_is_read() -> None:
    assert {file.stem for file in FOLDER.glob("*.bin")} == set(golden_names())


@pytest.mark.parametrize("name", golden_names())
def test_a_golden_exception_is_still_read(name: str) -> None:
    read = golden_pipeline(name).decode("golden", (ERRORS / f"{name}.bin").read_bytes())
    assert isinstance(read, CachedError)
    assert read.content == ERROR.content
    error = read.rebuilt((LookupError,))
    assert type(error) is LookupError
    assert error.args == ("no row", 7, None)
    assert vars(error) == {"hint": [1.5, {"a": True}]}
