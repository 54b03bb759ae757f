"""The table in docs/payloads.md is correct, and no serializer changes a value silently."""

from __future__ import annotations

from .table import PAGE, table, with_table


def test_the_documented_table_is_what_the_serializers_do() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "python -m tests.payload.table"


def test_each_type_is_carried_exactly_or_refused() -> None:
    made = table()
    assert "CHANGED" not in made
    assert "lossless / error" not in made
    assert "error / lossless" not in made
