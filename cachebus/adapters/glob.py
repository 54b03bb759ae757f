"""Patterns over keys: the glob that every store understands alike."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

_STARS_MAX = 6
_SPECIAL = "*?[]\\^-"


@functools.lru_cache(maxsize=256)
def compile_glob(pattern: str) -> re.Pattern[str]:
    r"""Return a regular expression that matches the whole keys that a glob matches.

    `*` is any run of characters, `?` any one, `[abc]`, `[a-z]` and `[^abc]` one of a set; `\` takes the next character
    as it stands, inside a set too. These are the globs of Redis. A set that is not closed, and a `\` at the end, stand
    for themselves.
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
    # The leftmost place for each run is as good as any other, so no other is tried: an atomic group. Without it a pattern
    # of n stars takes time in the n-th power of the key's length.
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
    position = 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if character in "*?":
            yield character, ""
        elif character == "[" and (end := _set_end(pattern, position)) is not None:
            yield character, pattern[position:end]
            position = end + 1
        elif character == "\\" and position < len(pattern):
            yield "", pattern[position]
            position += 1
        else:
            yield "", character


def _set_end(pattern: str, start: int) -> int | None:
    """Return where the set that begins at `start` closes."""
    position = start
    while position < len(pattern):
        if pattern[position] == "]":
            return position
        position += 2 if pattern[position] == "\\" else 1
    return None


def _set(body: str) -> str:
    """Return the body of a set as a regular expression."""
    # Each member is one character or an escaped one, alone or at both ends of a range.
    negated = body.startswith("^")
    ranges = re.findall(r"(\\.|.)(?:-(\\.|.))?", body[negated:], re.DOTALL)
    members = [sorted(each[-1] for each in pair if each) for pair in ranges]
    if not members:
        return "." if negated else "(?!)"
    return f"[{'^' if negated else ''}{''.join('-'.join(map(re.escape, each)) for each in members)}]"
