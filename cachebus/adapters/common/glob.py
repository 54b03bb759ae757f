"""Glob patterns over keys, with the same meaning in every store."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

_STARS_MAX = 6
_SPECIAL = "*?[]\\^-"
_TOKEN = re.compile(r"([*?])|\[((?:\\.|[^]\\])*)\]|\\?(.)", re.DOTALL)


@functools.lru_cache(maxsize=256)
def compile_glob(pattern: str) -> re.Pattern[str]:
    r"""Return a regular expression that matches the same whole keys as a glob.

    The syntax is that of Redis. `*` matches any run of characters, `?` any character, and `[abc]`, `[a-z]` and `[^abc]`
    one character of a set. `\` escapes the next character. An unclosed set and a `\` at the end are literal text.
    """
    # The parts between two stars. Each matches a fixed number of characters.
    runs: list[str] = [""]
    for kind, text in _tokens(pattern):
        if kind != "*":
            runs[-1] += "." if kind == "?" else _set(text) if kind == "[" else re.escape(text)
        elif len(runs) == 1 or runs[-1]:
            runs.append("")
    first, *between = runs
    if not between:
        return re.compile(first, re.DOTALL)
    # Atomic groups try only the leftmost match of each run. With backtracking, n stars would take time O(length^n).
    atomic = "".join(f"(?>.*?{each})" for each in between[:-1])
    return re.compile(f"{first}{atomic}.*{between[-1]}", re.DOTALL)


def widen(pattern: str) -> str:
    r"""Return a glob of only literal text and a few `*` that matches at least the keys that `pattern` matches.

    It is for servers that interpret globs differently, or that are slow if a glob has many stars.
    """
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
    """Yield the kind and the text of each part:

    `*`, `?`, `[` with the body of a set, or an empty kind for a literal.
    """
    for match in _TOKEN.finditer(pattern):
        wildcard, body, literal = match.groups()
        yield ("", literal) if literal else (wildcard, "") if wildcard else ("[", body)


def _set(body: str) -> str:
    """Return the regular expression for the body of a set."""
    # A member is a plain or escaped character, or a range between two of them.
    negated = body.startswith("^")
    ranges = re.findall(r"(\\.|.)(?:-(\\.|.))?", body[negated:], re.DOTALL)
    members = [sorted(each[-1] for each in pair if each) for pair in ranges]
    if not members:
        return "." if negated else "(?!)"
    return f"[{'^' if negated else ''}{''.join('-'.join(map(re.escape, each)) for each in members)}]"
