"""Addresses: who a request is for."""

from __future__ import annotations

import re
from typing import Self

_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_word(text: object, what: str) -> str:
    """Return `text` if it is one word of letters, digits, `_` and `-`, at most 64 of them.

    Namespaces, backend names and the words of an address come through here, so that none can ever be read as
    part of a subject's syntax. Raises `ValueError` that names `what`.
    """
    if not isinstance(text, str) or not _WORD.fullmatch(text):
        raise ValueError(f"{what} {text!r} is not 1 to 64 letters, digits, '_' or '-'")
    return text


class Address(str):
    """The name of an actor: checked words joined by dots, such as `backend.primary`.

    Raises `ValueError` for anything else: empty words, wildcards, blanks, line breaks.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise ValueError(f"address {text!r} is not words joined by dots")
        for word in text.split("."):
            check_word(word, f"word of the address {text!r},")
        return super().__new__(cls, text)
