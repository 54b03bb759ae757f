"""Updates of values that depend on what is there: conditional writes, touches and counts.

Memcached's own counters are not used: they know no negative numbers, wrap at 64 bits without a word, and hold nothing
but digits, so neither an expiry nor a version nor the key that a hash stands for. A value read and written back under its
CAS token has all of that, and costs one round trip more. Counts of one key in one batch are written as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachebus.messages import (
    Add,
    CacheError,
    CapabilityError,
    CompareAndSet,
    GetOrLease,
    Increment,
    Incremented,
    NotStored,
    Present,
    ReleaseLease,
    RenewLease,
    Reply,
    Request,
    Set,
    Stored,
    Touch,
    WrongType,
)

from .forms import INT, encode_form
from .memcached_cas_updates import Draft, outcome_of
from .memcached_chunks import chunk_tails
from .memcached_connection import Answer, Exchange, first_error, store, unlike
from .memcached_entry import CHUNKED, MISSING, NO_METADATA, Entry, EntryMetadata, kept_until, pack_entry, server_expiry
from .memcached_errors import BACKEND
from .memcached_lease_updates import LeaseDraft, LeaseUpdates
from .memcached_lookup import KeyItem, Lookup, over
from .memcached_session import Session
from .memcached_tags import Generations
from .memcached_values import Values

_VALUES = frozenset[type[Request[Any]]]({Add, CompareAndSet, Touch, Increment})
_LEASES = frozenset[type[Request[Any]]]({GetOrLease, RenewLease, ReleaseLease})


def looks_first(request: Request[Any]) -> bool:
    """Return whether a request depends on what is under its key."""
    if isinstance(request, Set):
        return request.only_if is not None or request.lease is not None
    return type(request) in _VALUES or type(request) in _LEASES


@dataclass(slots=True, eq=False)
class _Count(Draft):
    """A counter with its new value, its expiry and its metadata."""

    number: int
    expiry: float
    metadata: EntryMetadata


class _Touched(Draft):
    """An entry with another time to live."""

    __slots__ = ()


class KeyUpdates:
    """Decides what becomes of values and leases. Each round has a lookup of its own."""

    unversioned = False

    def __init__(self, session: Session, values: Values) -> None:
        self.session = session
        self._values = values
        self._connection = session.connection
        self._round = Lookup(session, values, "")
        self._after = Generations(session)
        self._names: list[str] = []

    # For the loop

    def lookup(
        self, waiting: list[tuple[int, Request[Any]]], replies: list[Any]
    ) -> Exchange[list[tuple[int, KeyItem]]]:
        self._round = Lookup(self.session, self._values, (yield from self.session.head()))
        return (yield from self._round.read(waiting, replies))

    def decide(self, request: Request[Any], item: KeyItem) -> Reply | Draft | None:
        # One new version a round: two writes of one key are two versions. Counts and touches have none of their own.
        match item.draft, request:
            case (None, _) | (_Count(), Increment()) | (_Touched(), Touch()):
                pass
            case _:
                return None
        if type(request) in _LEASES or (isinstance(request, Set) and request.lease is not None):
            return LeaseUpdates(self._round).decide(request, item)
        error = item.answer if isinstance(item.answer, CacheError) else item.error
        if error is not None:
            raise error
        entry = self._round.live(item)
        match request:
            case Set() | Add() | CompareAndSet():
                return self._store(request, item, entry)
            case Touch():
                return self._touch(request, item, entry)
            case Increment():
                return self._count(request, item, entry)
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

    def commands(self, items: list[KeyItem]) -> list[list[bytes]]:
        # The tags are read once more when all is stored: a caller that joined a load until then relies on it.
        self._after = Generations(self.session)
        drafts = [item.draft for item in items if isinstance(item.draft, LeaseDraft)]
        self._names = list(dict.fromkeys(name for draft in drafts for name in self._after.names(draft.tags)))
        return [*(item.draft.commands for item in items), self._after.reading(self._round.head, self._names)]

    def outcomes(self, items: list[KeyItem], answers: list[list[Answer]]) -> list[Reply | CacheError | None]:
        self._after.learn(self._names, answers.pop())
        return [self._outcome(item.draft, its) for item, its in zip(items, answers, strict=True)]

    def _outcome(self, draft: Draft, answers: list[Answer]) -> Reply | CacheError | None:
        # The last command is that of the entry.
        token = outcome_of(first_error(answers) or answers[-1])
        if not isinstance(token, int):
            return token
        if isinstance(draft, LeaseDraft) and not self._after.good(draft.tags):
            return NotStored(0.0, "lease_lost")
        return Stored(self._connection.epoch + token) if token or draft.reply else unlike()

    # Values

    def _store(self, request: Set | Add | CompareAndSet, item: KeyItem, entry: Entry | None) -> Reply | Draft:
        tags = self._round.generations.current(request.tags)
        metadata = EntryMetadata(tags) if tags else NO_METADATA
        version = 0.0 if entry is None else entry.version
        if isinstance(request, CompareAndSet):
            fits = entry is not None and version == request.version
        else:
            fits = (entry is None) == (isinstance(request, Add) or request.only_if == "absent")
        expiry = self._values.expiry(request.ttl, self._round.now)
        commands = self._commands(item, encode_form(request.value), expiry, metadata)
        return Draft(commands, None) if fits else NotStored(version)

    def _touch(self, request: Touch, item: KeyItem, entry: Entry | None) -> Reply | Draft:
        if entry is None:
            return MISSING
        now, head = self._round.now, self._round.head
        expiry = self._values.expiry(request.ttl, now)
        seconds = server_expiry(kept_until(expiry, entry.metadata), now)
        chunks = chunk_tails(entry.body) if entry.form == CHUNKED else []
        commands = [f"mg {head}{tail} T{seconds}\r\n".encode() for tail in chunks]
        # The version is kept: the item's own token is a new one.
        form = bytes((entry.form,)) + entry.body
        packed = pack_entry(form, item.kept, expiry, entry.stored_at, entry.version, entry.metadata)
        commands.append(store(head + item.tail, packed, seconds, over(item.answer)))
        draft: Draft = item.draft or _Touched(commands, None)
        draft.commands, draft.reply = commands, Present(entry.version, expiry - now if expiry else None)
        return draft

    def _count(self, request: Increment, item: KeyItem, entry: Entry | None) -> Reply | Draft:
        before: _Count | None = item.draft
        if before is not None:
            number, expiry, metadata = before.number + request.delta, before.expiry, before.metadata
        elif entry is not None:
            number, expiry, metadata = _integer(entry) + request.delta, entry.expiry, entry.metadata
        elif request.initial is None:
            return MISSING
        else:
            number, metadata = request.initial + request.delta, NO_METADATA
            expiry = self._values.expiry(request.ttl, self._round.now)
        if not -(2**63) <= number < 2**63:
            raise WrongType("increment leaves the range of a signed 64-bit integer; the value is unchanged")
        commands = self._commands(item, b"I%d" % number, expiry, metadata)
        draft = _Count(commands, Incremented(number), number, expiry, metadata)
        if before is not None:
            draft.replies = before.replies
        return draft

    def _commands(self, item: KeyItem, form: bytes, expiry: float, metadata: EntryMetadata) -> list[bytes]:
        name = item.tail, item.kept
        return self._values.commands(
            self._connection, self._round.head, name, form, expiry, metadata, over(item.answer)
        )


def _integer(entry: Entry) -> int:
    if entry.form == INT and len(entry.body) <= 20:
        try:
            return int(bytes(entry.body))
        except ValueError:
            pass
    raise WrongType("increment needs an int under the key")
