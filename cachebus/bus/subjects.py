"""Subjects: the one gate through which every subject goes.

`cachebus.v1.<namespace>.req.<address>` is where an actor is asked, `cachebus.v1.<namespace>.evt.<kind>.<backend>` where an
event is told, and `cachebus.v1.<namespace>.own.<address>` where those who want an address for themselves settle whose it
is. Every word has been checked, so none can be read as a wildcard, as two words or as a line of the protocol. A key is
never part of a subject.
"""

from __future__ import annotations

from cachebus.messages import Event

from .address import Address, check_word

ROOT = "cachebus."
"""What every subject of every version begins with."""

NOBODY = "_"
"""In the place of the backend, for an event that belongs to none."""

LONGEST = 1024
"""Characters that a subject may have: a server takes a line of 4,096, with a second subject and the sizes in it."""


class Subjects:
    """The subjects of one namespace. Raises `ValueError` for a namespace, an address or a backend that is not words."""

    __slots__ = ("_events", "_owners", "_requests", "namespace")

    def __init__(self, namespace: str) -> None:
        self.namespace = check_word(namespace, "namespace")
        root = f"{ROOT}v1.{self.namespace}"
        self._requests = f"{root}.req."
        self._owners = f"{root}.own."
        self._events = f"{root}.evt."

    def __repr__(self) -> str:
        return f"<Subjects of {self.namespace!r}>"

    def request(self, address: str) -> str:
        """Where the actor at `address` is asked."""
        return _short(self._requests + Address(address))

    def owner(self, address: str) -> str:
        """Where those who want `address` for themselves alone hear of one another."""
        return _short(self._owners + Address(address))

    def event(self, kind: type[Event], backend: str) -> str:
        """Where events of one kind about one backend are told; about none, if its name is empty."""
        return f"{self._events}{event_word(kind)}.{check_word(backend, 'backend') if backend else NOBODY}"

    def all_events(self) -> str:
        """Where events of whatever kind about whatever backend are told."""
        return f"{self._events}>"

    @property
    def event_prefix(self) -> str:
        """What the subjects of all events begin with."""
        return self._events

    def events(self, kind: type[Event]) -> str:
        """Where events of one kind are told, about whatever backend."""
        return f"{self._events}{event_word(kind)}.*"


def event_word(kind: type[Event]) -> str:
    """The word that a kind of event has in subjects: its wire name without `event.`."""
    return check_word(kind.WIRE_NAME.removeprefix("event."), "kind of event")


def _short(subject: str) -> str:
    if len(subject) > LONGEST:
        raise ValueError(f"a subject of {len(subject)} characters is too long, the limit is {LONGEST}")
    return subject
