"""What a memory store does about values that are loaded: leases, waiting, and what may be served stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cachebus.actors.ports import Clock, Deferred
from cachebus.messages import (
    BadMessage,
    CacheError,
    Failed,
    Found,
    GetOrLease,
    LeaseGranted,
    Loaded,
    LoaderFailed,
    Loading,
    LoadMetadata,
    NotHeld,
    NotStored,
    Released,
    ReleaseLease,
    Renewed,
    RenewLease,
    Reply,
    Set,
    Stale,
    Stored,
)

from .durations import time_stale
from .eviction import NEVER, Entry
from .lease_checks import check_lease
from .leases import Lease, LeaseTable, Waiter
from .table import EntryTable, Kept


class LoadTable(EntryTable):
    """An `EntryTable` whose keys are loaded by one caller at a time. `defer` promises a reply for later.

    The rule behind all of it: a value is stored under a lease only if nothing has invalidated its key since the lease was
    granted, which was before the load began.
    """

    def __init__(
        self,
        *,
        max_entries: int | None,
        max_bytes: int | None,
        default_ttl: float | None,
        policy: str,
        weigher: Callable[[Any], int],
        clock: Clock,
        max_leases: int,
    ) -> None:
        super().__init__(
            max_entries=max_entries,
            max_bytes=max_bytes,
            default_ttl=default_ttl,
            policy=policy,
            weigher=weigher,
            clock=clock,
        )
        self.defer: Callable[[], Deferred] | None = None
        self._leases = LeaseTable(again=self._again, on_due=self._announce_due, max_leases=max_leases)
        self._leased = self._leases.by_key

    # The verbs

    def get_or_lease(self, request: GetOrLease) -> Reply | Deferred:
        """Read, or lease, or wait."""
        check_lease(request)
        now = self._now()
        reply = self._read_or_lease(request, now)
        if type(reply) in (Loading, Stale) and request.wait > 0 and self.defer is not None:
            lease = self._leases.by_key[request.key]
            if lease.owner != request.owner and self._leases.has_room():
                port = self.defer()
                self._leases.park(lease, Waiter(request, port, now + request.wait))
                return port
        return reply

    def renew(self, request: RenewLease) -> Renewed | NotHeld:
        """Prolong a lease."""
        if self._leases.renew(request.key, request.token, request.lease_ttl, self._now()):
            return Renewed(request.lease_ttl)
        return NotHeld()

    def release(self, request: ReleaseLease) -> Released | NotHeld:
        """Give a lease back, with what those who wait shall be told."""
        now = self._now()
        token = self._leases.name_of(request.key, request.token)
        lease = self._leases.held(request.key, token, now)
        ended = lease
        if lease is not None:
            self._leases.take(lease)
        else:
            ended = self._leases.take_void(request.key, token)
        if ended is not None:
            if request.late is not None:
                self._bring_late(ended, request.late, now)
            elif request.error:
                self._leases.answer_all(ended, Failed.of(LoaderFailed(error=request.error)))
            else:
                self._leases.ask_again(ended, now)
        return NotHeld() if lease is None else Released()

    def set_leased(self, request: Set, token: str, now: float) -> Stored | NotStored:
        """Store what was loaded under a lease, if that is still held."""
        if request.only_if is not None:
            raise BadMessage("a value that is stored under a lease has no other condition")
        late = Found(request.value, 0.0, None, request.tags)
        lease = self._leases.held(request.key, token, now)
        if lease is None:
            if (void := self._leases.take_void(request.key, token)) is not None:
                self._bring_late(void, late, now)
            return self._lost(request.key, now)
        if self._leases.was_lost(lease, request.tags):
            self._leases.take(lease)
            self._bring_late(lease, late, now)
            return self._lost(request.key, now)
        self._leases.take(lease)
        try:
            entry = self._store(request.key, request.value, request.ttl, request.tags, now)
        except CacheError:
            self._bring_late(lease, late, now)
            raise
        if (metadata := request.metadata) is not None:
            self._keep_metadata(entry, metadata, now)
        if lease.waiters:
            self._leases.answer_all(lease, self._found(entry, now))
        return Stored(entry.version)

    # What is there

    def _found(self, entry: Entry, now: float) -> Found:
        """The reply that says a live entry."""
        version, left = entry.version, entry.expires_at - now
        ttl = left if left < NEVER else None
        if (kept := self._metadata_of.get(entry.key)) is None:
            return Found(entry.value, version, ttl, entry.tags, version)
        said = kept.metadata
        return Loaded(
            entry.value, version, ttl, entry.tags, version, said.load_time, said.stale_for, said.etag, kept.lifetime
        )

    def _stale(self, key: str, now: float, lease: Lease | None = None) -> Stale | None:
        """The reply that says what may still be served of a key without a live value."""
        entry, kept = self._entries.get(key), self._metadata_of.get(key)
        if entry is None or kept is None or entry.expires_at > now or kept.stale_until <= now:
            return None
        if entry.tags and not self._tags.valid(entry):
            return None
        token, remaining = ("", 0.0) if lease is None else (lease.token, max(0.0, lease.expires_at - now))
        metadata = kept.metadata
        return Stale(
            entry.value, entry.version, entry.tags, entry.version, metadata.load_time, metadata.etag, token, remaining
        )

    def _keep_metadata(self, entry: Entry, metadata: LoadMetadata, now: float) -> None:
        lifetime = None if entry.expires_at == NEVER else entry.expires_at - now
        self._metadata_of[entry.key] = Kept(metadata, lifetime, entry.expires_at + time_stale(metadata))

    # Leases

    def _read_or_lease(self, request: GetOrLease, now: float) -> Found | LeaseGranted | Loading | Stale:
        entry = self._live(request.key, now)
        if entry is not None and not request.refresh:
            return self._found(entry, now)
        lease = self._leases.current(request.key, now)
        if lease is None:
            lease = self._leases.grant(request, self._version, now)
        if lease.asked == request.token:
            granted = LeaseGranted(lease.token, self._stale(request.key, now))
            self._leases.granting = None
            return granted
        if entry is not None:
            return self._found(entry, now)
        stale = self._stale(request.key, now, lease)
        return stale if stale is not None else Loading(lease.token, max(0.0, lease.expires_at - now))

    def _again(self, waiter: Waiter, now: float) -> None:
        """Answer a caller who waited by what is there now, or let it wait on."""
        if not waiter.port.waiting:
            self._leases.forget(waiter)
            return
        try:
            reply = self._read_or_lease(waiter.request, now)
        except CacheError as error:
            self._leases.answer(waiter, Failed.of(error))
            return
        if type(reply) in (Loading, Stale) and waiter.until > now:
            self._leases.park(self._leases.by_key[waiter.request.key], waiter)
        else:
            self._leases.answer(waiter, reply)

    def _bring_late(self, lease: Lease, late: Found, now: float) -> None:
        """Give a value that is not stored to those who waited for it, unless it may be out of date for some of them.

        It may be if it has a tag that nobody knew of until now: then this was the lease of callers who asked after that
        tag's invalidation too, and a waiter may wait for several, of whom it does not say when they asked.
        """
        if set(late.tags) <= set(lease.tags):
            self._leases.answer_all(lease, late)
        else:
            self._leases.ask_again(lease, now)

    def _overtaken(self, entry: Entry) -> None:
        lease = self._leases.by_key.get(entry.key)
        if lease is not None:
            self._leases.take(lease)
            self._leases.answer_all(lease, self._found(entry, self._now()))

    def _lost(self, key: str, now: float) -> NotStored:
        entry = self._live(key, now)
        return NotStored(0.0 if entry is None else entry.version, "lease_lost")
