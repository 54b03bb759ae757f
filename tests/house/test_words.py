"""The check of words finds what it should, and only that."""

from __future__ import annotations

from pathlib import Path

from .words import faults, in_page, in_python


def test_words_are_found_in_comments_docstrings_and_messages() -> None:
    source = (
        '"""Told apart."""\n\nx = 1  # for nobody\n\n\ndef nobody() -> str:\n    return "loaded anew by whoever asks"\n'
    )
    assert list(in_python(source)) == [(3, "nobody"), (1, "Told"), (7, "anew"), (7, "whoever")]


def test_names_and_code_are_not_prose() -> None:
    assert list(in_python('told = "told"\nnobody_waits = told\n')) == []
    assert list(in_page("`told`, [a page](nobody.md), retold\n\n```python\ntold = 1\n```\n")) == []


def test_the_line_of_a_word_is_right() -> None:
    assert list(in_page("# One\n\n```\nx\n```\n\nSomebody waits.\n")) == [(7, "Somebody")]


def test_every_fault_names_its_place_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "cachebus").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "cachebus" / "a.py").write_text("# for whoever\n")
    (tmp_path / "docs" / "a.md").write_text("Nobody waits.\n")
    (tmp_path / "CHANGELOG.md").write_text("Callers are told.\n")
    assert list(faults(tmp_path)) == [
        "cachebus/a.py:1: whoever: write the caller, the process that",
        "docs/a.md:1: Nobody: write no caller, none",
    ]
