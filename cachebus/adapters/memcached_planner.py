"""From requests to Memcached commands and back: a batch for one server becomes as few round trips as keep its order.

Neighbours of one kind form a run. Reads, plain writes and removals go in one piece (`Direct`, where equal reads share a
command). Requests that have to know what is under a key before they write it go through `CasUpdate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from cachebus.messages import (
    Admit,
    CacheError,
    CapabilityError,
    Clear,
    Cleared,
    Delete,
    Deleted,
    DeleteMany,
    Exists,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    Invalidated,
    InvalidateTags,
    Reply,
    Request,
    Set,
    SetMany,
    Stored,
    StoredMany,
)

from .forms import decode_form, encode_form
from .memcached_cas_updates import CasUpdate
from .memcached_chunks import chunk_tails, content_of
from .memcached_connection import Answer, Connection, Exchange
from .memcached_entry import CHUNKED, MISSING, NO_METADATA, Entry, EntryMetadata, found_of, found_or_fail
from .memcached_errors import BACKEND, in_doubt
from .memcached_key_updates import KeyUpdates, looks_first
from .memcached_rate_limits import LimitUpdates
from .memcached_session import COUNT_PART, READ_PART, NamespaceChanged, Session
from .memcached_tags import Generations, invalidate
from .memcached_values import Values, entry_of, not_found, read

Take = Callable[[Any, int, str, bytes], None]
"""Takes in an answer, or the entry that was found good: with the position of the request, the key, and what the entry
keeps of the key."""


def carry_out(connection: Connection, values: Values, batch: Sequence[Request[Any]]) -> Exchange[list[Reply]]:
    """Carry a batch out. What goes wrong is in the replies.

    Batches of nothing but reads and plain writes, which are nearly all, go the straight way here. If it turns out that they
    need more, they go the way of all others: reads are repeated, and so are writes for a generation that has ended.
    """
    if not (prepared := _prepare(connection, values, batch)):
        return (yield from Plan(connection, values, batch).run())
    data, count, takers = prepared
    mark = connection.mark
    try:
        answers = yield data, count
        if answers[0] != (connection.generation, mark):
            session = Session(connection, values.keys)
            if not session.unchanged(answers[0]):
                with contextlib.suppress(NamespaceChanged):
                    yield from session.changed(answers[0])
            return (yield from Plan(connection, values, batch).run())
    except CacheError as error:
        doubtful = in_doubt(error) if error.transient else error
        return [Failed.of(error if request.IDEMPOTENT else doubtful) for request in batch]
    epoch, now = connection.epoch, connection.now()
    replies: list[Any] = []
    for at, kept in takers:
        answer = answers[at]
        if type(answer) is tuple and kept is not None:
            # Taken apart for each, so that no two callers share a list or a dict.
            replies.append(found_or_fail(answer[0], answer[1], kept, epoch, now))
        elif kept is None and type(answer) is int and answer > 0:
            replies.append(Stored(epoch + answer))
        else:
            replies.append(not_found(answer))
    if Entry in map(type, replies):
        yield from _resolve(Session(connection, values.keys), values, batch, replies, takers)
    return replies


def _prepare(
    connection: Connection, values: Values, batch: Sequence[Request[Any]]
) -> tuple[bytes, int, list[tuple[int, bytes | None]]] | None:
    """Return the commands of a batch of plain requests in one piece, how many they are, and for each request the place of
    its answer, with what the entry keeps of the key (`None` for a write). Return `None` for any other batch."""
    head, tail, tagged = connection.head, values.keys.tail, values.memory.names
    if not head or len(batch) > COUNT_PART:
        return None
    connection.mark += 1
    commands = [b"mg %b v O%d\r\n" % (values.keys.generation_name, connection.mark)]
    reads: dict[str, int] = {}
    takers: list[tuple[int, bytes | None]] = []
    try:
        for request in batch:
            if type(request) is Get:
                key = request.key
                if key in tagged:
                    return None
                name, kept = tail(key)
                at = reads.get(name)
                if at is None:
                    at = reads[name] = len(commands)
                    commands.append(f"mg {head}{name} v c\r\n".encode())
                takers.append((at, kept))
            elif type(request) is Set:
                if request.only_if is not None or request.lease is not None or request.tags:
                    return None
                if (command := values.plain(connection, head, request)) is None:
                    return None
                reads.clear()  # What is read from here on is another value.
                takers.append((len(commands), None))
                commands.append(command)
            else:
                return None
    except CacheError:
        return None  # Each request is answered for itself there.
    data = b"".join(commands)
    if len(data) > READ_PART:
        return None
    return data, len(commands), takers


def _resolve(
    session: Session,
    values: Values,
    batch: Sequence[Request[Any]],
    replies: list[Any],
    takers: list[tuple[int, bytes | None]],
) -> Exchange[None]:
    """Find out what entries do not say by themselves."""
    direct = Direct(session, values, replies)
    for position, ((_, kept), request) in enumerate(zip(takers, batch, strict=True)):
        if type(reply := replies[position]) is Entry:
            direct.resolve_later(reply, position, getattr(request, "key", ""), kept or b"")
    with contextlib.suppress(NamespaceChanged):  # Cleared meanwhile: they are misses.
        yield from direct.resolve()


class Plan:
    """A batch for one server, on its way."""

    def __init__(self, connection: Connection, values: Values, batch: Sequence[Request[Any]]) -> None:
        self.replies: list[Any] = [None] * len(batch)
        self._batch = batch
        self._session = Session(connection, values.keys)
        self._values = values

    def run(self) -> Exchange[list[Reply]]:
        """Carry the batch out. What goes wrong is in the replies."""
        batch, at, end, first = self._batch, 0, len(self._batch), 0
        how: How = _direct
        try:
            while at < end:
                first, how = at, _how(batch[at])
                while at < end and _how(batch[at]) is how:
                    at += 1
                self._session.writing = False
                yield from how(self, first, at)
        except CacheError as error:
            if how is _direct:
                self.replies[first:at] = [None] * (at - first)  # Drafts, of which the answers are not known.
            self._give_up(error, at)
        return self.replies

    def _give_up(self, error: CacheError, end: int) -> None:
        """Answer what has no reply yet with the error. What lies before `end` may have been sent."""
        for at, request in enumerate(self._batch):
            if self.replies[at] is None:
                doubtful = at < end and self._session.writing and not request.IDEMPOTENT and error.transient
                self.replies[at] = Failed.of(in_doubt(error) if doubtful else error)

    def direct(self, first: int, end: int) -> Exchange[None]:
        """Carry out the requests from `first` to before `end`, which write without looking."""
        while True:
            try:
                yield from Direct(self._session, self._values, self.replies).run(self._batch, first, end)
                return
            except NamespaceChanged:
                self.replies[first:end] = [None] * (end - first)

    def updates(self, first: int, end: int) -> Exchange[None]:
        """Carry out requests that look at keys before they write."""
        yield from CasUpdate(KeyUpdates(self._session, self._values), self._batch, self.replies).run(first, end)

    def limits(self, first: int, end: int) -> Exchange[None]:
        """Carry out requests on rate limits."""
        yield from CasUpdate(LimitUpdates(self._session), self._batch, self.replies).run(first, end)

    def everything(self, first: int, end: int) -> Exchange[None]:
        """Carry out requests on all keys of the namespace, or of a tag."""
        for position in range(first, end):
            request: Any = self._batch[position]
            try:
                if isinstance(request, Clear):
                    yield from self._session.clear()
                    self.replies[position] = Cleared()
                else:
                    yield from invalidate(self._session, request.tags)
                    self.replies[position] = Invalidated()
            except CacheError as error:
                if self._session.connection.lost:
                    raise
                self.replies[position] = Failed.of(error)


How = Callable[[Plan, int, int], Exchange[None]]
"""A method that carries out the requests from one position to before another."""

_direct, _updates, _limits, _everything = Plan.direct, Plan.updates, Plan.limits, Plan.everything


def _how(request: Request[Any]) -> How:
    """Return the method that carries out a request and its neighbours of the same kind."""
    kind = type(request)
    if kind is Get:
        return _direct
    if kind is Admit:
        return _limits
    if kind is Clear or kind is InvalidateTags:
        return _everything
    return _updates if looks_first(request) else _direct


class Direct:
    """Reads, plain writes and removals that go in one piece: each command has a list of those that take its answer."""

    def __init__(self, session: Session, values: Values, replies: list[Any]) -> None:
        self._session = session
        self._connection = session.connection
        self._values = values
        self._memory = values.memory
        self._replies = replies
        self._head = ""
        self._commands: list[bytes] = []
        self._takers: list[tuple[int, Take, int, str, bytes]] = []
        self._reads: dict[str, int] = {}
        self._guessed: dict[str, None] = {}
        self._orphans: list[str] = []
        self._generations = Generations(session)
        self._unresolved: list[tuple[Entry, Take, int, str, bytes]] = []
        self._found: dict[int, dict[str, Found]] = {}
        self._deleted: dict[int, int] = {}
        self._now = 0.0

    def run(self, batch: Sequence[Request[Any]], first: int, end: int) -> Exchange[None]:
        """Carry out the requests from `first` to before `end`."""
        session, connection = self._session, self._connection
        self._head = connection.head if connection.generation else (yield from session.head())
        yield from self._make_tags(batch, first, end)
        for position in range(first, end):
            request = batch[position]
            try:
                if type(request) is Get:
                    self._read(request.key, self._got, position)
                else:
                    self._add(position, request)
            except CacheError as error:
                self._replies[position] = Failed.of(error)
        if self._commands:
            yield from self._ask()
        if self._unresolved:
            yield from self.resolve()
        for position, found in self._found.items():
            self._settle(position, FoundMany(found))
        for position, count in self._deleted.items():
            self._settle(position, Deleted(count))
        if self._orphans:
            yield from session.ask([f"md {self._head}{name}\r\n".encode() for name in self._orphans])

    def _ask(self) -> Exchange[None]:
        session, commands = self._session, self._commands
        guessed = self._generations.unknown(self._guessed) if self._guessed else []
        if guessed:
            commands = commands + self._generations.reading(self._head, guessed)
        session.writing = True
        answers = yield from session.ask(commands)
        session.writing = False
        if guessed:
            self._generations.learn(guessed, answers[len(self._commands) :])
        self._now = self._connection.now()
        for at, take, position, key, kept in self._takers:
            take(answers[at], position, key, kept)

    def _make_tags(self, batch: Sequence[Request[Any]], first: int, end: int) -> Exchange[None]:
        """Read the generations under which values are stored, before they are."""
        names: dict[str, None] = {}
        for position in range(first, end):
            request = batch[position]
            if type(request) is not Get and isinstance(request, Set | SetMany) and request.tags:
                with contextlib.suppress(CacheError):  # It is answered when the value is stored.
                    names.update(dict.fromkeys(map(self._values.keys.tag, request.tags)))
        if names:
            made = list(names)
            answers = yield from self._session.ask(self._generations.making(self._head, made))
            self._generations.learn_made(made, answers)

    # Commands

    def _add(self, position: int, request: Any) -> None:
        match request:
            case Set() | SetMany():
                self._set(position, request)
            case Exists(key=key):
                self._read(key, self._exists, position)
            case GetMany(keys=keys):
                self._valid(keys)
                self._found[position] = {}
                for key in dict.fromkeys(keys):
                    self._read(key, self._got_one, position)
            case Delete(key=key):
                self._delete(position, (key,))
            case DeleteMany(keys=keys):
                self._delete(position, keys)
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

    def _valid(self, keys: Sequence[str]) -> None:
        """Raise `CacheKeyError` if one of the keys is not valid, before anything is sent for the others."""
        for key in keys:
            self._values.keys.tail(key)

    def _read(self, key: str, take: Take, position: int) -> None:
        name, kept = self._values.keys.tail(key)
        if self._memory:
            self._guessed.update(dict.fromkeys(self._memory.of(key)))
        at = self._reads.get(name)
        if at is None:
            at = self._reads[name] = len(self._commands)
            self._commands.append(read(self._head + name))
        self._takers.append((at, take, position, key, kept))

    def _write(self, command: bytes, take: Take, position: int) -> None:
        if self._reads:
            self._reads.clear()  # What is read from here on is another value.
        self._takers.append((len(self._commands), take, position, "", b""))
        self._commands.append(command)

    def _set(self, position: int, request: Set | SetMany) -> None:
        values, connection = self._values, self._connection
        metadata = EntryMetadata(self._generations.current(request.tags)) if request.tags else NO_METADATA
        items = ((request.key, request.value),) if isinstance(request, Set) else tuple(request.items.items())
        expiry = values.expiry(request.ttl, connection.now())
        commands: list[bytes] = []
        for key, value in items:
            name = values.keys.tail(key)
            commands += values.commands(connection, self._head, name, encode_form(value), expiry, metadata)
        if isinstance(request, SetMany):
            self._replies[position] = StoredMany(len(items))
        for command in commands:
            self._write(command, self._stored, position)

    def _delete(self, position: int, keys: Sequence[str]) -> None:
        self._valid(keys)
        self._deleted[position] = 0
        for key in dict.fromkeys(keys):
            # Looked at before it is removed, because Memcached still has what has expired for its readers.
            self._read(key, self._removed, position)
            self._write(f"md {self._head}{self._values.keys.tail(key)[0]}\r\n".encode(), self._gone, position)

    # Answers

    def _got(self, answer: Any, position: int, key: str, kept: bytes) -> None:
        self._replies[position] = self._value(answer, self._got, position, key, kept)

    def _got_one(self, answer: Any, position: int, key: str, kept: bytes) -> None:
        """Take in one value of several."""
        reply = self._value(answer, self._got_one, position, key, kept)
        if isinstance(reply, Found):
            self._found[position][key] = reply
        elif type(reply) is Failed:
            self._replies[position] = reply

    def _value(self, answer: Answer | Found, take: Take, position: int, key: str, kept: bytes) -> Reply:
        if not isinstance(answer, tuple):
            return answer if isinstance(answer, Found) else not_found(answer)
        # Taken apart for each, so that no two callers share a list or a dict.
        reply = found_or_fail(answer[0], answer[1], kept, self._connection.epoch, self._now)
        if isinstance(reply, Entry):
            self._unresolved.append((reply, take, position, key, kept))
            return MISSING
        if self._guessed and self._memory.of(key):
            self._memory.note(key, ())
        return reply

    def _exists(self, answer: Any, position: int, key: str, kept: bytes) -> None:
        try:
            entry = self._entry(answer, self._exists, position, key, kept)
        except CacheError as error:
            self._replies[position] = Failed.of(error)
            return
        self._replies[position] = MISSING if entry is None else entry.present(self._connection.now())

    def _removed(self, answer: Any, position: int, key: str, kept: bytes) -> None:
        try:
            entry = self._entry(answer, self._removed, position, key, kept)
        except CacheError as error:
            if isinstance(answer, CacheError):
                self._replies[position] = Failed.of(error)
            return  # Not ours, and gone all the same.
        self._deleted[position] += entry is not None

    def _entry(self, answer: Answer | Entry, take: Take, position: int, key: str, kept: bytes) -> Entry | None:
        """Return the live entry of an answer; `None` for now if its tags have to be read first. Raises `CacheError`."""
        if isinstance(answer, Entry):
            return answer
        entry = entry_of(self._connection, kept, answer)
        if entry is not None and entry.form == CHUNKED and take == self._removed:
            self._orphans += chunk_tails(entry.body)
        if entry is not None and entry.metadata.tags:
            self._unresolved.append((entry, take, position, key, kept))
            return None
        return entry

    def _gone(self, answer: Any, position: int, key: str, kept: bytes) -> None:
        if isinstance(answer, CacheError):
            self._replies[position] = Failed.of(answer)

    def _stored(self, answer: Any, position: int, key: str, kept: bytes) -> None:
        if type(answer) is not int or answer <= 0:
            self._replies[position] = not_found(answer)
            return
        reply = self._replies[position]
        if reply is None or type(reply) is Stored:  # The last one is the entry's.
            self._replies[position] = Stored(self._connection.epoch + answer)

    def _settle(self, position: int, reply: Reply) -> None:
        """Answer a request with what all of its answers together say, unless one was a failure."""
        if self._replies[position] is None:
            self._replies[position] = reply

    # Entries that do not say everything by themselves

    def resolve_later(self, entry: Entry, position: int, key: str, kept: bytes) -> None:
        """Let `resolve` find out the value of an entry. Until then its reply is that there is none."""
        self._replies[position] = MISSING
        self._unresolved.append((entry, self._got, position, key, kept))

    def resolve(self) -> Exchange[None]:
        """Find out whether entries have their tags' generations, and what is in their chunks. Raises `NamespaceChanged`."""
        waiting, self._unresolved = self._unresolved, []
        names = [self._generations.names(entry.metadata.tags) for entry, *_ in waiting]
        yield from self._generations.read(name for each in names for name in each)
        for (entry, take, position, key, kept), its in zip(waiting, names, strict=True):
            if its:
                self._memory.note(key, its)
            if not self._generations.good(entry.metadata.tags):
                continue
            if take == self._exists or take == self._removed:
                take(entry, position, key, kept)
                continue
            try:
                content = yield from content_of(self._session, entry)
                if content is not None:
                    take(found_of(entry, decode_form(*content), self._connection.now()), position, key, kept)
            except CacheError as error:
                if self._connection.lost:
                    raise
                take(error, position, key, kept)
