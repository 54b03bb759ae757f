"""Public names: few, sorted, documented, and listed in ``docs/api.md``."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from .paths import ROOT

MOST = 45


def public_names(module: types.ModuleType) -> list[str]:
    return list(getattr(module, "__all__", ()))


def documented_names(page: Path) -> list[str]:
    """Return the names between the two markers. Each bullet begins with the name in backticks."""
    parts = re.split(r"<!-- names:(?:start|end) -->", page.read_text(encoding="utf-8"))
    assert len(parts) == 3, f"{page.name} needs exactly one pair of markers"
    bullets = [line for line in parts[1].splitlines() if line.startswith(("* ", "- "))]
    found = [re.match(r"[*-] `([A-Za-z_]\w*)", line) for line in bullets]
    assert all(found), f"a bullet in {page.name} does not begin with a name in backticks"
    return [match[1] for match in found if match]


def is_documented(name: str, value: object) -> bool:
    """Return `True` if ``value`` has its own docstring, or is a type alias, which cannot have one."""
    if typing.get_origin(value) is not None or isinstance(value, types.UnionType | typing.TypeVar):
        return True
    if type(value).__name__ == "TypeAliasType":
        return True
    if isinstance(value, type):
        # Ignores the docstring of a base class, and the signature that @dataclass writes if there is no docstring.
        text = value.__dict__.get("__doc__") or ""
        return bool(text.strip()) and not text.startswith(f"{name}(")
    if inspect.isroutine(value) or inspect.ismodule(value):
        return bool((value.__doc__ or "").strip())
    return type(value).__module__.split(".")[0] not in sys.stdlib_module_names and bool(type(value).__doc__)


def name_faults(module: types.ModuleType, page: Path, most: int = MOST) -> Iterator[str]:
    names = public_names(module)
    if not names:
        yield "there are no public names"
    if len(names) > most:
        yield f"{len(names)} names are more than {most}"
    if names != sorted(set(names)):
        yield "__all__ is not sorted, or names something twice"
    for name in names:
        if not hasattr(module, name):
            yield f"{name} cannot be imported"
        elif not is_documented(name, getattr(module, name)):
            yield f"{name} has no docstring"
    if names != documented_names(page):
        yield f"{page.name} lists other names: {sorted(set(names) ^ set(documented_names(page)))}"


def test_the_public_names_are_few_sorted_documented_and_listed() -> None:
    module = importlib.import_module("cachebus")
    assert module.__file__ == str(ROOT / "cachebus" / "__init__.py"), "cachebus was imported from another tree"
    assert list(name_faults(module, ROOT / "docs" / "api.md")) == []


PLANTED = '''
from dataclasses import dataclass
from typing import Literal

__all__ = ["Alias", "Good", "NoDoc", "Record", "absent", "function", "number"]

class Good:
    """A class."""

class NoDoc(Good):
    pass

@dataclass
class Record:
    x: int

def function():
    """A function."""

Alias = Literal["a", "b"]
number = 3
'''


def planted(text: str) -> types.ModuleType:
    module = types.ModuleType("planted")
    exec(compile(text, "planted", "exec", dont_inherit=True), module.__dict__)
    return module


def test_planted_faults_are_found(tmp_path: Path) -> None:
    page = tmp_path / "api.md"
    page.write_text(
        "<!-- names:start -->\n* `Alias`: one\n* `Good`\n- `NoDoc`\n* `Record`\n* `absent`\n* `function()`\n<!-- names:end -->\n"
    )
    assert list(name_faults(planted(PLANTED), page, most=6)) == [
        "7 names are more than 6",
        "NoDoc has no docstring",
        "Record has no docstring",
        "absent cannot be imported",
        "number has no docstring",
        "api.md lists other names: ['number']",
    ]


def test_no_names_unsorted_names_and_a_page_without_markers_are_found(tmp_path: Path) -> None:
    page = tmp_path / "api.md"
    page.write_text("<!-- names:start -->\n<!-- names:end -->\n")
    assert list(name_faults(planted(""), page)) == ["there are no public names"]
    unsorted = planted("__all__ = ['b', 'a']\ndef a():\n    'A.'\ndef b():\n    'B.'\n")
    assert "__all__ is not sorted, or names something twice" in list(name_faults(unsorted, page))
    page.write_text("* `a`\n")
    with pytest.raises(AssertionError, match="markers"):
        documented_names(page)
