"""Leases of a store in this process: who loads which key, who waits for it, and what takes the right away.

The idea is that of Nishtala et al., "Scaling Memcache at Facebook" (NSDI 2013): a delete voids the lease of a load that
is under way, so that what was loaded before it is never stored after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from cachebus.actors.ports import Deferred, TimerQueue
from cachebus.messages import GetOrLease, Overloaded, Reply
from cachebus.messages.leases import new_lease_name


class Waiter:
    """A caller who is parked: what it asked, where its answer goes, and until when it waits."""

    __slots__ = ("port", "request", "until")

    def __init__(self, request: GetOrLease, port: Deferred, until: float) -> None:
        self.request = request
        self.port = port
        self.until = until


class Lease:
    """The right to load a key, and those who wait for what comes of it. `granted` is the store's version then. It is called
    `token`, and was asked for as `asked`."""

    __slots__ = ("asked", "expires_at", "granted", "key", "owner", "tags", "token", "waiters")

    def __init__(self, request: GetOrLease, granted: float, expires_at: float) -> None:
        self.key = request.key
        self.asked = request.token
        self.token = new_lease_name(request.token)
        self.owner = request.owner
        self.tags = request.tags
        self.granted = granted
        self.expires_at = expires_at
        self.waiters: list[Waiter] = []


class LeaseTable:
    """The leases of one store, at most `max_leases` of them with `max_waiters` callers parked.

    A lease is *current* until it is taken, lost or run out. One that is lost while others wait for it is kept as *void*:
    whoever loads may still bring them the value, and if that does not happen in time they are asked for anew. `again`
    is called with a waiter who has to be answered by the state of the store as it is now; `on_due` with the time of the
    next event, when it has become an earlier one. Instants are on the store's monotonic clock.
    """

    def __init__(
        self,
        *,
        again: Callable[[Waiter, float], None],
        on_due: Callable[[float], None],
        max_leases: int = 10_000,
        max_waiters: int = 10_000,
        max_tags: int = 10_000,
    ) -> None:
        self._again = again
        self._on_due = on_due
        self._max_leases = max_leases
        self._max_waiters = max_waiters
        self._max_tags = max_tags
        self.by_key: dict[str, Lease] = {}  # A store looks whether it is empty on each write.
        self._void: dict[str, Lease] = {}
        # Every caller that waits, until it is answered: what an interrupted turn cannot lose.
        self._parked: dict[Waiter, None] = {}
        self.granting: Lease | None = None  # The lease of which its caller has not been told yet.
        self._tagged: dict[str, set[str]] = {}
        # tag -> version of its last invalidation during a lease. What does not fit is said of all tags, by `_floor`.
        self._lost_tags: dict[str, float] = {}
        self._floor = 0.0
        # Only leases with waiters: any other is found to have run out when it is looked at.
        self._due: TimerQueue[Lease] = TimerQueue()

    def __len__(self) -> int:
        return len(self.by_key)

    def __repr__(self) -> str:
        return f"<LeaseTable {len(self.by_key)}/{self._max_leases} leases, {len(self._parked)}/{self._max_waiters} waiting>"

    # Granting

    def current(self, key: str, now: float) -> Lease | None:
        """The lease under which a key is being loaded."""
        lease = self.by_key.get(key)
        if lease is not None and lease.expires_at <= now and not lease.waiters:
            self._forget(lease)
            return None
        return lease

    def grant(self, request: GetOrLease, version: float, now: float) -> Lease:
        """Make the lease of a key that has none. Raises `Overloaded` when there are too many."""
        if len(self.by_key) >= self._max_leases:
            for lease in [each for each in self.by_key.values() if each.expires_at <= now and not each.waiters]:
                self._forget(lease)
            if len(self.by_key) >= self._max_leases:
                raise Overloaded(f"{self._max_leases} keys are being loaded, which is the most", "", self._max_leases)
        lease = self.granting = Lease(request, version, now + request.lease_ttl)
        self.by_key[request.key] = lease
        for tag in request.tags:
            self._tagged.setdefault(tag, set()).add(request.key)
        return lease

    def has_room(self) -> bool:
        """Whether one more caller may wait."""
        return len(self._parked) < self._max_waiters

    def park(self, lease: Lease, waiter: Waiter) -> None:
        """Let a caller wait for what comes of a lease."""
        self._parked[waiter] = None
        lease.waiters.append(waiter)
        when = min(lease.expires_at, waiter.until)
        if self._due.set_earlier(lease, when):
            self._on_due(when)

    # Ending

    def held(self, key: str, token: str, now: float) -> Lease | None:
        """The lease of a key, if it is this one and has not run out."""
        lease = self.by_key.get(key)
        return lease if lease is not None and lease.token == token and lease.expires_at > now else None

    def renew(self, key: str, token: str, lease_ttl: float, now: float) -> bool:
        """Prolong a lease; says whether it was held. One that is void goes on for those who wait, and is not held."""
        lease = self.held(key, token, now)
        if lease is None:
            if (void := self._void.get(token)) is not None:
                void.expires_at = now + lease_ttl
            return False
        lease.expires_at = now + lease_ttl
        return True

    def take(self, lease: Lease) -> None:
        """End a current lease. Whoever waits for it is to be answered."""
        self._forget(lease)

    def take_void(self, key: str, token: str) -> Lease | None:
        """End a lease that was lost while others waited for it. These are to be answered."""
        lease = self._void.get(token)
        if lease is None or lease.key != key:
            return None
        return self._void.pop(token)

    def name_of(self, key: str, asked: str) -> str:
        """The name of the lease that was asked for as `asked`, be it current or void; `asked` itself if there is none."""
        lease = self.by_key.get(key)
        if lease is not None and lease.asked == asked:
            return lease.token
        if asked in self._void:
            return asked
        return next((each.token for each in self._void.values() if each.asked == asked), asked)

    def answer(self, waiter: Waiter, reply: Reply) -> None:
        """Give a caller its answer."""
        waiter.port.answer(reply)
        self.forget(waiter)

    def answer_all(self, lease: Lease, reply: Reply) -> None:
        """Give all who wait for a lease the same answer."""
        for waiter in self._empty(lease):
            self.answer(waiter, reply)

    def ask_again(self, lease: Lease, now: float) -> None:
        """Have all who wait for a lease answered by the state of the store as it is now."""
        for waiter in self._empty(lease):
            self._again(waiter, now)

    def forget(self, waiter: Waiter) -> None:
        """Note that a caller does not wait any more."""
        self._parked.pop(waiter, None)

    def withdraw(self, key: str, asked: str, reply: Reply) -> None:
        """Answer the caller who waits with the question `asked`, if there is one: it has been given back."""
        current = self.by_key.get(key)
        void = [each for each in self._void.values() if each.key == key] if self._void else []
        for lease in void if current is None else [current, *void]:
            for waiter in lease.waiters:
                if waiter.request.token == asked:
                    lease.waiters.remove(waiter)
                    if not lease.waiters:
                        self._due.discard(lease)
                        self._void.pop(lease.token, None)
                    self.answer(waiter, reply)
                    return

    def _empty(self, lease: Lease) -> list[Waiter]:
        self._due.discard(lease)
        waiters, lease.waiters = lease.waiters, []
        return waiters

    # Losing

    def void(self, key: str) -> None:
        """Lose the lease of a key, if there is one."""
        if (lease := self.by_key.get(key)) is not None:
            self._forget(lease)
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
        """Whether one of `tags` was invalidated since the lease was granted."""
        return bool(tags) and any(max(self._lost_tags.get(tag, 0.0), self._floor) > lease.granted for tag in tags)

    # Time

    def due(self) -> float:
        """When to call `advance` next; infinity while nobody waits."""
        return self._due.due()

    def advance(self, now: float) -> None:
        """Let leases run out, and callers have waited long enough."""
        while (lease := self._due.pop(now)) is not None:
            is_current = self.by_key.get(lease.key) is lease
            if lease.expires_at <= now:
                if is_current:
                    self._forget(lease)
                else:
                    del self._void[lease.token]
                self.ask_again(lease, now)
                continue
            gone = [each for each in lease.waiters if each.until <= now]
            if gone:
                lease.waiters = [each for each in lease.waiters if each.until > now]
                for waiter in gone:
                    self._again(waiter, now)
            if lease.waiters:
                self._due.set(lease, min(lease.expires_at, *(each.until for each in lease.waiters)))
            elif not is_current:
                del self._void[lease.token]

    def clear(self) -> None:
        """Forget every lease, and all who wait."""
        for each in (self.by_key, self._void, self._tagged, self._lost_tags, self._parked, self._due):
            each.clear()

    def repair(self, now: float) -> Collection[Deferred]:
        """Put right what an interrupted turn left half done, and return the replies that are still owed.

        A lease whose caller was interrupted before it was told goes. Callers that wait for no lease any more are answered
        by the state of the store.
        """
        if (ghost := self.granting) is not None:
            if self.by_key.get(ghost.key) is ghost:
                del self.by_key[ghost.key]
            self.granting = None
        self._tagged.clear()
        for lease in self.by_key.values():
            for tag in lease.tags:
                self._tagged.setdefault(tag, set()).add(lease.key)
        waited_for = [lease for lease in (*self.by_key.values(), *self._void.values()) if lease.waiters]
        self._due.clear()
        for lease in waited_for:
            self._due.set(lease, min(lease.expires_at, *(each.until for each in lease.waiters)))
        kept = {waiter for lease in waited_for for waiter in lease.waiters}
        for waiter in list(self._parked):
            if waiter not in kept:
                self._again(waiter, now)
        return [waiter.port for waiter in self._parked]

    def _forget(self, lease: Lease) -> None:
        del self.by_key[lease.key]
        for tag in lease.tags:
            if (keys := self._tagged.get(tag)) is not None:  # `None` for a tag that is named twice.
                keys.discard(lease.key)
                if not keys:
                    del self._tagged[tag]
        if not self.by_key:
            self._lost_tags.clear()
            self._floor = 0.0
