"""Tags: each has a generation, which an invalidation replaces. An entry is good while its tags have the generations that it
was made with.

Every server has its own generation of each tag, beside the entries whose tags it guards: they are read together, and lost
together. A generation is 96 random bits and never counted up. One that was lost, to an eviction or a restart, never comes
back, and with it nothing that was made before. No entry is good under one that is missing.

`ALL_TAGS` has one more. An invalidation replaces it before those of its tags, so that a load under tags that it did not
know at the beginning can see at the end whether any was invalidated meanwhile. Decision 27 has the interleavings.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

from cachebus.messages import CacheBackendError, CacheError

from .memcached_connection import Answer, Exchange, first_error, read, store
from .memcached_entry import VERSION_MAX, TagVersion, TagVersions
from .memcached_errors import BACKEND
from .memcached_keys import ALL_TAGS
from .memcached_session import NamespaceChanged, Session

REMEMBERED_KEYS, REMEMBERED_TAGS = 10_000, 8
"""Bounds of a `TagMemory`: keys, and tags of one of them."""


def fresh() -> bytes:
    """Return a generation that never was and never will be."""
    return secrets.token_bytes(12)


class TagMemory:
    """The tags that keys had when they were last read: their generations are read in the same round trip as the value. If it
    is wrong, or has forgotten a key, there is one round trip more. `names` are those of the generations, by key."""

    __slots__ = ("names",)

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {}

    def __repr__(self) -> str:
        return f"<TagMemory {len(self.names)}/{REMEMBERED_KEYS} keys>"

    def note(self, key: str, names: tuple[str, ...]) -> None:
        """Remember the names of a key's tags."""
        if not names:
            self.names.pop(key, None)
        elif self.names.get(key) != names and len(names) <= REMEMBERED_TAGS:
            if len(self.names) >= REMEMBERED_KEYS:
                del self.names[next(iter(self.names))]
            self.names[key] = names


class Generations:
    """The generations of tags as one run of requests has seen them. Each was read after the run began, so that an
    invalidation which had returned by then is seen."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._keys = session.keys
        self._seen: dict[str, bytes] = {}  # By what follows the namespace's generation; empty where there is none.
        self._errors: dict[str, CacheError] = {}

    def names(self, tags: Iterable[TagVersion]) -> tuple[str, ...]:
        """Return the names of the generations of an entry's tags."""
        return tuple([self._keys.tag(tag) for tag, _ in tags])

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the names of generations that have not been read."""
        return [name for name in dict.fromkeys(names) if name not in self._seen]

    # Asking

    def reading(self, head: str, names: Sequence[str]) -> list[bytes]:
        """Return the commands that read generations; `learn` takes the answers."""
        return [read(head + name) for name in names]

    def making(self, head: str, names: Sequence[str]) -> list[bytes]:
        """Return the commands that read generations and make those that are missing; `learn_made` takes the answers."""
        commands: list[bytes] = []
        for name in names:
            commands += (_storing(head + name, b" ME"), read(head + name))
        return commands

    def learn(self, names: Sequence[str], answers: Sequence[Answer]) -> None:
        for name, answer in zip(names, answers, strict=True):
            self._seen[name] = b""
            if isinstance(answer, CacheError):
                self._errors[name] = answer
            elif isinstance(answer, tuple) and len(answer[0]) <= VERSION_MAX:
                self._seen[name] = answer[0]

    def learn_made(self, names: Sequence[str], answers: Sequence[Answer]) -> None:
        self.learn(names, answers[1::2])
        made = zip(names, answers[::2], strict=True)
        self._errors |= {name: answer for name, answer in made if isinstance(answer, CacheError)}

    def read(self, names: Iterable[str]) -> Exchange[None]:
        """Read those that have not been read, if there are any. Raises `NamespaceChanged`."""
        if unknown := self.unknown(names):
            head = yield from self._session.head()
            self.learn(unknown, (yield from self._session.ask(self.reading(head, unknown))))

    # What they say

    def seen(self, name: str) -> bytes:
        """Return the generation of that name; empty where there is none."""
        return self._seen.get(name, b"")

    def current(self, tags: Iterable[str]) -> TagVersions:
        """Return the tags with their generations, for a new entry. Raises `CacheError` if one could not be read or made."""
        versions: list[TagVersion] = []
        for tag in dict.fromkeys(tags):
            name = self._keys.tag(tag)
            if not (generation := self.seen(name)):
                raise self._errors.get(name) or CacheBackendError(f"the generation of the tag {tag!r} is lost", BACKEND)
            versions.append((tag, generation))
        return tuple(versions)

    def good(self, tags: TagVersions) -> bool:
        """Return whether all these are the present generations, which have been read."""
        return all(generation and self._seen.get(self._keys.tag(tag)) == generation for tag, generation in tags)


def invalidate(session: Session, tags: Iterable[str]) -> Exchange[None]:
    """Give tags new generations, and before them all tags together. Raises `CacheError`.

    One that is missing stays so: nothing is good under it, and the next to need it makes one that never was.
    """
    names = (ALL_TAGS, *dict.fromkeys(map(session.keys.tag, tags)))
    while True:
        head = yield from session.head()
        try:
            answers = yield from session.ask([_storing(head + name, b" MR") for name in names])
        except NamespaceChanged:
            continue
        if (error := first_error(answers)) is not None:
            raise error
        return


def _storing(name: str, mode: bytes) -> bytes:
    """Return the command that stores a generation that never was."""
    return store(name, fresh(), 0, mode)
