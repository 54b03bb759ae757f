"""Commands of one exchange: all of them hold for one generation of the namespace, or none of them does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachebus.messages import CacheBackendError, CacheError

from .memcached_connection import MISS, Answer, Connection, Exchange, ask, read, store
from .memcached_errors import BACKEND, ProtocolError, lost
from .memcached_keys import Keys, is_generation, new_generation

READ_PART = 32 * 1024
"""Bytes of commands that are sent before their answers are read, if these are values: what both sides' buffers take
in any case, so that we never wait for a server that waits for us."""

WRITE_PART = 8 << 20
COUNT_PART = 1000
"""The same if the answers are a few bytes each."""

GENERATION_TRIES = 20


class NamespaceChanged(Exception):
    """Raised when the namespace has another generation than the commands were made for. They are to be made again."""


@dataclass(slots=True, eq=False)
class Session:
    """An exchange's view of its connection. Each part of its commands also reads the generation, so that checking it costs
    no round trip. If the generation has changed, the commands went to keys that are not read any more, and are repeated.

    `writing` is true while commands are in flight that must not be carried out twice.
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
