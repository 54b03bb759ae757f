"""From requests to Memcached commands and back: a batch for one server becomes as few round trips as keep its order.

Neighbours of one kind form a run. Reads, plain writes and removals go in one piece (`Direct`), the others by `update`.
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
from .key_updates import KeyUpdates, looks_first
from .session import COUNT_PART, READ_PART, Generations, NamespaceChanged, Session, invalidate
from .values import Values, chunk_reads, chunk_tails, entry_of, joined, not_found

Step: TypeAlias = Generator[list[bytes], Any, Any]
"""A request on its way: commands, their answers, and the reply at the end. All requests of a run take their steps together."""


def carry_out(values: Values, connection: Connection, batch: Sequence[Request[Any]]) -> Exchange[list[Reply]]:
    """Carry a batch out. What goes wrong is in the replies.

    Batches of nothing but reads and plain writes, which are nearly all, are sent straight from here. If they need more, they
    take the way of all others: reads are repeated, and so are writes for a generation that has ended.
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
            # Taken apart for each, so that no two callers share a list or a dict.
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


def plan(connection: Connection, values: Values, batch: Sequence[Request[Any]]) -> Exchange[list[Reply]]:
    """Carry a batch out, in runs of neighbours of one kind. What goes wrong is in the replies."""
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
            replies[first:at] = [None] * (at - first)  # Drafts, of which the answers are not known.
        # What lies before `at` may have been sent.
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
    return "keys" if looks_first(request) else "direct"


def _on_everything(session: Session, request: Any) -> Exchange[Reply]:
    """Carry out a request on all keys of the namespace, or of a tag."""
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
    """Reads, plain writes and removals. Equal reads share a command, unless something is written between them."""

    def __init__(self, session: Session, values: Values, replies: list[Any]) -> None:
        self._session = session
        self._connection = session.connection
        self._values = values
        self._replies = replies
        self._head = session.connection.head
        self._guessed: dict[str, None] = {}
        self._generations = Generations(session)

    def run(self, batch: Sequence[Request[Any]], first: int, end: int) -> Exchange[None]:
        """Carry out the requests from `first` to before `end`."""
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
        """Replace the entries among the replies, which do not say everything by themselves."""

        def resolved(key: str, entry: Entry) -> Step:
            return (yield from self._resolved({key: entry}))[key]

        steps: dict[int, Step] = {}
        for position, request in enumerate(batch):
            if type(entry := self._replies[position]) is Entry:
                self._replies[position] = MISSING
                steps[position] = resolved(getattr(request, "key", ""), entry)
        with contextlib.suppress(NamespaceChanged):  # Cleared meanwhile: they are misses.
            yield from self._together(steps)

    def _together(self, steps: dict[int, Step]) -> Exchange[None]:
        """Send the commands of all steps in one piece, as often as there are more. The replies come to their positions."""
        answers: dict[int, Any] = {}
        while True:
            commands: list[bytes] = []
            reads: dict[bytes, int] = {}
            places: dict[int, list[int]] = {}
            for position, step in steps.items():
                try:
                    asked = step.send(answers.get(position))
                except StopIteration as done:
                    self._replies[position] = done.value
                    continue
                except CacheError as error:
                    self._replies[position] = Failed.of(error)
                    continue
                at = places[position] = []
                for command in asked:
                    if not command.startswith(b"mg "):
                        reads.clear()  # What is read from here on is another value.
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
            told = yield from self._session.ask(commands + self._generations.reading(self._head, guessed))
            self._session.writing = False
            self._generations.learn(guessed, told[len(commands) :])
            answers = {position: [told[each] for each in at] for position, at in places.items()}
            steps = {position: steps[position] for position in places}

    def _make_tags(self, requests: Sequence[Request[Any]]) -> Exchange[None]:
        """Read the generations under which values are stored, before they are."""
        names: dict[str, None] = {}
        for request in requests:
            if isinstance(request, Set | SetMany) and request.tags:
                with contextlib.suppress(CacheError):  # It is answered when the value is stored.
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
        """Return what follows the generation in the name of a key that is read, and what its entry keeps of the key."""
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
            # Taken apart for each, so that no two callers share a list or a dict.
            replies[key] = reply = found_or_fail(item[0], item[1], kept, epoch, now)
            if type(reply) is not Entry:
                self._values.memory.note(key, ())
        return (yield from self._resolved(replies))

    def _resolved(self, replies: dict[str, Any]) -> Step:
        """Replace the entries among these replies: their tags are looked at, and their chunks read."""
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
        """Return the keys whose entries have the present generations of their tags."""
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
        # The last one is the entry's.
        return Stored(connection.epoch + token) if isinstance(request, Set) else StoredMany(len(items))

    def _delete(self, keys: Sequence[str]) -> Step:
        """Remove entries. They are read first: Memcached still has those whose time is up for readers."""
        names = {key: self._name(key) for key in keys}
        commands: list[bytes] = []
        for name, _ in names.values():
            commands += (read(self._head + name), f"md {self._head}{name}\r\n".encode())
        answers = yield commands
        entries: dict[str, Entry] = {}
        for (key, (_, kept)), answer in zip(names.items(), answers[::2], strict=True):
            with contextlib.suppress(CacheError):  # Not ours, and gone all the same.
                if (entry := entry_of(self._connection, kept, answer, self._connection.now())) is not None:
                    entries[key] = entry
        deleted = len((yield from self._good(entries)))
        chunks = [name for each in entries.values() if each.form == CHUNKED for name in chunk_tails(each.body)]
        if chunks:
            yield [f"md {self._head}{name}\r\n".encode() for name in chunks]
        error = first_error(answers)
        return Failed.of(error) if error is not None else Deleted(deleted)
