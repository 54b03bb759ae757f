"""Requests that look before they write: what is under the key is read, and written over only if it still stands there.

Memcached's own counters are not used: they know no negative numbers, run over at 64 bits without a word, and hold nothing
but digits, so neither an expiry nor a version nor the key that a hash stands for. A value read and written back under its
CAS token has all of that, and costs one round trip more; counts of one key in one batch are written as one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from cachebus.messages import (
    Add,
    CacheBackendError,
    CacheError,
    CapabilityError,
    CompareAndSet,
    Failed,
    Increment,
    Incremented,
    NotStored,
    Present,
    Reply,
    Request,
    Set,
    Stored,
    Touch,
    WrongType,
)

from .forms import INT, encode_form
from .memcached_chunks import chunk_tails
from .memcached_connection import EXISTS, MISS, NOT_STORED, Answer, Talk
from .memcached_entries import CHUNKED, MISSING, Entry, kept_until, pack_entry, server_expiry
from .memcached_errors import BACKEND
from .memcached_notes import NO_NOTES, Notes
from .memcached_session import Commands, Moved, Session, first_error
from .memcached_tags import Generations
from .memcached_values import Packed, Values, entry_of, not_found

TRIES = 100
"""How often a value is read and written back before others that write it all the time win, of this batch or not."""


def looks_first(request: Request[Any]) -> bool:
    """Whether a request is one of these."""
    return type(request) in _CAREFUL or (isinstance(request, Set) and request.only_if is not None)


_CAREFUL = frozenset[type[Request[Any]]]({Add, CompareAndSet, Touch, Increment})


class _State:
    """A key of which several requests may want something: what is under it, and what is to be."""

    __slots__ = (
        "answer",
        "before",
        "closed",
        "drafts",
        "expiry",
        "kept",
        "notes",
        "number",
        "packed",
        "tail",
        "touched",
    )

    def __init__(self, tail: str, kept: bytes) -> None:
        self.tail = tail
        self.kept = kept
        self.answer: Answer = MISS
        self.closed = False
        self.packed: Packed | None = None
        self.before: list[str] = []
        self.number: int | None = None
        self.touched = False
        self.expiry = 0.0
        self.notes = NO_NOTES
        self.drafts: dict[int, Reply | None] = {}

    def write(self, position: int, packed: Packed, reply: Reply | None) -> None:
        """Write this, and give the reply if it is written; `None` is `Stored`, at the version that it gets."""
        self.drafts[position] = reply
        self.packed = packed

    def commands(self, head: str) -> list[bytes]:
        assert self.packed is not None
        # What must still be so: there is nothing, or what was read.
        condition = b" C%d" % self.answer[1] if isinstance(self.answer, tuple) else b" ME"
        touches = [f"mg {head}{tail} T{self.packed.seconds}\r\n".encode() for tail in self.before]
        return touches + self.packed.commands(head, self.tail, condition)


def in_rounds(
    one_round: Callable[[list[int]], Talk[list[int]]], waiting: list[int], replies: list[Reply | None]
) -> Talk[None]:
    """Carry out the requests that stand at `waiting` in a batch: each round says which are to be tried again. Several writes
    of one key take a round each, and no more of them are done than would keep the others of the batch waiting too long."""
    for _ in range(TRIES):
        if not waiting:
            return
        with contextlib.suppress(Moved):
            waiting = yield from one_round(waiting)
    error = CacheBackendError(f"the key was written {TRIES} times before its turn came; nothing was done", BACKEND)
    for position in waiting:
        replies[position] = Failed.of(error)


class Rounds:
    """Carries such requests out, all of a run at once, in rounds of reading and writing."""

    def __init__(self, session: Session, values: Values, batch: Sequence[Request[Any]], replies: list[Any]) -> None:
        self._session = session
        self._connection = session.connection
        self._values = values
        self._batch = batch
        self._replies = replies
        self._generations = Generations(session)

    def run(self, first: int, end: int) -> Talk[None]:
        """Carry out the requests from `first` to before `end`."""
        yield from in_rounds(self._round, list(range(first, end)), self._replies)

    def _round(self, waiting: list[int]) -> Talk[list[int]]:
        """One try for the requests at these positions; those that have to be tried again."""
        head = yield from self._session.head()
        keyed = yield from self._look(waiting, head)
        again: list[int] = []
        for position, state in keyed:
            # One new version a round: two writes of one key are two versions. Counts and touches have none of their own.
            kind = type(self._batch[position])
            joins = kind is Increment if state.number is not None else kind is Touch and state.touched
            if state.closed or (state.drafts and not joins):
                state.closed = True
                again.append(position)
                continue
            try:
                self._decide(position, self._batch[position], state)
            except CacheError as error:
                self._replies[position] = Failed.of(error)
        writing = list({id(state): state for _, state in keyed if state.packed is not None}.values())
        if writing:
            again += yield from self._write(writing, head)
        return sorted(again)

    def _look(self, waiting: list[int], head: str) -> Talk[list[tuple[int, _State]]]:
        states: dict[tuple[str, bytes], _State] = {}
        keyed: list[tuple[int, _State]] = []
        commands = Commands()
        tags: dict[str, None] = {}
        for position in waiting:
            request: Any = self._batch[position]
            try:
                name = self._values.keys.tail(request.key)
                tags.update(dict.fromkeys(map(self._values.keys.tag, getattr(request, "tags", ()))))
            except CacheError as error:
                self._replies[position] = Failed.of(error)
                continue
            if name not in states:
                states[name] = _State(*name)
                commands.add(f"mg {head}{name[0]} v c\r\n".encode(), reads=True)
            keyed.append((position, states[name]))
        if states:
            generations = self._generations = Generations(self._session)
            generations.make(commands, head, list(tags))
            answers = yield from self._session.ask(commands)
            generations.learn_made(list(tags), answers[len(states) :])
            for state, answer in zip(states.values(), answers, strict=False):
                state.answer = answer
            yield from generations.read(name for state in states.values() for name in self._names(state))
        return keyed

    def _names(self, state: _State) -> tuple[str, ...]:
        """The names of the generations of what is under a key."""
        with contextlib.suppress(CacheError):  # Told to whoever asked.
            if (entry := entry_of(self._connection, state.kept, state.answer)) is not None and entry.notes.marks:
                return self._generations.names(entry.notes.marks)
        return ()

    def _write(self, writing: list[_State], head: str) -> Talk[list[int]]:
        """Write what was decided; the positions of requests that somebody came before."""
        commands, counts = Commands(), list[int]()
        for state in writing:
            written = state.commands(head)
            counts.append(len(written))
            for command in written:
                commands.add(command, reads=False)
        self._session.writing = True
        try:
            answers = yield from self._session.ask(commands)
        except Moved:
            return [position for state in writing for position in state.drafts]
        self._session.writing = False
        again: list[int] = []
        at = 0
        for state, count in zip(writing, counts, strict=True):
            mine, at = answers[at : at + count], at + count
            answer = first_error(mine) or mine[-1]
            if isinstance(answer, int) and answer > 0:
                for position, reply in state.drafts.items():
                    self._replies[position] = reply or Stored(self._connection.epoch + answer)
            elif answer in (MISS, NOT_STORED, EXISTS):
                again += state.drafts
            else:
                for position in state.drafts:
                    self._replies[position] = not_found(answer)
        return again

    def _decide(self, position: int, request: Request[Any], state: _State) -> None:
        """Say what becomes of a request, or what is to be written for it. Raises `CacheError`."""
        now = self._connection.now()
        entry = entry_of(self._connection, state.kept, state.answer) if state.number is None else None
        if entry is not None and not self._generations.good(entry.notes.marks):
            entry = None
        match request:
            case Set() | Add() | CompareAndSet():
                self._store(position, request, state, entry, now)
            case Touch():
                self._touch(position, request, state, entry, now)
            case Increment():
                self._count(position, request, state, entry, now)
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

    def _store(
        self, position: int, request: Set | Add | CompareAndSet, state: _State, entry: Entry | None, now: float
    ) -> None:
        notes = Notes(self._generations.present(request.tags)) if request.tags else NO_NOTES
        form = encode_form(request.value)
        version = 0.0 if entry is None else entry.version
        if isinstance(request, CompareAndSet):
            fits = entry is not None and version == request.version
        else:
            fits = (entry is None) == (isinstance(request, Add) or request.only_if == "absent")
        packed = self._values.pack(form, state.kept, self._values.expiry(request.ttl, now), self._connection, notes)
        if fits:
            state.write(position, packed, None)
        else:
            self._replies[position] = NotStored(version)

    def _touch(self, position: int, request: Touch, state: _State, entry: Entry | None, now: float) -> None:
        if entry is None:
            self._replies[position] = MISSING
            return
        if entry.form == CHUNKED:
            state.before = chunk_tails(entry.body)
        expiry = self._values.expiry(request.ttl, now)
        form = bytes((entry.form,)) + entry.body
        # The version is kept: the item's own token is a new one.
        notes = entry.notes
        packed = Packed(
            pack_entry(form, state.kept, expiry, entry.stored_at, entry.version, notes),
            server_expiry(kept_until(expiry, notes), now),
        )
        state.touched = True
        state.write(position, packed, Present(entry.version, expiry - now if expiry else None))

    def _count(self, position: int, request: Increment, state: _State, entry: Entry | None, now: float) -> None:
        if state.number is not None:
            number, expiry = state.number + request.delta, state.expiry
        elif entry is not None:
            if entry.form != INT:
                raise WrongType("increment needs an int under the key")
            number, expiry, state.notes = _integer(entry.body) + request.delta, entry.expiry, entry.notes
        elif request.initial is None:
            self._replies[position] = MISSING
            return
        else:
            number, expiry = request.initial + request.delta, self._values.expiry(request.ttl, now)
        if not -(2**63) <= number < 2**63:
            raise WrongType("increment leaves the range of a signed 64-bit integer; the value is unchanged")
        packed = self._values.pack(b"I%d" % number, state.kept, expiry, self._connection, state.notes)
        state.number, state.expiry = number, expiry
        state.write(position, packed, Incremented(number))


def _integer(body: memoryview) -> int:
    try:
        return int(bytes(body))
    except ValueError:
        raise WrongType("increment needs an int under the key") from None
