"""Updates of values that depend on what is there: conditional writes, touches and counts; and those of leases: who may load a
key, and what a load may store. Decision 27 has the interleavings that the order of their commands is about.

Memcached's own counters are not used: they know no negative numbers, wrap at 64 bits without a word, and hold nothing
but digits, so neither an expiry nor a version nor the key that a hash stands for. A value read and written back under its
CAS token has all of that, and costs one round trip more. Counts of one key in one batch are written as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachebus.messages import (
    Add,
    BadMessage,
    CacheError,
    CapabilityError,
    CompareAndSet,
    GetOrLease,
    Increment,
    Incremented,
    LeaseGranted,
    LoaderFailed,
    Loading,
    NotHeld,
    NotStored,
    Present,
    Released,
    ReleaseLease,
    Renewed,
    RenewLease,
    Reply,
    Request,
    Set,
    Stale,
    Stored,
    Touch,
    WrongType,
)
from cachebus.messages.leases import asked_as, new_lease_name

from .forms import INT, decode_form, encode_form
from .lease_checks import check_lease
from .memcached_cas_updates import Draft, outcome_of
from .memcached_connection import Answer, Exchange, first_error, store, unlike
from .memcached_entry import (
    CHUNKED,
    MISSING,
    NO_METADATA,
    Entry,
    EntryMetadata,
    TagVersions,
    found_of,
    kept_until,
    pack_entry,
    server_expiry,
)
from .memcached_errors import BACKEND
from .memcached_keys import ALL_TAGS
from .memcached_leases import FAILURE_SHOWN, Held, stale_of
from .memcached_lookup import KeyItem, Lookup, over
from .memcached_session import Session
from .memcached_tags import Generations
from .memcached_values import Values, chunk_tails

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
        if item.error is not None:
            raise item.error
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


# Leases


@dataclass(slots=True, eq=False)
class LeaseDraft(Draft):
    """What is to be written for a load. A value is only stored if its tags' generations are the present ones even after."""

    tags: TagVersions = ()


