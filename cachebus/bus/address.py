"""Addresses of actors, and the NATS subjects that are made of them.

`cachebus.v1.<namespace>.req.<address>` takes the requests to an actor, and `cachebus.v1.<namespace>.evt.<kind>.<backend>`
carries events. On `cachebus.v1.<namespace>.own.<address>` processes settle which of them serves an address. Every word
has been checked, so none can be read as a wildcard, as two words or as a line of the protocol. A key is never part of a
subject.
"""

from __future__ import annotations

import re
from typing import Self

from cachebus.messages import Event

ROOT = "cachebus."  # The beginning of the subjects of every version.
NOBODY = "_"  # In the place of the backend, for an event without one.
LONGEST = 1024  # Characters of a subject: a server takes a line of 4,096, with a second subject and sizes in it.

_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_word(text: object, what: str) -> str:
    """Return `text` if it is one word of letters, digits, `_` and `-`, at most 64 of them.

    Namespaces, backend names and the words of an address come through here. Raises `ValueError` that names `what`.
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


class Subjects:
    """The subjects of one namespace. Raises `ValueError` for a namespace, an address or a backend that is not words."""

    __slots__ = ("_root", "event_prefix", "namespace")

    def __init__(self, namespace: str) -> None:
        self.namespace = check_word(namespace, "namespace")
        self._root = f"{ROOT}v1.{self.namespace}"
        self.event_prefix = f"{self._root}.evt."

    def request(self, address: str) -> str:
        """The subject of requests to the actor at `address`."""
        return _short(f"{self._root}.req.{Address(address)}")

    def owner(self, address: str) -> str:
        """The subject on which claims to `address` are settled."""
        return _short(f"{self._root}.own.{Address(address)}")

    def event(self, kind: type[Event], backend: str) -> str:
        """The subject of events of one kind about one backend, or about none if its name is empty."""
        return f"{self.event_prefix}{event_word(kind)}.{check_word(backend, 'backend') if backend else NOBODY}"

    def events(self, kind: type[Event]) -> str:
        """The subjects of events of one kind, about any backend."""
        return f"{self.event_prefix}{event_word(kind)}.*"

    def all_events(self) -> str:
        """The subjects of all events."""
        return f"{self.event_prefix}>"


def event_word(kind: type[Event]) -> str:
    """The word that a kind of event has in subjects: its wire name without `event.`."""
    return check_word(kind.WIRE_NAME.removeprefix("event."), "kind of event")


def _short(subject: str) -> str:
    if len(subject) > LONGEST:
        raise ValueError(f"a subject of {len(subject)} characters is too long, the limit is {LONGEST}")
    return subject
