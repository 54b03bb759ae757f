"""`ARCHITECTURE.md` names a test for each guarantee, and each test exists."""

from __future__ import annotations

import ast
import re

from .paths import ROOT

PAGE = ROOT / "ARCHITECTURE.md"
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def _tests_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {
        each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }


def test_every_test_that_the_architecture_names_exists() -> None:
    references = REFERENCE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(references) >= 10
    missing = [
        f"{path}::{name}"
        for path, name in references
        if not (ROOT / path).is_file() or (name and name not in _tests_in(path))
    ]
    assert missing == []


def test_every_guarantee_names_a_test() -> None:
    table = PAGE.read_text(encoding="utf-8").split("| guarantee | proof |")[1].split("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert rows
    assert [row for row in rows if not REFERENCE.search(row)] == []