class LeaseUpdates:
    """Decides what becomes of requests about leases, by what a lookup has read."""

    def __init__(self, looked: Lookup) -> None:
        self._looked = looked
        self._head = looked.head
        self._now = looked.now
        self._values = looked.values
        self._connection = looked.connection
        self._generations = looked.generations

    def decide(self, request: Request[Any], item: KeyItem) -> Reply | Draft:
        """Return the reply, or what is to be written for it. Raises `CacheError`."""
        for answer in (item.answer, item.refresh_answer):
            if isinstance(answer, CacheError):
                raise answer
        match request:
            case GetOrLease():
                return self._lease(request, item)
            case Set():
                return self._commit(request, item)
            case RenewLease():
                return self._renew(request, item)
            case ReleaseLease():
                return self._release(request, item)
            case _:
                raise BadMessage(f"{type(request).__name__} is not about leases")

    def _lease(self, request: GetOrLease, item: KeyItem) -> Reply | Draft:
        check_lease(request)
        now, live = self._now, self._looked.live(item)
        if live is not None and not request.refresh:
            return found_of(live, decode_form(*item.content), now)
        held = item.refresh_held if live is not None else item.held
        if live is not None and held is not None and held.version != live.version:
            held = None
        stale = self._stale(item, "", 0.0) if live is None else None
        failed = ("", "") if held is None else held.failed
        if request.after and failed[0] == request.after:
            raise LoaderFailed(error=failed[1])
        good = held is not None and not held.ended and self._generations.good(held.tags)
        if held is not None and good and asked_as(held.token) == request.token:
            # Asked for twice, it is granted twice, on the terms of the first time: the load may have begun by then.
            if held.deadline > now:
                return LeaseGranted(held.token, stale)
            held = held.until(now + request.lease_ttl)
        elif held is not None and self._looked.current(held):
            if live is not None:
                return found_of(live, decode_form(*item.content), now)
            remaining = held.deadline - now
            return self._stale(item, held.token, remaining) or Loading(held.token, remaining)
        else:
            version = 0.0 if live is None else live.version
            tags = self._generations.current(request.tags)
            all_tags = self._generations.seen(ALL_TAGS)
            name = new_lease_name(request.token)
            held = Held(name, now + request.lease_ttl, version, all_tags, tags, failed=failed)
        return self._place(item, held, LeaseGranted(held.token, stale), refresh=live is not None)

    def _commit(self, request: Set, item: KeyItem) -> Reply | Draft:
        if request.only_if is not None:
            raise BadMessage("a value that is stored under a lease has no other condition")
        held = self._held(request.lease or "", item)
        if held is None or held.deadline <= self._now:
            live = self._looked.live(item)
            return NotStored(0.0 if live is None else live.version, "lease_lost")
        known = dict(held.tags)
        late = [tag for tag in request.tags if tag not in known]
        changed = late and (not held.all_tags or self._generations.seen(ALL_TAGS) != held.all_tags)
        if changed or not self._generations.good(held.tags):
            return self._end(item, NotStored(0.0, "lease_lost"), refresh=held is item.refresh_held)
        known |= dict(self._generations.current(late))
        tags = tuple([(tag, known[tag]) for tag in dict.fromkeys(request.tags)])
        expiry = self._values.expiry(request.ttl, self._now)
        metadata = NO_METADATA
        if tags or request.metadata is not None:
            metadata = EntryMetadata(tags, request.metadata, self._values.lifetime(request.ttl))
        # Over the lease, or over the value that is being refreshed, if it is still the one that was looked at.
        name, condition = (item.tail, item.kept), over(item.answer)
        form = encode_form(request.value)
        commands = self._values.commands(self._connection, self._head, name, form, expiry, metadata, condition)
        return LeaseDraft(commands, None, tags)

    def _renew(self, request: RenewLease, item: KeyItem) -> Reply | Draft:
        check_lease(request)
        held = self._held(request.token, item)
        if held is None or not self._looked.current(held):
            return NotHeld()
        refresh = held is item.refresh_held
        return self._place(item, held.until(self._now + request.lease_ttl), Renewed(request.lease_ttl), refresh=refresh)

    def _release(self, request: ReleaseLease, item: KeyItem) -> Reply | Draft:
        token = request.token
        # It may be what the lease was asked for as, if the caller was not told its name.
        for each in (item.held, item.refresh_held):
            if each is not None and asked_as(each.token) == request.token:
                token = each.token
        held = self._held(token, item)
        if held is None or held.ended:
            return NotHeld()
        if request.error and held is item.held and self._looked.current(held):
            return self._place(item, held.with_error(request.error), Released(), refresh=False)
        reply = Released() if self._looked.current(held) else NotHeld()
        return self._end(item, reply, refresh=held is item.refresh_held)

    def _held(self, token: str, item: KeyItem) -> Held | None:
        """Return the lease of that name, in the place of a value or beside one."""
        if item.held is not None and item.held.token == token:
            return item.held
        held, entry = item.refresh_held, item.entry
        if held is not None and held.token == token and entry is not None and item.held is None:
            return held if held.version == entry.version else None
        return None

    def _stale(self, item: KeyItem, lease: str, remaining: float) -> Stale | None:
        if item.served is None:
            return None
        try:
            return stale_of(item.served, decode_form(*item.content), lease, remaining)
        except CacheError:
            return None  # Damaged, and so nothing to serve.

    def _place(self, item: KeyItem, held: Held, reply: Reply, *, refresh: bool) -> Draft:
        """Write a lease: in the place of the key's value with what is stale, or beside it."""
        keep, tail, answer, stale = held.deadline or self._now + FAILURE_SHOWN, item.tail, item.answer, b""
        if refresh:
            tail, answer = item.refresh, item.refresh_answer
            stale = held.stale
        elif (served := item.served) is not None:
            stale = served.packed(item.kept)
            keep = max(keep, served.kept_until())
        packed = held.pack(item.kept, stale)
        if len(packed) > self._connection.entry_max:
            packed = held.pack(item.kept, b"")  # No room for both: the stale value goes.
        return LeaseDraft([store(self._head + tail, packed, server_expiry(keep, self._now), over(answer))], reply)

    def _end(self, item: KeyItem, reply: Reply, *, refresh: bool) -> Draft:
        """Remove a lease, and put back what is stale."""
        tail, answer = (item.refresh, item.refresh_answer) if refresh else (item.tail, item.answer)
        served = None if refresh else item.served
        if served is None:
            return LeaseDraft([f"md {self._head}{tail}{over(answer).decode()}\r\n".encode()], reply)
        seconds = server_expiry(served.kept_until(), self._now)
        return LeaseDraft([store(self._head + tail, served.packed(item.kept), seconds, over(answer))], reply)
