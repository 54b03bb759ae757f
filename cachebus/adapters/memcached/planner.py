"""Translating requests to Memcached commands. A batch for one server takes as few round trips as its order allows.

Consecutive requests of one kind form a run. Reads, plain writes and removals are sent together (`Direct`); all others
use `update`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

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

from ..common.encoding import decode_form, encode_form
from .cas_updates import LimitUpdates, update
from .connection import Connection, Exchange, first_error, read
from .entry import CHUNKED, MISSING, NO_METADATA, Entry, EntryMetadata, found_of, found_or_fail
from .errors import BACKEND, in_doubt
from .key_updates import KeyUpdates, reads_first
from .session import COUNT_PART, READ_PART, Generations, NamespaceChanged, Session, invalidate
from .values import Values, chunk_reads, chunk_tails, entry_of, joined, not_found

Step: TypeAlias = Generator[list[bytes], Any, Any]
"""A generator for one request: it yields commands, receives their answers, and returns the reply.

All requests of a run advance together.
"""


def carry_out(values: Values, connection: Connection, batch: Sequence[Request[Any]]) -> Exchange[list[Reply]]:
    """Execute a batch. Errors are returned as replies.

    Most batches consist of reads and plain writes only, and are sent directly from here. If the generation of the
    namespace has changed, `plan` executes the batch again.
    """
    if not (prepared := _prepare(connection, values, batch)):
        return (yield from plan(connection, values, batch))
    data, count, takers = prepared
    mark = connection.mark
    try:
        answers = yield data, count
        if answers[0] != (connection.generation, mark):
            with contextlib.suppress(NamespaceChanged):
                yield from Session(connection, values.keys).check(answers[0])
            return (yield from plan(connection, values, batch))
    except CacheError as error:
        doubtful = in_doubt(error) if error.transient else error
        return [Failed.of(error if request.IDEMPOTENT else doubtful) for request in batch]
    epoch, now = connection.epoch, connection.now()
    replies: list[Any] = []
    for at, kept in takers:
        answer = answers[at]
        if type(answer) is tuple and kept is not None:
            # Decoded separately for each request, so that callers never share a list or a dict.
            replies.append(found_or_fail(answer[0], answer[1], kept, epoch, now))
        elif kept is None and type(answer) is int and answer > 0:
            replies.append(Stored(epoch + answer))
        else:
            replies.append(not_found(answer))
    if Entry in map(type, replies):
        yield from Direct(Session(connection, values.keys), values, replies).resolve(batch)
    return replies


def _prepare(
    connection: Connection, values: Values, batch: Sequence[Request[Any]]
) -> tuple[bytes, int, list[tuple[int, bytes | None]]] | None:
    """Return the commands of a batch of reads and plain writes, or `None` for any other batch.

    The result is the commands in one piece, their number, and for each request the index of its answer and the part
    of the key that the entry stores (`None` for a write).
    """
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
                reads.clear()  # Later reads may see another value.
                takers.append((len(commands), None))
                commands.append(command)
            else:
                return None
    except CacheError:
        return None  # `plan` replies to each request separately.
    data = b"".join(commands)
    if len(data) > READ_PART:
        return None
    return data, len(commands), takers


def plan(connection: Connection, values: Values, batch: Sequence[Request[Any]]) -> Exchange[list[Reply]]:
    """Execute a batch in runs of consecutive requests of one kind. Errors are returned as replies."""
    replies: list[Any] = [None] * len(batch)
    session = Session(connection, values.keys)
    at = first = 0
    kind = ""
    try:
        while at < len(batch):
            first, kind = at, _kind(batch[at])
            while at < len(batch) and _kind(batch[at]) == kind:
                at += 1
            session.writing = False
            if kind == "direct":
                yield from Direct(session, values, replies).run(batch, first, at)
            elif kind == "everything":
                for position in range(first, at):
                    replies[position] = yield from _on_everything(session, batch[position])
            else:
                make = partial(LimitUpdates if kind == "limits" else KeyUpdates, session, values)
                yield from update(make, session, batch, replies, list(range(first, at)))
    except CacheError as error:
        if kind == "direct":
            replies[first:at] = [None] * (at - first)  # Incomplete, because their answers are not known.
        # Requests before `at` may have been sent.
        for position, request in enumerate(batch):
            if replies[position] is None:
                doubtful = position < at and session.writing and not request.IDEMPOTENT and error.transient
                replies[position] = Failed.of(in_doubt(error) if doubtful else error)
    return replies


def _kind(request: Request[Any]) -> Literal["direct", "keys", "limits", "everything"]:
    kind = type(request)
    if kind is Admit:
        return "limits"
    if kind is Clear or kind is InvalidateTags:
        return "everything"
    return "keys" if reads_first(request) else "direct"


def _on_everything(session: Session, request: Any) -> Exchange[Reply]:
    """Execute a request on all keys of the namespace or of a tag."""
    try:
        if isinstance(request, Clear):
            yield from session.clear()
            return Cleared()
        yield from invalidate(session, request.tags)
        return Invalidated()
    except CacheError as error:
        if session.connection.lost:
            raise
        return Failed.of(error)


class Direct:
    """Executes reads, plain writes and removals. Equal reads share a command unless a write is between them."""

    def __init__(self, session: Session, values: Values, replies: list[Any]) -> None:
        self._session = session
        self._connection = session.connection
        self._values = values
        self._replies = replies
        self._head = session.connection.head
        self._guessed: dict[str, None] = {}
        self._generations = Generations(session)

    def run(self, batch: Sequence[Request[Any]], first: int, end: int) -> Exchange[None]:
        """Execute the requests from `first` up to, but not including, `end`."""
        while True:
            try:
                self._head = yield from self._session.head()
                yield from self._make_tags(batch[first:end])
                yield from self._together({position: self._step(batch[position]) for position in range(first, end)})
                return
            except NamespaceChanged:
                self._replies[first:end] = [None] * (end - first)
                self._generations = Generations(self._session)
                self._guessed = {}

    def resolve(self, batch: Sequence[Request[Any]]) -> Exchange[None]:
        """Replace the entries among the replies, which need their tags checked or their chunks read."""

        def resolved(key: str, entry: Entry) -> Step:
            return (yield from self._resolved({key: entry}))[key]

        steps: dict[int, Step] = {}
        for position, request in enumerate(batch):
            if type(entry := self._replies[position]) is Entry:
                self._replies[position] = MISSING
                steps[position] = resolved(getattr(request, "key", ""), entry)
        with contextlib.suppress(NamespaceChanged):  # The namespace was cleared meanwhile, so they are misses.
            yield from self._together(steps)

    def _together(self, steps: dict[int, Step]) -> Exchange[None]:
        """Send the commands of all steps together, repeatedly until all are done.

        Store the replies at their positions.
        """
        answers: dict[int, Any] = {}
        while True:
            commands: list[bytes] = []
            reads: dict[bytes, int] = {}
            places: dict[int, list[int]] = {}
            for position, step in steps.items():
                try:
                    wanted = step.send(answers.get(position))
                except StopIteration as done:
                    self._replies[position] = done.value
                    continue
                except CacheError as error:
                    self._replies[position] = Failed.of(error)
                    continue
                at = places[position] = []
                for command in wanted:
                    if not command.startswith(b"mg "):
                        reads.clear()  # Later reads may see another value.
                    elif command in reads:
                        at.append(reads[command])
                        continue
                    else:
                        reads[command] = len(commands)
                    at.append(len(commands))
                    commands.append(command)
            if not places:
                return
            guessed = [] if answers else self._generations.unknown(self._guessed)
            self._session.writing = not answers
            received = yield from self._session.ask(commands + self._generations.reading(self._head, guessed))
            self._session.writing = False
            self._generations.learn(guessed, received[len(commands) :])
            answers = {position: [received[each] for each in at] for position, at in places.items()}
            steps = {position: steps[position] for position in places}

    def _make_tags(self, requests: Sequence[Request[Any]]) -> Exchange[None]:
        """Read the generations of the tags of values before the values are stored."""
        names: dict[str, None] = {}
        for request in requests:
            if isinstance(request, Set | SetMany) and request.tags:
                with contextlib.suppress(CacheError):  # Reported when the value is stored.
                    names.update(dict.fromkeys(map(self._values.keys.tag, request.tags)))
        if names:
            made = list(names)
            answers = yield from self._session.ask(self._generations.making(self._head, made))
            self._generations.learn_made(made, answers)

    # The steps of requests

    def _step(self, request: Request[Any]) -> Step:
        match request:
            case Get(key=key):
                return (yield from self._read((key,)))[key]
            case GetMany(keys=keys):
                replies = yield from self._read(keys)
                failed = next((each for each in replies.values() if type(each) is Failed), None)
                return failed or FoundMany({key: each for key, each in replies.items() if isinstance(each, Found)})
            case Set() | SetMany():
                return (yield from self._set(request))
            case Exists(key=key):
                name, kept = self._name(key)
                (answer,) = yield [read(self._head + name)]
                entry = entry_of(self._connection, kept, answer, self._connection.now())
                if entry is not None and (yield from self._good({key: entry})):
                    return entry.present(self._connection.now())
                return MISSING
            case Delete(key=key):
                return (yield from self._delete((key,)))
            case DeleteMany(keys=keys):
                return (yield from self._delete(keys))
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

    def _name(self, key: str) -> tuple[str, bytes]:
        """Return the name suffix of a key to read, and the part of the key that its entry stores."""
        self._guessed.update(dict.fromkeys(self._values.memory.names.get(key, ())))
        return self._values.keys.tail(key)

    def _read(self, keys: Sequence[str]) -> Step:
        """Return the replies to reads, by key."""
        names = {key: self._name(key) for key in keys}
        answers = yield [read(self._head + name) for name, _ in names.values()]
        epoch, now = self._connection.epoch, self._connection.now()
        replies: dict[str, Any] = {}
        for (key, (_, kept)), answer in zip(names.items(), answers, strict=True):
            item: Any = answer
            if item.__class__ is not tuple:
                replies[key] = not_found(item)
                continue
            # Decoded separately for each request, so that callers never share a list or a dict.
            replies[key] = reply = found_or_fail(item[0], item[1], kept, epoch, now)
            if type(reply) is not Entry:
                self._values.memory.note(key, ())
        return (yield from self._resolved(replies))

    def _resolved(self, replies: dict[str, Any]) -> Step:
        """Replace the entries among these replies, after checking their tags and reading their chunks."""
        entries = {key: reply for key, reply in replies.items() if type(reply) is Entry}
        good = yield from self._good(entries)
        for key, entry in entries.items():
            replies[key] = MISSING
            if key not in good:
                continue
            try:
                chunks: list[Any] = (yield chunk_reads(self._head, entry)) if entry.form == CHUNKED else []
                if (content := joined(entry, chunks)) is not None:
                    replies[key] = found_of(entry, decode_form(*content), self._connection.now())
            except CacheError as error:
                replies[key] = Failed.of(error)
        return replies

    def _good(self, entries: dict[str, Entry]) -> Generator[list[bytes], Any, set[str]]:
        """Return the keys of the entries whose tags have the current generations."""
        for key, entry in entries.items():
            if entry.metadata.tags:
                self._values.memory.note(key, self._generations.names(entry.metadata.tags))
        tags = [tag for each in entries.values() for tag in each.metadata.tags]
        if tags and (unknown := self._generations.unknown(self._generations.names(tags))):
            self._generations.learn(unknown, (yield self._generations.reading(self._head, unknown)))
        return {key for key, entry in entries.items() if self._generations.good(entry.metadata.tags)}

    def _set(self, request: Set | SetMany) -> Step:
        values, connection = self._values, self._connection
        metadata = EntryMetadata(tags=self._generations.current(request.tags)) if request.tags else NO_METADATA
        items = {request.key: request.value} if isinstance(request, Set) else request.items
        expiry = values.expiry(request.ttl, connection.now())
        commands: list[bytes] = []
        for key, value in items.items():
            name = values.keys.tail(key)
            commands += values.commands(connection, self._head, name, encode_form(value), expiry, metadata)
        token: Any = 0
        for token in (yield commands):
            if type(token) is not int or token <= 0:
                return not_found(token)
        # The last answer is that of the entry.
        return Stored(connection.epoch + token) if isinstance(request, Set) else StoredMany(len(items))

    def _delete(self, keys: Sequence[str]) -> Step:
        """Remove entries. They are read first, because Memcached may still have expired entries, which do not count."""
        names = {key: self._name(key) for key in keys}
        commands: list[bytes] = []
        for name, _ in names.values():
            commands += (read(self._head + name), f"md {self._head}{name}\r\n".encode())
        answers = yield commands
        entries: dict[str, Entry] = {}
        for (key, (_, kept)), answer in zip(names.items(), answers[::2], strict=True):
            with contextlib.suppress(CacheError):  # Not written by cachebus, but removed anyway.
                if (entry := entry_of(self._connection, kept, answer, self._connection.now())) is not None:
                    entries[key] = entry
        deleted = len((yield from self._good(entries)))
        chunks = [name for each in entries.values() if each.form == CHUNKED for name in chunk_tails(each.body)]
        if chunks:
            yield [f"md {self._head}{name}\r\n".encode() for name in chunks]
        error = first_error(answers)
        return Failed.of(error) if error is not None else Deleted(deleted)
