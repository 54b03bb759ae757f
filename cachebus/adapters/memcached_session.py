"""What a connection is asked in one go: commands that all hold for one generation of the namespace, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from cachebus.messages import CacheBackendError, CacheError

from .memcached_connection import MISS, Answer, Connection, Talk
from .memcached_errors import BACKEND, Nonsense, lost
from .memcached_keys import Keys, is_generation, new_generation

READ_PART = 32 * 1024
"""Bytes of commands that are sent before their answers are read, where these are values: what both sides' buffers take
in any case, so that we never wait for a server that waits for us."""

WRITE_PART = 8 << 20
COUNT_PART = 1000
"""The same where the answers are a few bytes each."""

GENERATION_TRIES = 20


class Moved(Exception):
    """Raised when the namespace has another generation than the commands were made for: they are to be made anew."""


class Commands:
    """Commands on their way: in parts that may be sent without reading in between."""

    __slots__ = ("_data", "_reads", "_size", "counts", "parts")

    def __init__(self) -> None:
        self.parts: list[list[bytes]] = []
        self.counts: list[int] = []
        self._reads = False
        self._size = 0

    def __len__(self) -> int:
        return sum(self.counts)

    def add(self, data: bytes, *, reads: bool, count: int = 1) -> None:
        """Add a command, or `count` of them as one piece."""
        size = self._size + len(data)
        limit = READ_PART if reads or self._reads else WRITE_PART
        if not self.parts or size > limit or self.counts[-1] >= COUNT_PART:
            self.parts.append([])
            self.counts.append(0)
            self._reads = False
            size = len(data)
        self._reads = self._reads or reads
        self._size = size
        self.parts[-1].append(data)
        self.counts[-1] += count


class Session:
    """A batch's way of asking a connection. The generation is asked for along with everything else, so that knowing it
    costs no round trip; where it has changed, what was done went to a generation that nobody looks at any more, and is
    done again."""

    # `writing` is true while commands are under way that must not be done twice.

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self.connection = connection
        self.keys = keys
        self.writing = False
        self._mark = 0

    def head(self) -> Talk[str]:
        """What the names of the namespace's keys begin with now."""
        connection = self.connection
        if connection.generation is None:
            yield from self._learn()
        assert connection.generation is not None
        return self.keys.head(connection.generation)

    def ask(self, commands: Commands, *, apart: bool = False) -> Talk[list[Answer]]:
        """The answers to commands. Raises `Moved` when they were made for another generation, and `CacheError` when
        there are no answers. `apart` are commands that hold for all generations."""
        answers: list[Answer] = []
        for part, count in zip(commands.parts, commands.counts, strict=True):
            self._mark += 1
            question = f"mg {self.keys.generation_name} v O{self._mark}\r\n".encode()
            told = yield b"".join((question, *part)), count + 1
            if apart:
                self._check_mark(told[0])
            else:
                yield from self._check(told[0])
            answers += told[1:]
        return answers

    def clear(self) -> Talk[None]:
        """Give the namespace a generation that never was. Raises `CacheError` when that could not be done."""
        fresh = new_generation(self.connection.now())
        (answer,) = yield self._store(fresh, ""), 1
        if answer != 0:
            raise answer if isinstance(answer, CacheError) else self._nonsense(answer)
        self.connection.generation = fresh

    def _check(self, answer: Answer) -> Talk[None]:
        connection = self.connection
        self._check_mark(answer)
        if isinstance(answer, tuple) and is_generation(answer[0]):
            if connection.generation is None or answer[0] != connection.generation.encode():
                connection.generation = answer[0].decode()
                raise Moved
            return
        connection.generation = None
        yield from self._learn(answer)
        raise Moved

    def _check_mark(self, answer: Answer) -> None:
        """Raise `CacheError` for an answer to another question."""
        if isinstance(answer, tuple) and answer[1] != self._mark:
            self.connection.close()
            raise lost(Nonsense("an answer to another question"), self.connection.server, 0.0)

    def _learn(self, answer: Answer | None = None) -> Talk[None]:
        """Find out the generation, and make one where there is none. Whoever comes first makes it for all."""
        question = f"mg {self.keys.generation_name} v c\r\n".encode()
        for _ in range(GENERATION_TRIES):
            if answer is None or isinstance(answer, tuple):
                # A mark is no CAS token, so what a check saw is looked at again.
                (answer,) = yield question, 1
            if isinstance(answer, tuple):
                if is_generation(answer[0]):
                    self.connection.generation = answer[0].decode()
                    return
                # Somebody else wrote there.
                command = self._store(new_generation(self.connection.now()), f" C{answer[1]}")
            elif answer == MISS:
                command = self._store(new_generation(self.connection.now()), " ME")
            elif isinstance(answer, CacheError):
                raise answer
            else:
                raise self._nonsense(answer)
            (stored,) = yield command, 1
            if isinstance(stored, CacheError):
                raise stored
            answer = None
        raise CacheBackendError("the generation of the namespace is lost as soon as it is stored", BACKEND)

    def _store(self, generation: str, condition: str) -> bytes:
        return f"ms {self.keys.generation_name} {len(generation)} T0{condition}\r\n{generation}\r\n".encode()

    def _nonsense(self, answer: Answer) -> CacheError:
        self.connection.close()
        return lost(Nonsense(str(answer)), self.connection.server, 0.0)


def first_error(answers: Sequence[Answer]) -> CacheError | None:
    """What the server had to say against one of several commands."""
    return next((each for each in answers if isinstance(each, CacheError)), None)
