"""Patterns over keys: the glob that every store understands alike."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

_STARS_MAX = 6
_SPECIAL = "*?[]\\^-"
_TOKEN = re.compile(r"([*?])|\[((?:\\.|[^]\\])*)\]|\\?(.)", re.DOTALL)


@functools.lru_cache(maxsize=256)
def compile_glob(pattern: str) -> re.Pattern[str]:
    r"""Return a regular expression that matches the whole keys that a glob matches.

    These are the globs of Redis: `*` is any run of characters, `?` any one, `[abc]`, `[a-z]` and `[^abc]` one of a set; `\`
    takes the next character as it stands. A set that is not closed, and a `\` at the end, stand for themselves.
    """
    # What stands between two stars, of which each matches as many characters as it has elements.
    runs: list[str] = [""]
    for kind, text in _tokens(pattern):
        if kind != "*":
            runs[-1] += "." if kind == "?" else _set(text) if kind == "[" else re.escape(text)
        elif len(runs) == 1 or runs[-1]:
            runs.append("")
    first, *between = runs
    if not between:
        return re.compile(first, re.DOTALL)
    # An atomic group tries only the leftmost place of each run: others would take time in the n-th power for n stars.
    atomic = "".join(f"(?>.*?{each})" for each in between[:-1])
    return re.compile(f"{first}{atomic}.*{between[-1]}", re.DOTALL)


def widen(pattern: str) -> str:
    r"""Return a glob of literal text and a few `*` only, that matches at least what `pattern` does: for a server that reads
    globs in a way of its own, or slowly if they have many stars."""
    pieces = [""]
    for kind, text in _tokens(pattern):
        if kind == "":
            pieces[-1] += f"\\{text}" if text in _SPECIAL else text
        elif len(pieces) > _STARS_MAX:
            pieces[-1] = ""
            break
        elif len(pieces) == 1 or pieces[-1]:
            pieces.append("")
    return "*".join(pieces)


def _tokens(pattern: str) -> Iterator[tuple[str, str]]:
    """Yield the parts of a glob: `*` and `?`, `[` with the body of a set, and an empty kind with a literal character."""
    for match in _TOKEN.finditer(pattern):
        wildcard, body, literal = match.groups()
        yield ("", literal) if literal else (wildcard, "") if wildcard else ("[", body)


def _set(body: str) -> str:
    """Return the body of a set as a regular expression."""
    # Each member is one character or an escaped one, alone or at both ends of a range.
    negated = body.startswith("^")
    ranges = re.findall(r"(\\.|.)(?:-(\\.|.))?", body[negated:], re.DOTALL)
    members = [sorted(each[-1] for each in pair if each) for pair in ranges]
    if not members:
        return "." if negated else "(?!)"
    return f"[{'^' if negated else ''}{''.join('-'.join(map(re.escape, each)) for each in members)}]"
