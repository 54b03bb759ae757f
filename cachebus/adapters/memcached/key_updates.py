"""Conditional writes, touches, counters and leases. Decision 27 explains the order of their commands.

The counters of Memcached are not used: they support no negative numbers, wrap at 64 bits, and cannot hold an expiry,
a version or a hashed key. Reading a value and writing it back under its CAS token supports all of these, and costs
one more round trip. Increments of one key in one batch are combined into one write.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

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

from ..common.encoding import INT, decode_form, encode_form
from ..common.validation import check_lease
from .cas_updates import Draft, outcome_of
from .connection import Answer, first_error, store, unlike
from .entry import (
    CHUNKED,
    MISSING,
    NO_METADATA,
    Entry,
    EntryLoad,
    EntryMetadata,
    found_of,
    kept_until,
    server_expiry,
)
from .errors import BACKEND
from .keys import ALL_TAGS
from .lookup import FAILURE_SHOWN, Held, KeyItem, Lookup, names_lease
from .session import Generations, Session
from .values import Values, chunk_tails

_READ_FIRST = frozenset[type[Request[Any]]](
    {Add, CompareAndSet, Touch, Increment, GetOrLease, RenewLease, ReleaseLease}
)


def reads_first(request: Request[Any]) -> bool:
    """True if a request depends on the current value of its key."""
    if isinstance(request, Set):
        return request.only_if is not None or request.lease is not None
    return type(request) in _READ_FIRST


class KeyUpdates:
    """The decider for values and leases, based on a `Lookup`."""

    unversioned = False

    def __init__(self, session: Session, values: Values) -> None:
        self._values = values
        self._connection = session.connection
        self._lookup = Lookup(session)
        self.lookup = self._lookup.read
        self._generations = self._lookup.generations
        self._after = Generations(session)
        self._names: list[str] = []

    def decide(self, request: Request[Any], item: KeyItem) -> Reply | Draft | None:
        # One new version per round, because two writes of a key create two versions. Increments and touches can be
        # combined.
        if item.draft is not None and item.draft.kind is not type(request):
            return None
        if isinstance(request, GetOrLease) or names_lease(request):
            for answer in (item.answer, item.refresh_answer):
                if isinstance(answer, CacheError):
                    raise answer
        match request:
            case GetOrLease():
                return self._lease(request, item)
            case RenewLease():
                return self._renew(request, item)
            case ReleaseLease():
                return self._release(request, item)
            case Set() if request.lease is not None:
                return self._commit(request, item, request.lease)
            case Set() | Add() | CompareAndSet():
                return self._store(request, item)
            case Touch():
                return self._touch(request, item)
            case Increment():
                return self._count(request, item)
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

    def commands(self, items: list[KeyItem]) -> list[list[bytes]]:
        # The generations are read again after the write: callers that joined the load until then rely on it.
        self._names = list(dict.fromkeys(name for item in items for name in self._after.names(item.draft.tags)))
        return [*(item.draft.commands for item in items), self._after.reading(self._lookup.head, self._names)]

    def outcomes(self, items: list[KeyItem], answers: list[list[Answer]]) -> list[Reply | CacheError | None]:
        self._after.learn(self._names, answers.pop())
        return [self._outcome(item.draft, its) for item, its in zip(items, answers, strict=True)]

    def _outcome(self, draft: Draft, answers: list[Answer]) -> Reply | CacheError | None:
        # The last command stores the entry.
        token = outcome_of(first_error(answers) or answers[-1])
        if not isinstance(token, int):
            return token
        if not self._after.good(draft.tags):
            return NotStored(0.0, "lease_lost")
        return Stored(self._connection.epoch + token) if token or draft.reply else unlike()

    # Values

    def _live(self, item: KeyItem) -> Entry | None:
        """Return the live entry of a key, or `None`. Raises `CacheError` if the item was not written by cachebus."""
        if item.error is not None:
            raise item.error
        return self._lookup.live(item)

    def _store(self, request: Set | Add | CompareAndSet, item: KeyItem) -> Reply | Draft:
        entry = self._live(item)
        tags = self._generations.current(request.tags)
        version = 0.0 if entry is None else entry.version
        if isinstance(request, CompareAndSet):
            fits = entry is not None and version == request.version
        else:
            fits = (entry is None) == (isinstance(request, Add) or request.only_if == "absent")
        expiry = self._values.expiry(request.ttl, self._lookup.now)
        metadata = EntryMetadata(tags=tags) if tags else NO_METADATA
        commands = self._commands(item, encode_form(request.value), expiry, metadata)
        return Draft(commands, None) if fits else NotStored(version)

    def _touch(self, request: Touch, item: KeyItem) -> Reply | Draft:
        if (entry := self._live(item)) is None:
            return MISSING
        now, head = self._lookup.now, self._lookup.head
        entry.expiry = self._values.expiry(request.ttl, now)
        seconds = server_expiry(kept_until(entry.expiry, entry.metadata), now)
        chunks = chunk_tails(entry.body) if entry.form == CHUNKED else []
        draft: Draft = item.draft or Draft([], None, kind=Touch)
        draft.commands = [f"mg {head}{tail} T{seconds}\r\n".encode() for tail in chunks]
        # Keeps the version, although the item gets a new CAS token.
        draft.commands.append(entry.put_back(head + item.tail, item.kept, now, over(item.answer)))
        draft.reply = entry.present(now)
        return draft

    def _count(self, request: Increment, item: KeyItem) -> Reply | Draft:
        entry, now = self._live(item), self._lookup.now
        if entry is not None:
            number = _integer(entry) + request.delta
        elif request.initial is None:
            return MISSING
        else:
            entry = Entry(INT, self._values.expiry(request.ttl, now), now, 0.0, memoryview(b""))
            number = request.initial + request.delta
        if not -(2**63) <= number < 2**63:
            raise WrongType("increment leaves the range of a signed 64-bit integer; the value is unchanged")
        draft: Draft = item.draft or Draft([], None, kind=Increment)
        draft.commands = self._commands(item, b"I%d" % number, entry.expiry, entry.metadata)
        draft.reply = Incremented(number)
        # The base of the next increment in this round.
        entry.body = memoryview(b"%d" % number)
        item.held, item.served = None, entry
        return draft

    def _commands(self, item: KeyItem, form: bytes, expiry: float, metadata: EntryMetadata) -> list[bytes]:
        name, condition = (item.tail, item.kept), over(item.answer)
        return self._values.commands(self._connection, self._lookup.head, name, form, expiry, metadata, condition)

    # Leases

    def _lease(self, request: GetOrLease, item: KeyItem) -> Reply | Draft:
        check_lease(request)
        now, live = self._lookup.now, self._lookup.live(item)
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
            # A repeated request gets the same lease again, on its original terms, because the load may have begun.
            if held.deadline > now:
                return LeaseGranted(held.token, stale)
            held = replace(held, deadline=now + request.lease_ttl)
        elif held is not None and self._lookup.current(held):
            if live is not None:
                return found_of(live, decode_form(*item.content), now)
            remaining = held.deadline - now
            return self._stale(item, held.token, remaining) or Loading(held.token, remaining)
        else:
            version = 0.0 if live is None else live.version
            tags = self._generations.current(request.tags)
            all_tags = self._generations.seen(ALL_TAGS)
            held = Held(new_lease_name(request.token), now + request.lease_ttl, version, all_tags, tags, b"", failed)
        return self._place(item, held, LeaseGranted(held.token, stale), refresh=live is not None)

    def _commit(self, request: Set, item: KeyItem, lease: str) -> Reply | Draft:
        if request.only_if is not None:
            raise BadMessage("only_if cannot be combined with a lease")
        now, held = self._lookup.now, self._held(lease, item)
        if held is None or held.deadline <= now:
            live = self._lookup.live(item)
            return NotStored(0.0 if live is None else live.version, "lease_lost")
        known = dict(held.tags)
        late = [tag for tag in request.tags if tag not in known]
        changed = late and (not held.all_tags or self._generations.seen(ALL_TAGS) != held.all_tags)
        if changed or not self._generations.good(held.tags):
            return self._end(item, NotStored(0.0, "lease_lost"), refresh=held is item.refresh_held)
        known |= dict(self._generations.current(late))
        tags = tuple([(tag, known[tag]) for tag in dict.fromkeys(request.tags)])
        expiry, load = self._values.expiry(request.ttl, now), None
        if (given := request.metadata) is not None:
            lifetime = float(round(expiry - now)) if expiry else None  # The server counts whole seconds.
            load = EntryLoad(given.load_time, given.stale_for, given.etag, lifetime)
        metadata = EntryMetadata(load, tags) if tags or load is not None else NO_METADATA
        # Replaces the lease, or the value that is being refreshed, if it has not changed since it was read.
        return Draft(self._commands(item, encode_form(request.value), expiry, metadata), None, tags)

    def _renew(self, request: RenewLease, item: KeyItem) -> Reply | Draft:
        check_lease(request)
        held = self._held(request.token, item)
        if held is None or not self._lookup.current(held):
            return NotHeld()
        renewed = replace(held, deadline=self._lookup.now + request.lease_ttl)
        return self._place(item, renewed, Renewed(request.lease_ttl), refresh=held is item.refresh_held)

    def _release(self, request: ReleaseLease, item: KeyItem) -> Reply | Draft:
        token = request.token
        # The token may be the requested name of the lease, if the caller did not receive the full name.
        for each in (item.held, item.refresh_held):
            if each is not None and asked_as(each.token) == request.token:
                token = each.token
        held = self._held(token, item)
        if held is None or held.ended:
            return NotHeld()
        current = self._lookup.current(held)
        if request.error and held is item.held and current:
            failed = replace(held, deadline=0.0, failed=(held.token, request.error))
            return self._place(item, failed, Released(), refresh=False)
        return self._end(item, Released() if current else NotHeld(), refresh=held is item.refresh_held)

    def _held(self, token: str, item: KeyItem) -> Held | None:
        """Return the lease with that name, either in the place of a value or of a live value, or `None`."""
        if item.held is not None and item.held.token == token:
            return item.held
        held, entry = item.refresh_held, item.entry
        if held is not None and held.token == token and entry is not None and item.held is None:
            return held if held.version == entry.version else None
        return None

    def _stale(self, item: KeyItem, lease: str, remaining: float) -> Stale | None:
        """Return the reply with the stale value, or `None` if there is none."""
        if (entry := item.served) is None:
            return None
        try:
            value = decode_form(*item.content)
        except CacheError:
            return None  # Damaged, so there is no stale value.
        load, tags = entry.metadata.load, tuple([tag for tag, _ in entry.metadata.tags])
        load_time, etag = (0.0, None) if load is None else (load.load_time, load.etag)
        return Stale(value, entry.version, tags, entry.stored_at, load_time, etag, lease, remaining)

    def _place(self, item: KeyItem, held: Held, reply: Reply, *, refresh: bool) -> Draft:
        """Write a lease: in the place of the key's value, including the stale entry, or as a separate item."""
        now = self._lookup.now
        keep, tail, answer, stale = held.deadline or now + FAILURE_SHOWN, item.tail, item.answer, b""
        if refresh:
            tail, answer = item.refresh, item.refresh_answer
            stale = held.stale
        elif (served := item.served) is not None:
            stale = served.packed(item.kept)
            keep = max(keep, kept_until(served.expiry, served.metadata))
        packed = held.item(item.kept, stale)
        if len(packed) > self._connection.entry_max:
            packed = held.item(item.kept, b"")  # Both do not fit, so the stale value is dropped.
        return Draft([store(self._lookup.head + tail, packed, server_expiry(keep, now), over(answer))], reply)

    def _end(self, item: KeyItem, reply: Reply, *, refresh: bool) -> Draft:
        """Remove a lease, and restore the stale entry if there is one."""
        tail, answer = (item.refresh, item.refresh_answer) if refresh else (item.tail, item.answer)
        name = self._lookup.head + tail
        if refresh or item.served is None:
            return Draft([f"md {name}{over(answer).decode()}\r\n".encode()], reply)
        return Draft([item.served.put_back(name, item.kept, self._lookup.now, over(answer))], reply)


def over(answer: Answer) -> bytes:
    """Return the condition that the item is unchanged since it was read, or still missing."""
    return b" C%d" % answer[1] if isinstance(answer, tuple) else b" ME"


def _integer(entry: Entry) -> int:
    if entry.form == INT and len(entry.body) <= 20:
        try:
            return int(bytes(entry.body))
        except ValueError:
            pass
    raise WrongType("increment needs an int under the key")
