"""Patterns over keys: the glob that every store understands alike."""

from __future__ import annotations

import functools
import re


@functools.lru_cache(maxsize=256)
def compile_glob(pattern: str) -> re.Pattern[str]:
    r"""A regular expression that matches the whole keys that a glob matches.

    `*` is any run of characters, `?` any one, `[abc]`, `[a-z]` and `[^abc]` one of a set; `\` takes the next character
    as it stands, inside a set too. These are the globs of Redis. A set that is not closed, and a `\` at the end, stand
    for themselves.
    """
    out: list[str] = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if character == "*":
            if out[-1:] != [".*"]:  # Two stars in a row match the same and cost the square.
                out.append(".*")
        elif character == "?":
            out.append(".")
        elif character == "[" and (end := _set_end(pattern, position)) is not None:
            out.append(_set(pattern[position:end]))
            position = end + 1
        elif character == "\\" and position < len(pattern):
            out.append(re.escape(pattern[position]))
            position += 1
        else:
            out.append(re.escape(character))
    return re.compile("".join(out), re.DOTALL)


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
