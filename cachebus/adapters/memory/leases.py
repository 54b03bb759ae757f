"""Leases of a store in this process: rights to load keys, the callers that wait for a load, and what revokes a lease.

The idea is that of Nishtala et al., "Scaling Memcache at Facebook" (NSDI 2013): a delete voids the lease of a load that is
under way, so that what was loaded before it is never stored after it.
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
    """A parked caller: what it asked, where its answer goes, and until when it waits."""

    request: GetOrLease
    port: DeferredReply
    until: float


@dataclass(slots=True, eq=False)
class Lease:
    """The right to load the key of a request, and its waiters. `granted` is the store's version then, `token` its name."""

    request: GetOrLease
    granted: float
    expires_at: float
    token: str
    waiters: list[Waiter] = field(default_factory=list)


class LeaseTable:
    """The leases of one store, at most `max_leases` of them with `max_waiters` callers parked.

    The rule: a value is stored under a lease only if nothing has invalidated its key since the lease was granted.

    A lease is *current* until it is taken, lost or run out. One that is lost while others wait for it is kept as *void*:
    its loader may still bring them the value. If that does not happen in time, their questions are answered again.
    """

    def __init__(
        self, table: EntryTable, *, max_leases: int = 10_000, max_waiters: int = 10_000, max_tags: int = 10_000
    ) -> None:
        self._table = table
        self._max_leases = max_leases
        self._max_waiters = max_waiters
        self._max_tags = max_tags
        self.by_key: dict[str, Lease] = {}  # A store looks whether it is empty on each write.
        self._void: dict[str, Lease] = {}
        # Every caller that waits, until it is answered: what an interrupted turn cannot lose.
        self._parked: dict[Waiter, None] = {}
        self.granting: Lease | None = None  # The lease whose caller has not got it yet.
        self._tagged: dict[str, set[str]] = {}
        # tag -> version of its last invalidation during a lease. What does not fit is said of all tags, by `_floor`.
        self._lost_tags: dict[str, float] = {}
        self._floor = 0.0
        # Only leases with waiters: any other is found to have run out when it is looked at.
        self._due: TimerQueue[Lease] = TimerQueue()
        self.due = self._due.due  # Returns when to call `advance` next; infinity while nothing waits.

    def __repr__(self) -> str:
        return f"<LeaseTable {len(self.by_key)}/{self._max_leases} leases, {len(self._parked)}/{self._max_waiters} waiting>"

    # The verbs

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
        """Prolong a lease. One that is void goes on for its waiters, and is not held."""
        now = self._table.now()
        lease = self.held(request.key, request.token, now)
        if (kept := lease or self._void.get(request.token)) is not None:
            kept.expires_at = now + request.lease_ttl
        return NotHeld() if lease is None else Renewed(request.lease_ttl)

    def release(self, request: ReleaseLease) -> Released | NotHeld:
        """Give a lease back, with what its waiters shall get."""
        now = self._table.now()
        token = self._name_of(request.key, request.token)
        lease = self.held(request.key, token, now)
        if lease is not None:
            self.take(lease)
        if (ended := lease or self._take_void(request.key, token)) is None:
            self._withdraw(request.key, request.token)
        elif request.late is not None:
            self.bring_late(ended, request.late, now)
        elif request.error:
            self.answer_all(ended, Failed.of(LoaderFailed(error=request.error)))
        else:
            self._ask_again(ended, now)
        return NotHeld() if lease is None else Released()

    def set_leased(self, request: Set, token: str, now: float) -> Stored | NotStored:
        """Store what was loaded under a lease that is still held."""
        if request.only_if is not None:
            raise BadMessage("a value that is stored under a lease has no other condition")
        late = Found(request.value, 0.0, None, request.tags)
        lease = self.held(request.key, token, now)
        lost = lease is None or self.was_lost(lease, request.tags)
        if lease is not None:
            self.take(lease)
        if lease is None or lost:
            if (ended := lease or self._take_void(request.key, token)) is not None:
                self.bring_late(ended, late, now)
            entry = self._table.live(request.key, now)
            return NotStored(0.0 if entry is None else entry.version, "lease_lost")
        try:
            entry = self._table.write(request.key, request.value, request.ttl, request.tags, now)
        except CacheError:
            self.bring_late(lease, late, now)
            raise
        if request.metadata is not None:
            self._table.keep_metadata(entry, request.metadata, now)
        if lease.waiters:
            self.answer_all(lease, self._table.found(entry, now))
        return Stored(entry.version)

    def overtaken(self, entry: Entry) -> None:
        """End the load of a key that another caller has just written."""
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
        """Make the lease of a key that has none. Raises `Overloaded` when there are too many."""
        if len(self.by_key) >= self._max_leases:
            for lease in [each for each in self.by_key.values() if each.expires_at <= now and not each.waiters]:
                self.take(lease)
            if len(self.by_key) >= self._max_leases:
                raise Overloaded(f"{self._max_leases} keys are being loaded, which is the most", "", self._max_leases)
        lease = self.granting = Lease(request, version, now + request.lease_ttl, new_lease_name(request.token))
        self.by_key[request.key] = lease
        for tag in request.tags:
            self._tagged.setdefault(tag, set()).add(request.key)
        return lease

    # Ending

    def held(self, key: str, token: str, now: float) -> Lease | None:
        """Return the lease of a key, if it is this one and has not run out."""
        lease = self.by_key.get(key)
        return lease if lease is not None and lease.token == token and lease.expires_at > now else None

    def take(self, lease: Lease) -> None:
        """End a current lease. Its waiters are to be answered."""
        del self.by_key[lease.request.key]
        for tag in lease.request.tags:
            if (keys := self._tagged.get(tag)) is not None:  # `None` for a tag that is named twice.
                keys.discard(lease.request.key)
                if not keys:
                    del self._tagged[tag]
        if not self.by_key:
            self._lost_tags.clear()
            self._floor = 0.0

    def _take_void(self, key: str, token: str) -> Lease | None:
        """End a lease that was lost while others waited for it. These are to be answered."""
        lease = self._void.get(token)
        return self._void.pop(token) if lease is not None and lease.request.key == key else None

    def _name_of(self, key: str, asked: str) -> str:
        """Return the name of the lease that was asked for as `asked`, current or void; `asked` itself if there is none."""
        lease = self.by_key.get(key)
        if lease is not None and lease.request.token == asked:
            return lease.token
        return next((each.token for each in self._void.values() if each.request.token == asked), asked)

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
        """Give all waiters of a lease the same answer."""
        for waiter in self._empty(lease):
            self._answer(waiter, reply)

    def _ask_again(self, lease: Lease, now: float) -> None:
        for waiter in self._empty(lease):
            self._again(waiter, now)

    def _again(self, waiter: Waiter, now: float) -> None:
        """Answer a waiter by what is there now, or let it wait on."""
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

    def bring_late(self, lease: Lease, late: Found, now: float) -> None:
        """Give a value that is not stored to its waiters, unless it may be out of date for some of them.

        It may be if it has a tag that was not known until now: a waiter may have asked after the tag's invalidation.
        """
        if set(late.tags) <= set(lease.request.tags):
            self.answer_all(lease, late)
        else:
            self._ask_again(lease, now)

    def _withdraw(self, key: str, asked: str) -> None:
        """Answer the waiter with the question `asked`, if there is one: it has been given back."""
        current = self.by_key.get(key)
        void = [each for each in self._void.values() if each.request.key == key] if self._void else []
        for lease in void if current is None else [current, *void]:
            for waiter in lease.waiters:
                if waiter.request.token == asked:
                    lease.waiters.remove(waiter)
                    if not lease.waiters:
                        self._due.discard(lease)
                        self._void.pop(lease.token, None)
                    self._answer(waiter, NotHeld())
                    return

    def _empty(self, lease: Lease) -> list[Waiter]:
        self._due.discard(lease)
        waiters, lease.waiters = lease.waiters, []
        return waiters

    # Losing

    def void(self, key: str) -> None:
        """Lose the lease of a key, if there is one."""
        if (lease := self.by_key.get(key)) is not None:
            self.take(lease)
            if lease.waiters:
                self._void[lease.token] = lease

    def void_all(self, matches: Callable[[str], object] = lambda key: True) -> None:
        """Lose the leases of all keys that match."""
        for key in [key for key in self.by_key if matches(key)]:
            self.void(key)

    def void_tags(self, tags: Iterable[str], version: float) -> None:
        """Lose the leases that name one of `tags`, and note the tags for those that come to name one later."""
        for tag in tags:
            for key in tuple(self._tagged.get(tag, ())):
                self.void(key)
            if self.by_key:
                self._lost_tags[tag] = version
        if len(self._lost_tags) > self._max_tags:
            self._floor = version
            self._lost_tags.clear()

    def was_lost(self, lease: Lease, tags: Collection[str]) -> bool:
        """Return whether one of `tags` was invalidated since the lease was granted."""
        return bool(tags) and any(max(self._lost_tags.get(tag, 0.0), self._floor) > lease.granted for tag in tags)

    # Time

    def advance(self, now: float) -> None:
        """Let leases run out, and callers have waited long enough."""
        while (lease := self._due.pop(now)) is not None:
            is_current = self.by_key.get(lease.request.key) is lease
            if lease.expires_at <= now:
                if is_current:
                    self.take(lease)
                else:
                    del self._void[lease.token]
                self._ask_again(lease, now)
                continue
            gone = [each for each in lease.waiters if each.until <= now]
            lease.waiters = [each for each in lease.waiters if each.until > now]
            for waiter in gone:
                self._again(waiter, now)
            if lease.waiters:
                self._due.set(lease, min(lease.expires_at, *(each.until for each in lease.waiters)))
            elif not is_current:
                del self._void[lease.token]

    def clear(self) -> None:
        for each in (self.by_key, self._void, self._tagged, self._lost_tags, self._parked, self._due):
            each.clear()

    def repair(self, now: float) -> Collection[DeferredReply]:
        """Mend what an interrupted turn left half done, and return the replies that are still owed.

        A lease that its caller did not get goes. Callers that wait for no lease any more are answered by the store.
        """
        if (ghost := self.granting) is not None and self.by_key.get(ghost.request.key) is ghost:
            del self.by_key[ghost.request.key]
        self.granting = None
        self._tagged.clear()
        for lease in self.by_key.values():
            for tag in lease.request.tags:
                self._tagged.setdefault(tag, set()).add(lease.request.key)
        waited_for = [lease for lease in (*self.by_key.values(), *self._void.values()) if lease.waiters]
        self._due.clear()
        for lease in waited_for:
            self._due.set(lease, min(lease.expires_at, *(each.until for each in lease.waiters)))
        kept = {waiter for lease in waited_for for waiter in lease.waiters}
        for waiter in list(self._parked):
            if waiter not in kept:
                self._again(waiter, now)
        return [waiter.port for waiter in self._parked]
