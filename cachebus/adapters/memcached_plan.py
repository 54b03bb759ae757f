"""From requests to Memcached commands and back: a batch for one server becomes as few round trips as keep its order.

Neighbours that need not look before they write go in one piece: reads (equal keys share a place), plain writes and
removals. The others go in rounds (`memcached_rounds`), and what is about leases in rounds of its own
(`memcached_lease_rounds`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from cachebus.messages import (
    Admit,
    CacheError,
    CapabilityError,
    Delete,
    Deleted,
    DeleteMany,
    Exists,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    Reply,
    Request,
    Set,
    SetMany,
    Stored,
    StoredMany,
)

from .forms import encode_form
from .memcached_chunks import chunk_tails
from .memcached_connection import MISS, Answer, Connection, Talk
from .memcached_entries import CHUNKED, MISSING, Entry, found_or_fail
from .memcached_errors import BACKEND, in_doubt
from .memcached_lease_rounds import LeaseRounds, leases
from .memcached_notes import NO_NOTES, Notes
from .memcached_rates import LimitRounds
from .memcached_readings import Readings
from .memcached_rounds import Rounds, looks_first
from .memcached_session import Commands, Moved, Session
from .memcached_tags import Generations
from .memcached_values import Values, entry_of, not_found

GETS_PART = 100
"""Reads that are sent as one piece of a command: with the longest of keys, what may be sent in one."""

Settle = Callable[[Answer], None]
Read = Callable[[bytes, Answer], None]
"""Takes in an answer; told first what the entry keeps of the key."""


class Plan:
    """A batch for one server, on its way."""

    def __init__(self, connection: Connection, values: Values, batch: Sequence[Request[Any]]) -> None:
        self.replies: list[Any] = [None] * len(batch)
        self._batch = batch
        self._connection = connection
        self._session = Session(connection, values.keys)
        self._values = values
        self._tail = values.keys.tail

    def run(self) -> Talk[list[Reply]]:
        """Carry the batch out. What goes wrong is in the replies."""
        batch, at, end = self._batch, 0, len(self._batch)
        first, way = 0, None
        try:
            while at < end:
                first, way = at, _way(batch[at])
                while at < end and _way(batch[at]) is way:
                    at += 1
                self._session.writing = False
                if way is None:
                    yield from self._directly(first, at)
                elif issubclass(way, LimitRounds):
                    yield from way(self._session, batch, self.replies).run(first, at)
                else:
                    yield from way(self._session, self._values, batch, self.replies).run(first, at)
        except CacheError as error:
            if way is None:
                self.replies[first:at] = [None] * (at - first)  # Drafts, of which the answers are not known.
            self._give_up(error, at)
        return self.replies

    def _give_up(self, error: CacheError, end: int) -> None:
        """What has no reply yet gets the error. What lies before `end` may have been sent."""
        for at, request in enumerate(self._batch):
            if self.replies[at] is None:
                doubtful = at < end and self._session.writing and not request.IDEMPOTENT and error.transient
                self.replies[at] = Failed.of(in_doubt(error) if doubtful else error)

    def _directly(self, first: int, end: int) -> Talk[None]:
        while True:
            try:
                if not (yield from self._only_gets(first, end)):
                    yield from Mixed(self._session, self._values, self._batch, self.replies).run(first, end)
                    self.replies[first:end] = [
                        FoundMany(each) if type(each) is dict else each for each in self.replies[first:end]
                    ]
                return
            except Moved:
                self.replies[first:end] = [None] * (end - first)

    def _only_gets(self, first: int, end: int) -> Talk[bool]:
        """The commonest run in its simplest form; `False` if it is not that."""
        places: list[int] = []
        slots: dict[str, int] = {}
        for position in range(first, end):
            request = self._batch[position]
            if type(request) is not Get:
                return False
            places.append(slots.setdefault(request.key, len(slots)))
        tail, memory, keys = self._tail, self._values.memory, list(slots)
        try:
            tails = [tail(key) for key in keys]
        except CacheError:
            return False
        head = yield from self._session.head()
        lines = [f"mg {head}{name} v c\r\n" for name, _ in tails]
        # Made when they are needed: what has no tags shall cost nothing more than it did.
        generations: Generations | None = None
        readings: Readings | None = None
        guessed: list[str] = []
        if memory and (known := [name for key in keys for name in memory.of(key)]):
            generations = Generations(self._session)
            guessed = generations.unknown(known)
            lines += [f"mg {head}{name} v c\r\n" for name in guessed]
        commands = Commands()
        for at in range(0, len(lines), GETS_PART):
            piece = lines[at : at + GETS_PART]
            commands.add("".join(piece).encode(), reads=True, count=len(piece))
        answers = yield from self._session.ask(commands)
        epoch, now = self._connection.epoch, self._connection.now()
        if generations is not None:
            generations.learn(guessed, answers[len(keys) :])
        for position, place in enumerate(places, first):
            answer = answers[place]
            if type(answer) is tuple:
                # Taken apart for each, so that no two callers share a list or a dict.
                reply = found_or_fail(answer[0], answer[1], tails[place][1], epoch, now)
                if type(reply) is Entry:
                    if readings is None:
                        generations = generations or Generations(self._session)
                        readings = Readings(self._session, generations, memory)
                    readings.value(keys[place], reply, self._filler(position))
                elif guessed and memory.of(keys[place]):
                    memory.note(keys[place], ())
                self.replies[position] = reply
            else:
                self.replies[position] = MISSING if answer == MISS else not_found(answer)
        if readings is not None:
            yield from readings.finish()
        return True

    def _filler(self, position: int) -> Callable[[Reply], None]:
        return lambda reply: fill(self.replies, position, None, reply)


def _way(request: Request[Any]) -> type[Rounds | LeaseRounds | LimitRounds] | None:
    """Who carries out a request that looks before it writes."""
    if type(request) is Get:
        return None
    if type(request) is Admit:
        return LimitRounds
    return LeaseRounds if leases(request) else Rounds if looks_first(request) else None


class Mixed:
    """Reads, plain writes and removals that go in one piece."""

    def __init__(self, session: Session, values: Values, batch: Sequence[Request[Any]], replies: list[Any]) -> None:
        self._session = session
        self._connection = session.connection
        self._values = values
        self._tail = values.keys.tail
        self._batch = batch
        self._replies = replies
        self._commands = Commands()
        self._settles: list[list[Settle]] = []
        self._reads: dict[str, list[Settle]] = {}
        self._guessed: dict[str, None] = {}
        self._orphans: list[str] = []
        self._generations = Generations(session)
        self._readings = Readings(session, self._generations, values.memory)

    def run(self, first: int, end: int) -> Talk[None]:
        """Carry out the requests from `first` to before `end`."""
        head = yield from self._session.head()
        yield from self._make_tags(first, end, head)
        for position in range(first, end):
            try:
                self._add(position, self._batch[position], head)
            except CacheError as error:
                self._replies[position] = Failed.of(error)
        if not self._settles:
            return
        guessed = self._generations.unknown(self._guessed)
        self._generations.ask(self._commands, head, guessed)
        self._session.writing = True
        answers = yield from self._session.ask(self._commands)
        self._generations.learn(guessed, answers[len(self._settles) :])
        for answer, wanted in zip(answers, self._settles, strict=False):
            for settle in wanted:
                settle(answer)
        self._session.writing = False
        if self._readings:
            yield from self._readings.finish()
        if self._orphans:
            commands = Commands()
            for name in self._orphans:
                commands.add(f"md {head}{name}\r\n".encode(), reads=False)
            yield from self._session.ask(commands)

    def _make_tags(self, first: int, end: int, head: str) -> Talk[None]:
        """Read the generations under which values are stored, before they are."""
        names: dict[str, None] = {}
        for request in self._batch[first:end]:
            for tag in request.tags if isinstance(request, Set | SetMany) else ():
                with contextlib.suppress(CacheError):  # Told to whoever stores under it.
                    names[self._values.keys.tag(tag)] = None
        if names:
            commands, made = Commands(), list(names)
            self._generations.make(commands, head, made)
            self._generations.learn_made(made, (yield from self._session.ask(commands)))

    def _add(self, position: int, request: Any, head: str) -> None:
        match request:
            case Get(key=key):
                self._read(head, key, self._got(position, key, None))
            case Exists(key=key):
                self._read(head, key, self._existing(position, key))
            case GetMany(keys=keys):
                for key in keys:
                    self._tail(key)
                self._replies[position] = {}  # A `FoundMany` when it is done.
                for key in dict.fromkeys(keys):
                    self._read(head, key, self._got(position, key, key))
            case Set() | SetMany():
                self._set(position, request, head)
            case Delete(key=key):
                self._delete(position, (key,), head)
            case DeleteMany(keys=keys):
                self._delete(position, keys, head)
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

    def _read(self, head: str, key: str, make: Read) -> None:
        name, kept = self._tail(key)
        if self._values.memory:
            self._guessed.update(dict.fromkeys(self._values.memory.of(key)))
        wanted = self._reads.get(name)
        if wanted is None:
            wanted = self._reads[name] = []
            self._settles.append(wanted)
            self._commands.add(f"mg {head}{name} v c\r\n".encode(), reads=True)
        wanted.append(lambda answer: make(kept, answer))

    def _write(self, command: bytes, settle: Settle) -> None:
        self._reads.clear()  # What is read from here on is another value.
        self._settles.append([settle])
        self._commands.add(command, reads=False)

    def _got(self, position: int, key: str, among: str | None) -> Read:
        def settle(kept: bytes, answer: Answer) -> None:
            reply: Any = not_found(answer) if type(answer) is not tuple else None
            if type(answer) is tuple:
                connection = self._connection
                reply = found_or_fail(answer[0], answer[1], kept, connection.epoch, connection.now())
                if type(reply) is Entry:
                    self._readings.value(key, reply, lambda told: fill(self._replies, position, among, told))
                    reply = MISSING
            fill(self._replies, position, among, reply)

        return settle

    def _existing(self, position: int, key: str) -> Read:
        def present(entry: Entry | None) -> None:
            self._replies[position] = MISSING if entry is None else entry.present(self._connection.now())

        def settle(kept: bytes, answer: Answer) -> None:
            try:
                entry = entry_of(self._connection, kept, answer)
            except CacheError as error:
                self._replies[position] = Failed.of(error)
                return
            present(entry)
            if entry is not None and entry.notes.marks:
                self._readings.entry(key, entry, present)

        return settle

    def _set(self, position: int, request: Set | SetMany, head: str) -> None:
        notes = Notes(self._generations.present(request.tags)) if request.tags else NO_NOTES
        items = request.items if isinstance(request, SetMany) else {request.key: request.value}
        expiry = self._values.expiry(request.ttl, self._connection.now())
        commands: list[bytes] = []
        for key, value in items.items():
            name, kept = self._tail(key)
            packed = self._values.pack(encode_form(value), kept, expiry, self._connection, notes)
            commands += packed.commands(head, name)
        if isinstance(request, SetMany):
            self._replies[position] = StoredMany(len(items))

        def settle(answer: Answer) -> None:
            reply = self._replies[position]
            if not isinstance(answer, int) or answer <= 0:
                self._replies[position] = not_found(answer)
            elif reply is None or type(reply) is Stored:  # The last one is the entry's.
                self._replies[position] = Stored(self._connection.epoch + answer)

        for command in commands:
            self._write(command, settle)

    def _delete(self, position: int, keys: Sequence[str], head: str) -> None:
        for key in keys:
            self._tail(key)
        self._replies[position] = Deleted(0)

        def count(entry: Entry | None) -> None:
            deleted = self._replies[position]
            if entry is not None and isinstance(deleted, Deleted):
                self._replies[position] = Deleted(deleted.count + 1)

        def settling(key: str) -> Read:
            def settle(kept: bytes, answer: Answer) -> None:
                try:
                    entry = entry_of(self._connection, kept, answer)
                except CacheError as error:
                    if isinstance(answer, CacheError):
                        self._replies[position] = Failed.of(error)
                    return  # Not ours, and gone all the same.
                if entry is not None and entry.form == CHUNKED:
                    self._orphans += chunk_tails(entry.body)
                if entry is not None and entry.notes.marks:
                    self._readings.entry(key, entry, count)
                else:
                    count(entry)

            return settle

        def gone(answer: Answer) -> None:
            if isinstance(answer, CacheError):
                self._replies[position] = Failed.of(answer)

        for key in dict.fromkeys(keys):
            # Looked at before it is removed, because Memcached still has what has expired for its readers.
            self._read(head, key, settling(key))
            self._write(f"md {head}{self._tail(key)[0]}\r\n".encode(), gone)


def fill(replies: list[Any], position: int, key: str | None, reply: Any) -> None:
    """Put a reply in its place; with a key, in the place of the key among those of a `GetMany`."""
    many = replies[position]
    if key is None:
        replies[position] = reply
    elif type(many) is dict:
        if isinstance(reply, Found):
            many[key] = reply
        elif type(reply) is Failed:
            replies[position] = reply
