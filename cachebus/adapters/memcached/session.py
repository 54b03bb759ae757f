"""The commands of one exchange, and the generations of the namespace and of each tag.

All commands of an exchange apply to the same generation of the namespace. If it changes, all of them are repeated.

Each invalidation of a tag replaces its generation. An entry is valid while its tags still have the generations with
which it was stored. Every server has its own generation of each tag, next to the entries that use it; they are read
together and lost together. A generation consists of 96 random bits and is not a counter. If a generation is lost, it
never returns, so entries stored under it stay invalid. An entry is also invalid if the generation of one of its tags
is missing.

`ALL_TAGS` is an additional generation. An invalidation replaces it before the generations of its tags. So a load
whose tags are not known at the start can check at its end if any tag was invalidated meanwhile. Decision 27 has the
interleavings.
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
"""Maximum size in bytes of read commands that are sent before their answers are read. The buffers hold as much."""

WRITE_PART = 8 << 20
COUNT_PART = 1000
"""The limits of size and number for commands whose answers have a few bytes each."""

GENERATION_TRIES = 20

REMEMBERED_KEYS, REMEMBERED_TAGS = 10_000, 8
"""Limits of a `TagMemory`: keys, and tags per key."""


class NamespaceChanged(Exception):
    """Raised when the generation of the namespace has changed, so the commands must be built again."""


@dataclass(slots=True, eq=False)
class Session:
    """The view that an exchange has of its connection.

    Each group of commands also reads the generation of the namespace, so checking it costs no round trip. If it has
    changed, the commands applied to keys that are no longer read, and they are repeated. `writing` is true while
    commands are in flight that must not be executed twice.
    """

    connection: Connection
    keys: Keys
    writing: bool = False

    def head(self) -> Exchange[str]:
        """Return the current prefix of item names in the namespace."""
        if not self.connection.generation:
            yield from self._learn()
        return self.connection.head

    def ask(self, commands: Sequence[bytes], *, unversioned: bool = False) -> Exchange[list[Answer]]:
        """Return the answers to commands, one per command.

        Raises `NamespaceChanged` if the commands were built for another generation, and `CacheError` if the exchange
        fails. `unversioned` commands apply to all generations.
        """
        answers: list[Answer] = []
        connection = self.connection
        for part in _parts(commands):
            connection.mark += 1
            question = b"mg %b v O%d\r\n" % (self.keys.generation_name, connection.mark)
            received = yield b"".join((question, *part)), len(part) + 1
            yield from self.check(received.pop(0), unversioned=unversioned)
            answers = answers + received if answers else received
        return answers

    def clear(self) -> Exchange[None]:
        """Give the namespace a new generation. Raises `CacheError`."""
        generation = new_generation(self.connection.now())
        answer = yield from ask(store(self.keys.generation_name.decode(), generation, 0))
        if type(answer) is not int or answer < 0:
            raise self._drop(ProtocolError(str(answer)[:40]))
        self._use(generation)

    def check(self, answer: Answer, *, unversioned: bool = False) -> Exchange[None]:
        """Check the generation that a group of commands has read.

        Raises `NamespaceChanged` if it differs from the known one, and `CacheError` for an answer to another command.
        """
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
        """Read the generation, or create one if it is missing. The first client to store one determines it for all."""
        name = self.keys.generation_name.decode()
        for _ in range(GENERATION_TRIES):
            answer = yield from ask(read(name))
            if isinstance(answer, tuple):
                if is_generation(answer[0]):
                    self._use(answer[0])
                    return
                condition = b" C%d" % answer[1]  # The item is not a valid generation.
            elif answer == MISS:
                condition = b" ME"
            else:
                raise self._drop(ProtocolError(str(answer)[:40]))
            yield from ask(store(name, new_generation(self.connection.now()), 0, condition))
        raise CacheBackendError("the server evicts the generation of the namespace as soon as it is stored", BACKEND)

    def _use(self, generation: bytes) -> None:
        self.connection.generation = generation
        self.connection.head = self.keys.head(generation)

    def _drop(self, error: ProtocolError) -> CacheError:
        failure = lost(error, self.connection.server, 0.0)
        self.connection.drop_later(failure)
        return failure


def _parts(commands: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Split commands into groups that may be sent without reading in between."""
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
    """Return a unique generation."""
    return secrets.token_bytes(12)


class TagMemory:
    """A bounded memory of the tags that keys had when they were last read.

    It allows the generations to be read in the same round trip as the value. If the tags have changed, that costs one
    more round trip. `names` holds the item names of the generations by key.
    """

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {}

    def __repr__(self) -> str:
        return f"<TagMemory {len(self.names)}/{REMEMBERED_KEYS} keys>"

    def note(self, key: str, names: tuple[str, ...]) -> None:
        """Remember the item names of the generations of a key's tags."""
        if not names:
            self.names.pop(key, None)
        elif self.names.get(key) != names and len(names) <= REMEMBERED_TAGS:
            if len(self.names) >= REMEMBERED_KEYS:
                del self.names[next(iter(self.names))]
            self.names[key] = names


class Generations:
    """The generations of tags for one run of requests. Each was read after the run began."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._keys = session.keys
        self._seen: dict[str, bytes] = {}  # By name suffix; empty if the generation is missing.
        self._errors: dict[str, CacheError] = {}

    def names(self, tags: Iterable[TagVersion]) -> tuple[str, ...]:
        """Return the name suffixes of the generations of an entry's tags."""
        return tuple([self._keys.tag(tag) for tag, _ in tags])

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return those of the names whose generations have not been read."""
        return [name for name in dict.fromkeys(names) if name not in self._seen]

    # Asking

    def reading(self, head: str, names: Sequence[str]) -> list[bytes]:
        """Return the commands that read generations. Pass the answers to `learn`."""
        return [read(head + name) for name in names]

    def making(self, head: str, names: Sequence[str]) -> list[bytes]:
        """Return the commands that read generations and create missing ones. Pass the answers to `learn_made`."""
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
        """Read the generations that have not been read yet. Raises `NamespaceChanged`."""
        if unknown := self.unknown(names):
            head = yield from self._session.head()
            self.learn(unknown, (yield from self._session.ask(self.reading(head, unknown))))

    # Evaluating

    def seen(self, name: str) -> bytes:
        """Return the generation with that name; empty if it is missing."""
        return self._seen.get(name, b"")

    def current(self, tags: Iterable[str]) -> TagVersions:
        """Return the tags with their generations, for a new entry. Raises `CacheError` if one is not available."""
        versions: list[TagVersion] = []
        for tag in dict.fromkeys(tags):
            name = self._keys.tag(tag)
            if not (generation := self.seen(name)):
                raise self._errors.get(name) or CacheBackendError(f"the generation of tag {tag!r} is missing", BACKEND)
            versions.append((tag, generation))
        return tuple(versions)

    def good(self, tags: TagVersions) -> bool:
        """True if these are the current generations of all the tags. They must have been read."""
        return all(generation and self._seen.get(self._keys.tag(tag)) == generation for tag, generation in tags)


def invalidate(session: Session, tags: Iterable[str]) -> Exchange[None]:
    """Replace the generation of all tags, then those of the given tags.

    Missing ones stay missing. Raises `CacheError`.
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
    """Return the command that stores a new generation."""
    return store(name, fresh(), 0, mode)
