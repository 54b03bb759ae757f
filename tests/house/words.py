"""Refuses a short list of words in docstrings, comments and documentation: `python -m tests.house.words`.

Each has a plain alternative: name the thing, or say "you" or "the caller". `CONTRIBUTING.md` says more about prose.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from .paths import ROOT

REFUSED = {
    "anew": "again",
    "everybody": "every caller, all",
    "nobody": "no caller, none",
    "somebody": "another caller, someone",
    "told": "notified, informed",
    "whoever": "the caller, the process that",
}
"""Words, and what to write instead."""

_WORD = re.compile(rf"(?<![\w`-])({'|'.join(REFUSED)})(?![\w`-])", re.IGNORECASE)
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`|\]\([^)]*\)", re.MULTILINE | re.DOTALL)


def pages(root: Path) -> list[Path]:
    """The prose of the repository: Markdown files, but for records of the past."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md"))]


def in_python(source: str) -> Iterator[tuple[int, str]]:
    """The lines and words that are refused in the comments and docstrings of a module, and in its messages."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from _found(token.string, token.start[0])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from _found(node.value, node.lineno)


def in_page(text: str) -> Iterator[tuple[int, str]]:
    """The lines and words that are refused in a page of Markdown, outside of code and links."""
    yield from _found(_CODE.sub(lambda code: re.sub(r"[^\n]", "-", code[0]), text), 1)


def _found(text: str, line: int) -> Iterator[tuple[int, str]]:
    for match in _WORD.finditer(text):
        yield line + text.count("\n", 0, match.start()), match[1]


def faults(root: Path) -> Iterator[str]:
    """Every refused word of the package and the pages of a repository, with its place."""
    for file in [*sorted((root / "cachebus").rglob("*.py")), *pages(root)]:
        text = file.read_text(encoding="utf-8")
        if file.name == "CHANGELOG.md":
            continue
        for line, word in in_python(text) if file.suffix == ".py" else in_page(text):
            yield f"{file.relative_to(root)}:{line}: {word}: write {REFUSED[word.lower()]}"


def main() -> int:
    """Print every fault, and return 1 if there is one."""
    found = list(faults(ROOT))
    print("\n".join(found) or "no refused words")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
