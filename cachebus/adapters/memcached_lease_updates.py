"""Updates of leases: who may load a key, and what a load may store.

Decision 27 has the interleavings that the order of the commands is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachebus.messages import (
    BadMessage,
    CacheError,
    GetOrLease,
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
)
from cachebus.messages.lease_names import asked_as, new_lease_name

from .forms import decode_form, encode_form
from .lease_checks import check_lease
from .memcached_cas_updates import Draft
from .memcached_connection import store
from .memcached_entry import NO_METADATA, EntryMetadata, TagVersions, found_of, server_expiry
from .memcached_keys import ALL_TAGS
from .memcached_leases import FAILURE_SHOWN, Held, stale_of
from .memcached_lookup import KeyItem, Lookup, over


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
