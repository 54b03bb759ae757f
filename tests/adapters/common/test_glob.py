"""Patterns over keys, against a slow matcher that does what the documentation says, character by character."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachebus import escape_pattern
from cachebus.adapters.common.glob import compile_glob


def matches(pattern: str, key: str) -> bool:
    return compile_glob(pattern).fullmatch(key) is not None


def slowly(pattern: str, key: str) -> bool:
    """Whether `pattern` matches the whole of `key`, by trying every way."""
    if not pattern:
        return not key
    head, rest = pattern[0], pattern[1:]
    if head == "*":
        return any(slowly(rest, key[taken:]) for taken in range(len(key) + 1))
    if head == "[" and (end := closing(rest)) is not None:
        return bool(key) and one_of(rest[:end], key[0]) and slowly(rest[end + 1 :], key[1:])
    if head == "?":
        return bool(key) and slowly(rest, key[1:])
    if head == "\\" and rest:
        head, rest = rest[0], rest[1:]
    return key[:1] == head and slowly(rest, key[1:])


def closing(rest: str) -> int | None:
    position = 0
    while position < len(rest):
        if rest[position] == "]":
            return position
        position += 2 if rest[position] == "\\" else 1
    return None


def one_of(body: str, character: str) -> bool:
    negated = body.startswith("^")
    rest = iter(body[negated:])
    # Characters, each with whether a backslash stood before it.
    members = [(next(rest), True) if each == "\\" else (each, False) for each in rest]
    found = False
    position = 0
    while position < len(members):
        low = members[position][0]
        if position + 2 < len(members) and members[position + 1] == ("-", False):
            high = members[position + 2][0]
            found = found or min(low, high) <= character <= max(low, high)
            position += 3
        else:
            found = found or character == low
            position += 1
    return found != negated


@given(pattern=st.text(r"ab*?[]^-\é", max_size=9), key=st.text(r"ab*?[]^-\é", max_size=7))
@example(pattern="[]a]", key="a]")
@example(pattern="[^]", key="a")
@example(pattern="[a", key="[a")
@example(pattern="\\", key="\\")
@example(pattern="[b-a]", key="a")
@example(pattern="[a-]", key="-")
@example(pattern="[\\]]", key="]")
@example(pattern="*a*", key="bab")
def test_a_pattern_matches_what_the_slow_matcher_says(pattern: str, key: str) -> None:
    assert matches(pattern, key) == slowly(pattern, key)


@given(pattern=st.text("ab*?", max_size=12), key=st.text("ab", max_size=12))
def test_stars_find_a_way_if_there_is_one(pattern: str, key: str) -> None:
    assert matches(pattern, key) == slowly(pattern, key)


@given(pattern=st.text(max_size=20), key=st.text(max_size=20))
def test_any_text_is_a_pattern(pattern: str, key: str) -> None:
    assert matches(pattern, key) in (True, False)


@given(text=st.text(max_size=30), other=st.text(max_size=30))
def test_an_escaped_text_matches_itself_and_nothing_else(text: str, other: str) -> None:
    assert matches(escape_pattern(text), text)
    assert matches(escape_pattern(text), other) == (text == other)


@given(user=st.text(r"a*?[]^-\:", max_size=8), key=st.text(r"a*?[]^-\:", max_size=12))
def test_foreign_text_in_a_pattern_stays_in_its_place(user: str, key: str) -> None:
    assert matches(f"user:{escape_pattern(user)}:*", key) == key.startswith(f"user:{user}:")


@pytest.mark.parametrize(
    ("pattern", "keys", "others"),
    [
        ("user:*", ["user:", "user:1", "user:1\n2"], ["use", "xuser:1"]),
        ("h?llo", ["hello", "h\nllo"], ["hllo", "heello"]),
        ("h[ae]llo", ["hello", "hallo"], ["hillo", "h[ae]llo"]),
        ("h[^e]llo", ["hallo", "hbllo"], ["hello", "hllo"]),
        ("h[a-b]llo", ["hallo", "hbllo"], ["hcllo", "h-llo"]),
        ("h[b-a]llo", ["hallo", "hbllo"], ["hcllo"]),
        ("h[a\\-c]llo", ["hallo", "h-llo", "hcllo"], ["hbllo"]),
        (r"\*", ["*"], ["a", r"\*"]),
        (r"a\\b", ["a\\b"], ["a\\\\b"]),
        ("[", ["["], ["", "a"]),
        ("a[bc", ["a[bc"], ["ab"]),
        ("[]", [], ["", "[]", "a"]),
        ("[^]", ["a", "]"], ["", "ab"]),
        ("a\\", ["a\\"], ["a"]),
        ("**", ["", "abc"], []),
        ("A", ["A"], ["a"]),
        ("a.c|(d)+$", ["a.c|(d)+$"], ["abc", "a.c"]),
        ("[a--]", ["a", "-", "."], ["b"]),
        ("[&&~~||]", ["&", "~", "|"], ["a"]),
        ("[[a]", ["[", "a"], ["[a"]),
        ("ключ:?", ["ключ:1", "ключ:ж"], ["ключ:"]),
    ],
)
def test_the_documented_patterns_match_what_redis_matches(pattern: str, keys: list[str], others: list[str]) -> None:
    assert [key for key in keys if not matches(pattern, key)] == []
    assert [key for key in others if matches(pattern, key)] == []


# A matcher that tries every place of every star again needs longer than the age of the universe for each of these; if
# that comes back, the suite's own time limit ends it.
@pytest.mark.parametrize(
    ("pattern", "key"),
    [
        ("a*" * 40 + "b", "a" * 5_000),
        ("*a" * 40 + "*b", "a" * 5_000),
        ("*" * 5_000 + "b", "a" * 5_000),
        ("*?" * 60 + "[b]", "a" * 5_000),
        ("*[a-c]" * 60 + "d", "abc" * 2_000),
    ],
    ids=["a*a*a*b", "*a*a*b", "***b", "*?*?b", "*[a-c]d"],
)
def test_no_pattern_makes_the_matcher_try_for_ever(pattern: str, key: str) -> None:
    assert not matches(pattern, key)
    assert matches(pattern, key + pattern[-1]) or pattern.endswith("]")


def test_no_run_between_two_stars_is_looked_for_twice() -> None:
    assert compile_glob("a*b*c*d").pattern == re.compile(r"a(?>.*?b)(?>.*?c).*d").pattern


def test_compiled_patterns_are_kept_up_to_a_bound() -> None:
    assert compile_glob.cache_parameters()["maxsize"] == 256
    assert compile_glob("kept:*") is compile_glob("kept:*")
