"""Leases of a memory store: granting, waiting callers, and revocation.

Based on Nishtala et al., "Scaling Memcache at Facebook" (NSDI 2013): a delete revokes the lease of a load in progress,
so that a value loaded before the delete is never stored after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from cachebus.actors.ports import DeferredReply, TimerQueue
from cachebus.messages import (
    BadMessage,
    CacheError,
    Failed,
    Found,
    GetOrLease,
    LeaseGranted,
    LoaderFailed,
    Loading,
    NotHeld,
    NotStored,
    Overloaded,
    Released,
    ReleaseLease,
    Renewed,
    RenewLease,
    Reply,
    Set,
    Stale,
    Stored,
)
from cachebus.messages.leases import new_lease_name

from ..common.validation import check_lease
from .entries import EntryTable
from .eviction import Entry


@dataclass(slots=True, eq=False)
class Waiter:
    """A waiting caller: its request, the port for the reply, and the end of the wait."""

    request: GetOrLease
    port: DeferredReply
    until: float


@dataclass(slots=True, eq=False)
class Lease:
    """The right to load a key, and the callers that wait for it.

    `granted` is the version of the store when the lease was granted, and `token` is the name of the lease.
    """

    request: GetOrLease
    granted: float
    expires_at: float
    token: str
    waiters: list[Waiter] = field(default_factory=list)


class LeaseTable:
    """Leases of one store: at most `max_leases` leases and `max_waiters` waiting callers.

    A value is stored under a lease only if its key was not invalidated since the lease was granted.

    A lease is *current* until it ends, is revoked, or expires. A revoked lease with waiters is kept, because its loader
    may still deliver the value to them. If that does not happen in time, their requests are processed again.
    """

    def __init__(
        self, table: EntryTable, *, max_leases: int = 10_000, max_waiters: int = 10_000, max_tags: int = 10_000
    ) -> None:
        self._table = table
        self._max_leases = max_leases
        self._max_waiters = max_waiters
        self._max_tags = max_tags
        self.by_key: dict[str, Lease] = {}  # Public, because the store checks on each write if it is empty.
        self._revoked: dict[str, Lease] = {}
        # All waiting callers, each until it is answered, so that an interrupted turn cannot lose one.
        self._parked: dict[Waiter, None] = {}
        self.granting: Lease | None = None  # A new lease that its caller has not received yet.
        self._tagged: dict[str, set[str]] = {}
        # Maps a tag to the version of its last invalidation during a lease. If there are too many, `_floor` replaces
        # them.
        self._invalidated_tags: dict[str, float] = {}
        self._floor = 0.0
        # Only leases with waiters. The expiry of other leases is checked on access.
        self._due: TimerQueue[Lease] = TimerQueue()
        self.due = self._due.due  # Returns the time of the next `advance`, or infinity if no caller waits.

    def __repr__(self) -> str:
        return f"<LeaseTable {len(self.by_key)}/{self._max_leases} leases, {len(self._parked)}/{self._max_waiters} waiting>"

    # Requests

    def get_or_lease(self, request: GetOrLease) -> Reply | DeferredReply:
        check_lease(request)
        now, defer = self._table.now(), self._table.defer
        reply = self._read_or_lease(request, now)
        if type(reply) in (Loading, Stale) and request.wait > 0 and defer is not None:
            lease = self.by_key[request.key]
            if lease.request.owner != request.owner and len(self._parked) < self._max_waiters:
                port = defer()
                self._park(lease, Waiter(request, port, now + request.wait))
                return port
        return reply

    def renew(self, request: RenewLease) -> Renewed | NotHeld:
        """Extend a lease. A revoked lease is extended for its waiters, but the reply is `NotHeld`."""
        now = self._table.now()
        lease = self.held(request.key, request.token, now)
        if (kept := lease or self._revoked.get(request.token)) is not None:
            kept.expires_at = now + request.lease_ttl
        return NotHeld() if lease is None else Renewed(request.lease_ttl)

    def release(self, request: ReleaseLease) -> Released | NotHeld:
        """Release a lease and answer its waiters."""
        now = self._table.now()
        token = self._name_of(request.key, request.token)
        lease = self.held(request.key, token, now)
        if lease is not None:
            self.take(lease)
        if (ended := lease or self._take_revoked(request.key, token)) is None:
            self._withdraw(request.key, request.token)
        elif request.late is not None:
            self.deliver_late(ended, request.late, now)
        elif request.error:
            self.answer_all(ended, Failed.of(LoaderFailed(error=request.error)))
        else:
            self._answer_all_again(ended, now)
        return NotHeld() if lease is None else Released()

    def set_leased(self, request: Set, token: str, now: float) -> Stored | NotStored:
        """Store a loaded value if its lease is still held."""
        if request.only_if is not None:
            raise BadMessage("lease and only_if cannot be combined")
        late = Found(request.value, 0.0, None, request.tags)
        lease = self.held(request.key, token, now)
        lost = lease is None or self.was_lost(lease, request.tags)
        if lease is not None:
            self.take(lease)
        if lease is None or lost:
            if (ended := lease or self._take_revoked(request.key, token)) is not None:
                self.deliver_late(ended, late, now)
            entry = self._table.live(request.key, now)
            return NotStored(0.0 if entry is None else entry.version, "lease_lost")
        try:
            entry = self._table.write(request.key, request.value, request.ttl, request.tags, now)
        except CacheError:
            self.deliver_late(lease, late, now)
            raise
        if request.metadata is not None:
            self._table.keep_metadata(entry, request.metadata, now)
        if lease.waiters:
            self.answer_all(lease, self._table.found(entry, now))
        return Stored(entry.version)

    def on_overwrite(self, entry: Entry) -> None:
        """End the load of a key that another caller has written."""
        if (lease := self.by_key.get(entry.key)) is not None:
            self.take(lease)
            self.answer_all(lease, self._table.found(entry, self._table.now()))

    # Granting

    def _read_or_lease(self, request: GetOrLease, now: float) -> Found | LeaseGranted | Loading | Stale:
        table = self._table
        entry = table.live(request.key, now)
        if entry is not None and not request.refresh:
            return table.found(entry, now)
        lease = self.by_key.get(request.key)
        if lease is not None and lease.expires_at <= now and not lease.waiters:
            self.take(lease)
            lease = None
        if lease is None:
            lease = self.grant(request, table.version, now)
        if lease.request.token == request.token:
            granted = LeaseGranted(lease.token, table.stale(request.key, now))
            self.granting = None
            return granted
        if entry is not None:
            return table.found(entry, now)
        remaining = max(0.0, lease.expires_at - now)
        return table.stale(request.key, now, lease.token, remaining) or Loading(lease.token, remaining)

    def grant(self, request: GetOrLease, version: float, now: float) -> Lease:
        """Create a lease for a key that has none. Raises `Overloaded` if there are too many leases."""
        if len(self.by_key) >= self._max_leases:
            for lease in [each for each in self.by_key.values() if each.expires_at <= now and not each.waiters]:
                self.take(lease)
            if len(self.by_key) >= self._max_leases:
                raise Overloaded(f"the maximum of {self._max_leases} keys are being loaded", "", self._max_leases)
        lease = self.granting = Lease(request, version, now + request.lease_ttl, new_lease_name(request.token))
        self.by_key[request.key] = lease
        for tag in request.tags:
            self._tagged.setdefault(tag, set()).add(request.key)
        return lease

    # Ending

    def held(self, key: str, token: str, now: float) -> Lease | None:
        """Return the lease of a key if its name is `token` and it has not expired."""
        lease = self.by_key.get(key)
        return lease if lease is not None and lease.token == token and lease.expires_at > now else None

    def take(self, lease: Lease) -> None:
        """End a current lease. The caller must answer its waiters."""
        del self.by_key[lease.request.key]
        for tag in lease.request.tags:
            if (keys := self._tagged.get(tag)) is not None:  # `None` if a request lists the same tag twice.
                keys.discard(lease.request.key)
                if not keys:
                    del self._tagged[tag]
        if not self.by_key:
            self._invalidated_tags.clear()
            self._floor = 0.0

    def _take_revoked(self, key: str, token: str) -> Lease | None:
        """Remove a revoked lease that has waiters. The caller must answer them."""
        lease = self._revoked.get(token)
        return self._revoked.pop(token) if lease is not None and lease.request.key == key else None

    def _name_of(self, key: str, asked: str) -> str:
        """Return the name of the lease requested with the token `asked`, current or revoked.

        If there is none, return `asked`.
        """
        lease = self.by_key.get(key)
        if lease is not None and lease.request.token == asked:
            return lease.token
        return next((each.token for each in self._revoked.values() if each.request.token == asked), asked)

    # Waiting

    def _park(self, lease: Lease, waiter: Waiter) -> None:
        self._parked[waiter] = None
        lease.waiters.append(waiter)
        when = min(lease.expires_at, waiter.until)
        if self._due.set_earlier(lease, when):
            self._table.announce_due(when)

    def _answer(self, waiter: Waiter, reply: Reply) -> None:
        waiter.port.answer(reply)
        self._parked.pop(waiter, None)

    def answer_all(self, lease: Lease, reply: Reply) -> None:
        """Send the same reply to all waiters of a lease."""
        for waiter in self._take_waiters(lease):
            self._answer(waiter, reply)

    def _answer_all_again(self, lease: Lease, now: float) -> None:
        for waiter in self._take_waiters(lease):
            self._answer_again(waiter, now)

    def _answer_again(self, waiter: Waiter, now: float) -> None:
        """Process the request of a waiter again: answer it, or let it continue to wait."""
        if not waiter.port.waiting:
            self._parked.pop(waiter, None)
            return
        try:
            reply: Reply = self._read_or_lease(waiter.request, now)
        except CacheError as error:
            reply = Failed.of(error)
        if type(reply) in (Loading, Stale) and waiter.until > now:
            self._park(self.by_key[waiter.request.key], waiter)
        else:
            self._answer(waiter, reply)

    def deliver_late(self, lease: Lease, late: Found, now: float) -> None:
        """Deliver a value that was not stored to the waiters, unless it may be outdated for some of them.

        It may be outdated if it has a tag that the lease did not list: a waiter may have asked after the tag was
        invalidated.
        """
        if set(late.tags) <= set(lease.request.tags):
            self.answer_all(lease, late)
        else:
            self._answer_all_again(lease, now)

    def _withdraw(self, key: str, asked: str) -> None:
        """Answer the waiter whose request has the token `asked`, if any, because it was withdrawn."""
        current = self.by_key.get(key)
        revoked = [each for each in self._revoked.values() if each.request.key == key] if self._revoked else []
        for lease in revoked if current is None else [current, *revoked]:
            for waiter in lease.waiters:
                if waiter.request.token == asked:
                    lease.waiters.remove(waiter)
                    if not lease.waiters:
                        self._due.discard(lease)
                        self._revoked.pop(lease.token, None)
                    self._answer(waiter, NotHeld())
                    return

    def _take_waiters(self, lease: Lease) -> list[Waiter]:
        self._due.discard(lease)
        waiters, lease.waiters = lease.waiters, []
        return waiters

    # Revocation

    def revoke(self, key: str) -> None:
        """Revoke the lease of a key, if there is one."""
        if (lease := self.by_key.get(key)) is not None:
            self.take(lease)
            if lease.waiters:
                self._revoked[lease.token] = lease

    def revoke_all(self, matches: Callable[[str], object] = lambda key: True) -> None:
        """Revoke the leases of all matching keys."""
        for key in [key for key in self.by_key if matches(key)]:
            self.revoke(key)

    def revoke_tags(self, tags: Iterable[str], version: float) -> None:
        """Revoke the leases that list one of `tags`, and record the tags for values that turn out to have one."""
        for tag in tags:
            for key in tuple(self._tagged.get(tag, ())):
                self.revoke(key)
            if self.by_key:
                self._invalidated_tags[tag] = version
        if len(self._invalidated_tags) > self._max_tags:
            self._floor = version
            self._invalidated_tags.clear()

    def was_lost(self, lease: Lease, tags: Collection[str]) -> bool:
        """Return true if one of `tags` was invalidated since the lease was granted."""
        return bool(tags) and any(
            max(self._invalidated_tags.get(tag, 0.0), self._floor) > lease.granted for tag in tags
        )

    # Expiry

    def advance(self, now: float) -> None:
        """Expire leases, and answer callers whose wait has ended."""
        while (lease := self._due.pop(now)) is not None:
            is_current = self.by_key.get(lease.request.key) is lease
            if lease.expires_at <= now:
                if is_current:
                    self.take(lease)
                else:
                    del self._revoked[lease.token]
                self._answer_all_again(lease, now)
                continue
            expired = [each for each in lease.waiters if each.until <= now]
            lease.waiters = [each for each in lease.waiters if each.until > now]
            for waiter in expired:
                self._answer_again(waiter, now)
            if lease.waiters:
                self._due.set(lease, min(lease.expires_at, *(each.until for each in lease.waiters)))
            elif not is_current:
                del self._revoked[lease.token]

    def clear(self) -> None:
        for each in (self.by_key, self._revoked, self._tagged, self._invalidated_tags, self._parked, self._due):
            each.clear()

    def repair(self, now: float) -> Collection[DeferredReply]:
        """Restore consistency after an interrupted turn, and return the replies that are still pending.

        A lease that its caller did not receive is removed. Requests of callers whose lease has ended are processed
        again.
        """
        if (ungranted := self.granting) is not None and self.by_key.get(ungranted.request.key) is ungranted:
            del self.by_key[ungranted.request.key]
        self.granting = None
        self._tagged.clear()
        for lease in self.by_key.values():
            for tag in lease.request.tags:
                self._tagged.setdefault(tag, set()).add(lease.request.key)
        waited_for = [lease for lease in (*self.by_key.values(), *self._revoked.values()) if lease.waiters]
        self._due.clear()
        for lease in waited_for:
            self._due.set(lease, min(lease.expires_at, *(each.until for each in lease.waiters)))
        kept = {waiter for lease in waited_for for waiter in lease.waiters}
        for waiter in list(self._parked):
            if waiter not in kept:
                self._answer_again(waiter, now)
        return [waiter.port for waiter in self._parked]
