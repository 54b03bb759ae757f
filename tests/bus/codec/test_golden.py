"""Golden files: the bytes of every message kind, which all later versions must read.

After adding a kind, run `python -m tests.golden.write`. If one of these tests fails, do not change the golden file:
deployments that run two versions at once would break.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest

from cachebus.bus.codec.messages import JSON, MSGPACK, decode, encode

from ...golden.examples import FOLDER, KINDS, SUFFIXES, example
from ...golden.write import write

TYPES = {suffix: content_type for content_type, suffix in SUFFIXES.items()}
FILES = sorted(FOLDER.iterdir())

unpack: Any = msgpack.unpackb  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
pack: Any = msgpack.packb  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def read(data: bytes, content_type: str) -> Any:
    return unpack(data) if content_type == MSGPACK else json.loads(data)


def without_what_was_added(tree: Any, older: Any) -> Any:
    """Return the tree without the fields that the older one lacks, at every depth."""
    if isinstance(older, dict):
        fields: dict[str, Any] = older  # pyright: ignore[reportUnknownVariableType]
        return {name: without_what_was_added(tree[name], each) for name, each in fields.items()}
    if isinstance(older, list):
        elements: list[Any] = older  # pyright: ignore[reportUnknownVariableType]
        return [without_what_was_added(*both) for both in zip(tree, elements, strict=True)]
    return tree


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_has_golden_files(kind: str) -> None:
    missing = [f"{kind}{suffix}" for suffix in SUFFIXES.values() if not (FOLDER / f"{kind}{suffix}").exists()]
    assert missing == [], "run python -m tests.golden.write and commit the new files"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_golden_file_says_what_it_always_said(file: Path) -> None:
    content_type, data = TYPES[file.suffix], file.read_bytes()
    assert file.stem in KINDS, f"{file.stem} was a message kind once, and must stay readable"
    fields: dict[str, Any] = read(data, content_type)
    assert next(iter(fields)) == "kind"
    assert fields.pop("kind") == file.stem

    expected = example(KINDS[file.stem], fields)
    decoded = decode(data, content_type)
    assert decoded == expected
    assert repr(decoded) == repr(expected)  # `==` does not distinguish 1 from True.
    assert all(hasattr(decoded, name) for name in fields), "a published field must not be removed"

    now = encode(expected, content_type)
    if now != data:  # Only added fields may differ.
        tree = read(now, content_type)
        now_fields = without_what_was_added(tree, read(data, content_type))
        assert list(tree) != list(now_fields)
        now = pack(now_fields) if content_type == MSGPACK else _json(now_fields)
    assert now == data


def _json(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()


def test_a_kind_reads_what_was_written_before_a_field_was_added() -> None:
    """Decode a message without its last field, as written by an older version."""
    older = read((FOLDER / "event.load_failed.msgpack").read_bytes(), MSGPACK)
    del older["duration"]
    decoded = decode(pack(older))
    assert decoded == example(KINDS["event.load_failed"], older)
    assert without_what_was_added(read(encode(decoded), MSGPACK), older) == older


def test_the_script_writes_what_is_missing_and_nothing_else(golden_elsewhere: Path) -> None:
    kept = golden_elsewhere / "backend.get.json"
    kept.write_bytes(b"old")
    written = write()
    assert kept.read_bytes() == b"old"
    assert sorted([*written, kept.name]) == sorted(f"{kind}{suffix}" for kind in KINDS for suffix in TYPES)
    assert write() == []


@pytest.fixture
def golden_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tests.golden.write.FOLDER", tmp_path)
    return tmp_path


def test_both_forms_of_a_kind_say_the_same() -> None:
    for kind in KINDS:
        both = [decode((FOLDER / f"{kind}{suffix}").read_bytes(), TYPES[suffix]) for suffix in TYPES]
        assert repr(both[0]) == repr(both[1])
        assert {MSGPACK, JSON} == set(SUFFIXES)
