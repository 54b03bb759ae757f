"""Addresses of actors, and the NATS subjects derived from them.

* `cachebus.v1.<namespace>.req.<address>` carries requests to an actor.
* `cachebus.v1.<namespace>.evt.<kind>.<backend>` carries events.
* `cachebus.v1.<namespace>.own.<address>` carries claims, by which processes agree on the one that serves an address.

Every word is validated, so it cannot contain a wildcard, a separator or a line of the protocol. A key is never part
of a subject.
"""

from __future__ import annotations

import re
from typing import Self

from cachebus.messages import Event

ROOT = "cachebus."  # Prefix of the subjects of every wire version.
NO_BACKEND = "_"  # Takes the place of the backend in the subject of an event that has none.
MAX_SUBJECT_LENGTH = 1024  # A server accepts lines of 4,096 characters, which also hold a second subject and sizes.

_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_word(text: object, what: str) -> str:
    """Return `text` if it consists of 1 to 64 letters, digits, `_` and `-`.

    Namespaces, backend names and the words of an address are checked here. Raises `ValueError`, which names `what`.
    """
    if not isinstance(text, str) or not _WORD.fullmatch(text):
        raise ValueError(f"{what} {text!r} is not 1 to 64 letters, digits, '_' or '-'")
    return text


class Address(str):
    """The name of an actor: words joined by dots, such as `backend.primary`.

    Raises `ValueError` for empty words, wildcards, blanks, line breaks and other characters.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise ValueError(f"address {text!r} is not a string of words joined by dots")
        for word in text.split("."):
            check_word(word, f"word of the address {text!r},")
        return super().__new__(cls, text)


class Subjects:
    """The subjects of one namespace. Raises `ValueError` if a namespace, an address or a backend name is not valid."""

    __slots__ = ("_root", "event_prefix", "namespace")

    def __init__(self, namespace: str) -> None:
        self.namespace = check_word(namespace, "namespace")
        self._root = f"{ROOT}v1.{self.namespace}"
        self.event_prefix = f"{self._root}.evt."

    def request(self, address: str) -> str:
        """Return the subject of requests to the actor at `address`."""
        return _short(f"{self._root}.req.{Address(address)}")

    def owner(self, address: str) -> str:
        """Return the subject for claims to `address`."""
        return _short(f"{self._root}.own.{Address(address)}")

    def event(self, kind: type[Event], backend: str) -> str:
        """Return the subject for events of one kind about one backend. An empty name means no backend."""
        return f"{self.event_prefix}{event_word(kind)}.{check_word(backend, 'backend') if backend else NO_BACKEND}"

    def events(self, kind: type[Event]) -> str:
        """Return the pattern that matches events of one kind about any backend."""
        return f"{self.event_prefix}{event_word(kind)}.*"

    def all_events(self) -> str:
        """Return the pattern that matches all events."""
        return f"{self.event_prefix}>"


def event_word(kind: type[Event]) -> str:
    """Return the word for a kind of event in subjects: its wire name without `event.`."""
    return check_word(kind.WIRE_NAME.removeprefix("event."), "kind of event")


def _short(subject: str) -> str:
    if len(subject) > MAX_SUBJECT_LENGTH:
        raise ValueError(f"a subject of {len(subject)} characters is too long; the limit is {MAX_SUBJECT_LENGTH}")
    return subject
