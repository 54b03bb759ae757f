"""Patterns over keys: the glob that every store understands alike."""

from __future__ import annotations

import functools
import re

_STARS_MAX = 6
_SPECIAL = "*?[]\\^-"


@functools.lru_cache(maxsize=256)
def compile_glob(pattern: str) -> re.Pattern[str]:
    r"""A regular expression that matches the whole keys that a glob matches.

    `*` is any run of characters, `?` any one, `[abc]`, `[a-z]` and `[^abc]` one of a set; `\` takes the next character
    as it stands, inside a set too. These are the globs of Redis. A set that is not closed, and a `\` at the end, stand
    for themselves.
    """
    # What stands between two stars, of which each matches as many characters as it has elements.
    runs: list[str] = [""]
    position = 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if character == "*":
            if len(runs) == 1 or runs[-1]:
                runs.append("")
        elif character == "?":
            runs[-1] += "."
        elif character == "[" and (end := _set_end(pattern, position)) is not None:
            runs[-1] += _set(pattern[position:end])
            position = end + 1
        elif character == "\\" and position < len(pattern):
            runs[-1] += re.escape(pattern[position])
            position += 1
        else:
            runs[-1] += re.escape(character)
    first, *between = runs
    if not between:
        return re.compile(first, re.DOTALL)
    # The leftmost place for each run is as good as any other, so none is looked for again: an atomic group. Without it
    # a pattern of n stars takes time in the n-th power of the key's length.
    atomic = "".join(f"(?>.*?{each})" for each in between[:-1])
    return re.compile(f"{first}{atomic}.*{between[-1]}", re.DOTALL)


def widen(pattern: str) -> str:
    r"""A glob of literal text and a few `*` only, that matches at least what `pattern` does: for a server that reads
    globs in a way of its own, or slowly where there are many stars."""
    pieces = [""]
    position = 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        end = _set_end(pattern, position) if character == "[" else None
        if character in "*?" or end is not None:
            if len(pieces) > _STARS_MAX:
                pieces[-1] = ""
                break
            if len(pieces) == 1 or pieces[-1]:
                pieces.append("")
            position = position if end is None else end + 1
            continue
        if character == "\\" and position < len(pattern):
            character = pattern[position]
            position += 1
        pieces[-1] += f"\\{character}" if character in _SPECIAL else character
    return "*".join(pieces)


def _set_end(pattern: str, start: int) -> int | None:
    """Where the set that begins at `start` closes."""
    position = start
    while position < len(pattern):
        if pattern[position] == "]":
            return position
        position += 2 if pattern[position] == "\\" else 1
    return None


def _set(body: str) -> str:
    negated = body.startswith("^")
    members: list[str] = []
    position = int(negated)
    while position < len(body):
        low, position = _member(body, position)
        if body[position : position + 1] == "-" and position + 1 < len(body):
            high, position = _member(body, position + 1)
            low, high = sorted((low, high))
            members.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            members.append(re.escape(low))
    if not members:
        return "." if negated else "(?!)"
    return f"[{'^' if negated else ''}{''.join(members)}]"


def _member(body: str, position: int) -> tuple[str, int]:
    if body[position] == "\\" and position + 1 < len(body):
        position += 1
    return body[position], position + 1
