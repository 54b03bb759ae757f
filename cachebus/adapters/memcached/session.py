"""Commands of one exchange, and the generations that they hold for: one of the namespace, and one of each tag.

The commands of an exchange all hold for one generation of the namespace, or none of them does.

Each invalidation of a tag replaces its generation. An entry is good while its tags have the generations that it was made
with. Every server has its own generation of each tag, beside the entries whose tags it guards: they are read together, and
lost together. A generation is 96 random bits and never counted up. A lost one never comes back, and with it nothing that
was made before. No entry is good under a missing one.

`ALL_TAGS` has one more. An invalidation replaces it before those of its tags, so that a load under tags that it did not
know at the beginning can see at the end whether any was invalidated meanwhile. Decision 27 has the interleavings.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cachebus.messages import CacheBackendError, CacheError

from .connection import MISS, Answer, Connection, Exchange, ask, first_error, read, store
from .entry import VERSION_MAX, TagVersion, TagVersions
from .errors import BACKEND, ProtocolError, lost
from .keys import ALL_TAGS, Keys, is_generation, new_generation

READ_PART = 32 * 1024
"""Bytes of commands sent before their answers, which are values, are read: both sides' buffers take as much in any case."""

WRITE_PART = 8 << 20
COUNT_PART = 1000
"""The same if the answers are a few bytes each."""

GENERATION_TRIES = 20

REMEMBERED_KEYS, REMEMBERED_TAGS = 10_000, 8
"""Bounds of a `TagMemory`: keys, and tags of one of them."""


class NamespaceChanged(Exception):
    """Raised when the namespace has another generation than the commands were made for. They are to be made again."""


@dataclass(slots=True, eq=False)
class Session:
    """An exchange's view of its connection. Each part of its commands also reads the generation, so that checking it costs
    no round trip. If it has changed, the commands went to keys that are not read any more, and are repeated. `writing` is
    true while commands are in flight that must not be carried out twice.
    """

    connection: Connection
    keys: Keys
    writing: bool = False

    def head(self) -> Exchange[str]:
        """Return what the names of the namespace's keys begin with now."""
        if not self.connection.generation:
            yield from self._learn()
        return self.connection.head

    def ask(self, commands: Sequence[bytes], *, unversioned: bool = False) -> Exchange[list[Answer]]:
        """Return the answers to commands that have one each.

        Raises `NamespaceChanged` if they were made for another generation, and `CacheError` if there are no answers.
        `unversioned` commands hold for all generations.
        """
        answers: list[Answer] = []
        connection = self.connection
        for part in _parts(commands):
            connection.mark += 1
            question = b"mg %b v O%d\r\n" % (self.keys.generation_name, connection.mark)
            told = yield b"".join((question, *part)), len(part) + 1
            yield from self.check(told.pop(0), unversioned=unversioned)
            answers = answers + told if answers else told
        return answers

    def clear(self) -> Exchange[None]:
        """Give the namespace a generation that never was. Raises `CacheError` if that could not be done."""
        generation = new_generation(self.connection.now())
        answer = yield from ask(store(self.keys.generation_name.decode(), generation, 0))
        if type(answer) is not int or answer < 0:
            raise self._drop(ProtocolError(str(answer)[:40]))
        self._use(generation)

    def check(self, answer: Answer, *, unversioned: bool = False) -> Exchange[None]:
        """Take in the generation that a part of commands has read. Raises `NamespaceChanged` if it is another than the one
        that was known, and `CacheError` for an answer to another command."""
        if isinstance(answer, tuple):
            if answer[1] != self.connection.mark:
                raise self._drop(ProtocolError("an answer to another command"))
            if answer[0] == self.connection.generation:
                return
        if unversioned:
            return
        if isinstance(answer, tuple) and is_generation(answer[0]):
            self._use(answer[0])
        else:
            self.connection.generation = b""
            yield from self._learn()
        raise NamespaceChanged

    def _learn(self) -> Exchange[None]:
        """Read the generation, and make one if there is none. The first to store one makes it for all."""
        name = self.keys.generation_name.decode()
        for _ in range(GENERATION_TRIES):
            answer = yield from ask(read(name))
            if isinstance(answer, tuple):
                if is_generation(answer[0]):
                    self._use(answer[0])
                    return
                condition = b" C%d" % answer[1]  # Something else was written there.
            elif answer == MISS:
                condition = b" ME"
            else:
                raise self._drop(ProtocolError(str(answer)[:40]))
            yield from ask(store(name, new_generation(self.connection.now()), 0, condition))
        raise CacheBackendError("the generation of the namespace is lost as soon as it is stored", BACKEND)

    def _use(self, generation: bytes) -> None:
        self.connection.generation = generation
        self.connection.head = self.keys.head(generation)

    def _drop(self, error: ProtocolError) -> CacheError:
        failure = lost(error, self.connection.server, 0.0)
        self.connection.drop_later(failure)
        return failure


def _parts(commands: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Split commands into parts that may be sent without reading in between."""
    if len(commands) <= COUNT_PART and sum(map(len, commands)) <= READ_PART:
        yield commands
        return
    part: list[bytes] = []
    size, reads = 0, False
    for command in commands:
        reading = command.startswith(b"mg ")
        size += len(command)
        if part and (size > (READ_PART if reads or reading else WRITE_PART) or len(part) >= COUNT_PART):
            yield part
            part, size, reads = [], len(command), False
        part.append(command)
        reads = reads or reading
    if part:
        yield part


def fresh() -> bytes:
    """Return a generation that never was and never will be."""
    return secrets.token_bytes(12)


class TagMemory:
    """The tags that keys had when last read, so that their generations are read in one round trip with the value; if it is
    wrong, that costs one more. `names` are those of the generations, by key."""

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
    """The generations of tags as one run of requests has seen them: each was read after the run began."""

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
    """Give tags new generations, and before them all tags together; a missing one stays missing. Raises `CacheError`."""
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
